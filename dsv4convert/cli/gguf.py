"""Commands that write a GGUF: hf-to-gguf and merge."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from .. import api
from ..errors import UsageError, counted
from ..html_report.figures import human_bytes
from .llama_cpp import LLAMA_CPP_OPTIONS
from .options import (
    LAYERS_METAVAR,
    RunOptions,
    draft_option,
    ggml_lib_option,
    index_option,
    max_file_size_option,
    run_conversion,
    run_options,
    source_argument,
    strict_option,
)
from .parsing import CONTENT, CONVERT, METADATA, PATH, RUN, TYPES, argument, command, option
from .tables import Block, Table, print_result

if TYPE_CHECKING:
    from ..targets.recipe_sizes import RecipeSizes


# Options that say what a recipe says, and are of no use in a list of recipes.
TYPE_OPTIONS = ("dense", "experts", "recipe", "tensor_type", "output_type", "embedding_type", "pure")


@command(
    "hf-to-gguf",
    panel=CONVERT,
    example="dsv4convert hf-to-gguf DeepSeek-V4-Flash DeepSeek-V4-Flash.gguf --draft split",
    answers=LLAMA_CPP_OPTIONS,
)
@source_argument
@argument(
    "out",
    type=PATH,
    required=False,
    description="The .gguf file to write, or an existing folder for it; by default the current folder, "
    "and a name made from the model's.",
)
@option(
    "--dense",
    metavar="TYPE",
    panel=TYPES,
    help="Type of attention and shared experts, e.g. q8_0, bf16, q4_k; by default q8_0 for FP8, otherwise the "
    "source's.",
)
@option(
    "--experts",
    metavar="TYPE",
    panel=TYPES,
    help="Type of the routed experts, e.g. mxfp4, q2_k, iq2_xxs; by default mxfp4 for FP4, q8_0 for FP8, otherwise the "
    "source's.",
)
@option(
    "--recipe",
    metavar="NAME|FILE.toml",
    panel=TYPES,
    help="Recipe of types, e.g. q2_k, q4_k_m, iq2_xxs; other type options take precedence.",
)
@option(
    "--list-recipes",
    is_flag=True,
    panel=TYPES,
    help="List the recipes with the sizes of their files, from headers alone, and stop; with --fit, say what fits.",
)
@option(
    "--fit",
    metavar="SIZE",
    panel=TYPES,
    help="Choose the largest recipe that fits into so much memory with its KV cache, e.g. 96GiB; with --recipe, check "
    "that it fits.",
)
@option(
    "--context",
    metavar="TOKENS",
    panel=TYPES,
    help="Tokens of the KV cache for --fit and --list-recipes, e.g. 64k; by default 128k or what the model allows.",
)
@option(
    "--tensor-type",
    metavar="REGEX=TYPE",
    multiple=True,
    panel=TYPES,
    help="Type of the tensors whose name matches, e.g. ffn_down_exps=q4_k; can be repeated, the last match wins.",
)
@option("--output-type", metavar="TYPE", panel=TYPES, help="Type of output.weight; by default the source's.")
@option("--embedding-type", metavar="TYPE", panel=TYPES, help="Type of token_embd.weight; by default the source's.")
@option("--pure", is_flag=True, panel=TYPES, help="Apply the type of --dense to every matrix that can be quantised.")
@option(
    "--imatrix",
    type=PATH,
    panel=TYPES,
    help="Importance matrix for low-bit types, in either of llama.cpp's forms.",
)
@option(
    "--importance",
    metavar="weights",
    panel=TYPES,
    help="Importance without a matrix: the sum of squares of the weights of each column.",
)
@ggml_lib_option(TYPES)
@option(
    "--engram",
    type=click.Choice(["q8_0", "mxfp4", "bf16", "i8-row264", "i8-split"]),
    panel=TYPES,
    help="Type of V4.1's n-gram tables; by default q8_0. i8-row264 and i8-split keep the published bytes, with the "
    "scales at the end of each row or in a tensor of their own.",
)
@draft_option(
    "keep",
    "drop",
    "only",
    "split",
    help="MTP layers or DSpark stages: drop them (default), write only them, or split them off into a file of their "
    "own; keep, as blocks of the model, needs --dialect deepseek-v4.",
)
@option(
    "--mmproj",
    type=click.Choice(["drop", "only", "split"]),
    panel=CONTENT,
    help="Vision tower: drop it (default), write only it, or split it off into a file of its own.",
)
@option(
    "--layers",
    metavar=LAYERS_METAVAR,
    panel=CONTENT,
    help="Range of layers to write, e.g. 0-3; a slice to try things with.",
)
@max_file_size_option(None, "Maximum file size, e.g. 45G; a larger model is split into several files.")
@option(
    "--split-max-tensors",
    type=click.IntRange(min=1),
    metavar="N",
    panel=CONTENT,
    help="Maximum number of tensors in a file; a model with more is split, with 1 into one file for each tensor.",
)
@option(
    "--no-tensor-first-split",
    is_flag=True,
    panel=CONTENT,
    help="Leave the first file of a split model to the metadata, so that these can change without the tensors.",
)
@option("--engram-last", is_flag=True, panel=CONTENT, help="Put V4.1's n-gram tables after all other tensors.")
@option(
    "--dialect",
    type=click.Choice(["llama.cpp", "deepseek-v4", "ds4"]),
    default="llama.cpp",
    panel=METADATA,
    help="Reader that the file is for: llama.cpp; ds4, the port DwarfStar, which wants F16 and Q8_0 where "
    "llama.cpp has BF16 and F32; or deepseek-v4, an early port with names of its own, from before llama.cpp's.",
)
@option(
    "--tokenizer-pre",
    metavar="NAME",
    panel=METADATA,
    help="Value of tokenizer.ggml.pre, for a tokenizer that is not recognised.",
)
@option(
    "--name",
    metavar="NAME",
    panel=METADATA,
    help="Value of general.name; by default from the model card or the folder's name.",
)
@index_option
@strict_option
@run_options
def hf_to_gguf(list_recipes: bool, *, run: RunOptions, **options: Any) -> None:
    """Convert a checkpoint folder to GGUF for llama.cpp."""
    if not list_recipes:
        run_conversion(api.convert_gguf, run, writes_folder=False, **options)
        return
    for name in (*TYPE_OPTIONS, "out"):
        if options.pop(name):
            shown = "OUT" if name == "out" else f"--{name.replace('_', '-')}"
            raise UsageError(f"--list-recipes and {shown} exclude each other", hint=f"leave out {shown}")
    for name in ("ggml_lib", "strict"):
        del options[name]
    sizes = api.list_recipes(**options)
    print_result(sizes.as_json(), _describe_recipes(sizes), as_json=run.as_json)


def _describe_recipes(sizes: RecipeSizes) -> Iterator[Block]:
    """Yield the recipes as a table: size, size with the KV cache, whether it fits, and what it is."""
    kinds = ", ".join(f"{kind} {human_bytes(nbytes)}" for kind, nbytes in sizes.cache.items())
    yield f"KV cache for {counted(sizes.context, 'token')}: {human_bytes(sizes.cache_bytes)} ({kinds})"
    rows = []
    for recipe in sizes.recipes:
        size, with_cache, verdict = "", "", recipe.obstacle or ""
        if recipe.nbytes is not None:
            size, with_cache = human_bytes(recipe.nbytes), human_bytes(recipe.nbytes + sizes.cache_bytes)
            if recipe.missing_bytes:
                verdict = f"{human_bytes(recipe.missing_bytes)} missing"
            elif sizes.fit is not None and not verdict:
                verdict = "chosen" if recipe.name == sizes.chosen else "fits"
        rows.append((recipe.name, size, with_cache, verdict, recipe.description))
    yield Table(("recipe", "size", "with KV cache", "verdict", "description"), rows, frozenset({1, 2}))


@command("merge", panel=CONVERT, example="dsv4convert merge flash-00001-of-00004.gguf flash.gguf")
@argument("source", type=PATH, description="Any file of a split GGUF; the others are found by their names.")
@argument("out", type=PATH, description="The .gguf file to write, or an existing folder for it.")
@option(
    "--delete-parts",
    is_flag=True,
    panel=RUN,
    help="Cut each file of the split once its tensors are safely in the output, and remove all at the end, so that the "
    "disk needs room for two of them only; after an interruption only --resume can continue.",
)
@run_options
def merge(**options: Any) -> None:
    """Merge the files of a split GGUF into one."""
    run_conversion(api.merge, writes_folder=False, **options)
