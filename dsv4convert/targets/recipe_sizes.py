"""How large the GGUF of a checkpoint is by each recipe, from headers alone, and the largest that fits into memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.folder import BY_INDEX, Checkpoint
from ..checkpoint.weights import Encoding
from ..errors import UsageError
from ..formats.ggml_types import NEED_IMPORTANCE
from ..model.cache_bytes import DEFAULT_CONTEXT, cache_parts
from ..plan import Plan
from .gguf import open_for_gguf, plan_checkpoint
from .gguf_tensors import GgufOptions
from .low_bit import SizesOnly
from .recipes import load_recipe, recipe_names
from .segments import MXFP4

IMPORTANCE_HINT = "--imatrix FILE or --importance weights"
NEEDS_IMPORTANCE = f"needs {IMPORTANCE_HINT}"


@dataclass(frozen=True)
class RecipeSize:
    """The files that a recipe makes of a checkpoint: ``nbytes`` of all together, ``missing_bytes`` of them do not fit.

    ``obstacle`` says why the recipe makes nothing or is not to be chosen, None where nothing is in the way. ``nbytes``
    is None where the options or the dialect refuse the recipe.
    """

    name: str
    description: str
    nbytes: int | None
    missing_bytes: int
    obstacle: str | None


@dataclass(frozen=True)
class RecipeSizes:
    """The recipes of a checkpoint, the smallest first, with the KV cache for ``context`` tokens.

    ``cache`` are its bytes by kind, as llama.cpp holds it in F16. ``fit`` are the bytes that model and KV cache may
    take together, None for any. ``chosen`` is the name of the largest recipe without an obstacle that fits, None where
    there is none or no ``fit``.
    """

    recipes: tuple[RecipeSize, ...]
    context: int
    cache: Mapping[str, int]
    fit: int | None
    chosen: str | None

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of the KV cache."""
        return sum(self.cache.values())

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "recipes": [asdict(recipe) for recipe in self.recipes]}


def size_recipes(
    source: Path,
    options: GgufOptions,
    *,
    context: int | None = None,
    fit: int | None = None,
    tokenizer_pre: str | None = None,
    name: str | None = None,
    index: str = BY_INDEX,
) -> RecipeSizes:
    """Return the recipes for ``options`` with the sizes of their files, and the one that ``fit`` chooses.

    ``options.recipe`` limits the choice to one recipe. ``context`` None is 128k, or what the model allows.

    Raises:
        UsageError: a context that the model does not have, or malformed options.
        Dsv4Error: see ``plan_gguf``.
    """
    checkpoint = open_for_gguf(source, options, index=index)
    config = checkpoint.config if options.layers is None else checkpoint.config.sliced(*options.layers)
    context = min(DEFAULT_CONTEXT, config.max_position_embeddings) if context is None else context
    if not 1 <= context <= config.max_position_embeddings:
        raise UsageError("--context: out of range", expected=f"1 to {config.max_position_embeddings}", got=context)
    cache: Counter[str] = Counter()
    for part in cache_parts(config, context, "f16"):
        cache[part.kind] += part.nbytes
    names = recipe_names() if options.recipe is None else [options.recipe]
    sizes: list[RecipeSize] = []
    lossless: list[int] = []  # sizes of files that keep FP4 experts as they are
    for recipe_name in names:
        recipe = load_recipe(recipe_name)
        if options.recipe is None and recipe.dialect not in (None, options.dialect):
            continue
        asked = replace(options, recipe=recipe_name)
        made = SizesOnly(imatrix_file=options.imatrix)
        try:
            plan = plan_checkpoint(checkpoint, None, asked, tokenizer_pre=tokenizer_pre, name=name, low_bit=made)
        except UsageError as error:
            if options.recipe is not None:
                raise
            sizes.append(RecipeSize(recipe_name, recipe.description, None, 0, error.what))
            continue
        missing = 0 if fit is None else max(0, plan.nbytes + sum(cache.values()) - fit)
        sizes.append(RecipeSize(recipe_name, recipe.description, plan.nbytes, missing, _lack(plan, options)))
        if _keeps_experts(checkpoint, plan):
            lossless.append(plan.nbytes)
    if options.recipe is None and lossless:
        sizes = [_without_gain(size, min(lossless)) for size in sizes]
    sizes.sort(key=lambda size: (size.nbytes is None, size.nbytes or 0, size.name))
    fitting = [size.name for size in sizes if size.nbytes is not None and not size.missing_bytes and not size.obstacle]
    return RecipeSizes(tuple(sizes), context, dict(cache), fit, fitting[-1] if fit is not None and fitting else None)


def check_fits(sizes: RecipeSizes) -> str:
    """Return the recipe that was chosen.

    Raises:
        UsageError: none fits; says what is missing.
    """
    if sizes.chosen is not None:
        return sizes.chosen
    sized = [(size, size.nbytes) for size in sizes.recipes if size.nbytes is not None]
    if not sized:
        raise UsageError("--fit: no recipe goes with the other options", got=sizes.recipes[0].obstacle)
    smallest, nbytes = next(((size, nbytes) for size, nbytes in sized if not size.obstacle), sized[0])
    smaller = [size.name for size, _ in sized if size.obstacle == NEEDS_IMPORTANCE and not size.missing_bytes]
    if smaller:
        hint = f"{smaller[-1]} fits, and needs {IMPORTANCE_HINT}"
    else:
        hint = "--list-recipes shows all recipes; a smaller --context needs a smaller KV cache"
    if not smallest.missing_bytes:
        raise UsageError("--fit: no recipe fits without importance", got=sizes.fit, hint=hint)
    subject = f"recipe {smallest.name} does not fit:" if len(sized) == 1 else f"no recipe fits: for {smallest.name}"
    raise UsageError(
        f"--fit: {subject} {smallest.missing_bytes} bytes are missing",
        expected=f"{nbytes} bytes for the model and {sizes.cache_bytes} for the KV cache of {sizes.context} tokens",
        got=sizes.fit,
        hint=hint,
    )


def _lack(plan: Plan, options: GgufOptions) -> str | None:
    """Return what is missing to make a plan's types; of a recipe that was asked for, the conversion itself says it."""
    if options.recipe is not None or options.imatrix is not None or options.importance is not None:
        return None
    types = {tensor.dtype for tensor in plan.tensors()}
    return NEEDS_IMPORTANCE if types & NEED_IMPORTANCE else None


def _keeps_experts(checkpoint: Checkpoint, plan: Plan) -> bool:
    """Return whether all routed experts are published in FP4, and stay so."""
    experts = [tensor.dtype for tensor in plan.tensors() if "_exps." in tensor.name]
    held = {weight.encoding for weight in checkpoint.weights.values() if weight.expert is not None}
    return held == {Encoding.FP4} and set(experts) == {MXFP4.name}


def _without_gain(size: RecipeSize, lossless: int) -> RecipeSize:
    if size.nbytes is None or size.nbytes <= lossless:
        return size
    return replace(size, obstacle="larger than MXFP4, which keeps the published experts exactly")
