"""The command that runs two models side by side: compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click
import typer

from ..errors import UsageError, VerifyError, counted
from .options import cache_option, json_option, overwrite_option, tokenizer_option
from .pages import check_page, report_option, write_page
from .parsing import COMPARISON, PATH, PROMPT, RESULT, RUN_MODEL, argument, command, option
from .prompts import (
    NotNegative,
    PromptOptions,
    chat_option,
    layers_option,
    prompt_of,
    rounding_option,
    seed_option,
    text_option,
    tokens_option,
)
from .saying import report_before_verdict
from .tables import Block, Table, print_result

if TYPE_CHECKING:
    from ..reference import Model
    from ..reference.compare import Comparison, Difference
    from ..reference.goldens import Goldens
    from ..reference.weights.protocol import Array

    # The activations of a run by name, in the order of computation.
    Activations: TypeAlias = Iterator[tuple[str, Array]]

DEFAULT_TOLERANCE = 1e-5


@command(
    "compare",
    panel=RUN_MODEL,
    example="dsv4convert compare DeepSeek-V4-Flash DeepSeek-V4-Flash.gguf --random 32 --layers 0-3",
)
@argument("a", type=PATH, description="Model in any layout, or folder of goldens; the reference.")
@argument("b", type=PATH, description="Model in any layout, or folder of goldens.")
@tokens_option
@text_option
@chat_option
@option("--random", type=click.IntRange(1), metavar="N", panel=PROMPT, help="Number of random tokens; see --seed.")
@seed_option
@tokenizer_option
@layers_option
@rounding_option
@cache_option
@option(
    "--tolerance",
    type=NotNegative(),
    metavar="ERROR",
    default=DEFAULT_TOLERANCE,
    panel=COMPARISON,
    help="Maximum relative RMSE of any sub-block.",
)
@option(
    "--median",
    is_flag=True,
    panel=COMPARISON,
    help="Apply the tolerance to the median position instead of all positions.",
)
@option("--plot", type=PATH, metavar="FILE", panel=RESULT, help=".png file for a plot of the error by layer.")
@report_option
@overwrite_option
@json_option
def compare(
    a: Path,
    b: Path,
    layers: str | None,
    activation_rounding: bool,
    tolerance: float,
    median: bool,
    plot: Path | None,
    report: Path | None,
    cache: bool,
    overwrite: bool,
    as_json: bool,
    **prompt: Any,
) -> None:
    """Compare two models, or a model and goldens, sub-block by sub-block on the same tokens."""
    from ..containers.sources import local_path, shown
    from ..reference.compare import compare as compare_runs

    asked = PromptOptions(**prompt)
    inputs = [path for path in (a, b, asked.tokenizer, asked.chat) if path is not None]
    replaced_page = check_page(report, overwrite=overwrite, inputs=inputs)
    replaced = None
    if plot is not None:
        from ..reference.plot import check_picture, plot_errors

        replaced = check_picture(plot, inputs, overwrite=overwrite)
    a, b = (local_path(path, cache=cache) for path in (a, b))
    comparison = compare_runs(*_runs(a, b, asked, layers, activation_rounding))
    beyond = comparison.first_beyond(tolerance, median)
    document = {
        "a": shown(a),
        "b": shown(b),
        "tolerance": tolerance,
        "by": "median position" if median else "all positions",
        "within": beyond is None,
        "first_beyond": None if beyond is None else beyond.name,
        "worst": comparison.worst(median).name,
        **comparison.as_json(),
    }
    with report_before_verdict(beyond is None):
        try:
            print_result(document, _describe(comparison), as_json=as_json)
        finally:
            if plot is not None:
                plot_errors(comparison, tolerance, plot, replaced)
            write_page(report, "compare", f"{shown(a)} and {shown(b)}", document, replaced_page)
    _verdict(comparison, beyond, tolerance, median, quiet=as_json)


def _runs(
    a: Path, b: Path, asked: PromptOptions, layers: str | None, activation_rounding: bool
) -> tuple[Activations, Activations]:
    """Return the activations of both sides, on the same tokens.

    Raises:
        UsageError: no tokens, or options or sides that do not go together.
    """
    from ..api import load_model
    from ..reference.goldens import is_goldens, open_goldens

    goldens = {path: open_goldens(path) for path in (a, b) if is_goldens(path)}
    if goldens:
        prompt_options = (asked.tokens, asked.text, asked.chat, asked.random)
        if any(value is not None for value in (*prompt_options, layers)) or activation_rounding:
            raise UsageError(
                "goldens contain their own tokens, layers and rounding",
                hint="omit --tokens, --text, --chat, --random, --layers and --activation-rounding",
            )
        _check_same_run(goldens)
        return _as_recorded(a, goldens), _as_recorded(b, goldens)
    models = [load_model(path, layers=layers, activation_rounding=activation_rounding) for path in (a, b)]
    _check_same_shapes(*models)
    prompt = _comparison_prompt(models[0], a, asked)
    return models[0].activations(prompt), models[1].activations(prompt)


def _as_recorded(path: Path, goldens: Mapping[Path, Goldens]) -> Activations:
    """Return the activations of goldens, or of a model that is run as the goldens of the other side were recorded."""
    from ..api import load_model
    from ..reference.goldens import recorded_activations

    if path in goldens:
        return goldens[path].activations()
    (golden,) = goldens.values()
    model = load_model(
        path,
        layers=f"0-{golden.layers - 1}",
        activation_rounding=golden.activation_rounding,
        cached=golden.recorded_from > 0,
    )
    return recorded_activations(model, golden.tokens, golden.recorded_from)


def _comparison_prompt(model: Model, path: Path, asked: PromptOptions) -> list[int]:
    from ..containers.sources import local_path
    from ..reference.prompt import find_tokenizer

    vocab_size = model.config.vocab_size
    needs_text = asked.text is not None or asked.chat is not None
    folder = None if asked.tokenizer is None else local_path(asked.tokenizer, headers_only=True)
    tokenizer = find_tokenizer(path, vocab_size, folder) if needs_text else None
    prompt = prompt_of(asked, tokenizer, model.config.version)
    if asked.random is None:
        if prompt is None:
            raise UsageError("prompt is missing", hint="pass --tokens, --text, --chat or --random")
        return prompt
    if prompt is not None:
        raise UsageError("--random cannot be combined with another prompt", hint="pass only one of them")
    most = model.config.max_position_embeddings
    if asked.random > most:
        raise UsageError("--random: the prompt is too long", expected=f"at most {most} tokens", got=asked.random)
    import numpy as np

    return [int(token) for token in np.random.default_rng(asked.seed).integers(0, vocab_size, asked.random)]


def _check_same_run(goldens: Mapping[Path, Goldens]) -> None:
    """Check that goldens on both sides are recordings of one run.

    Raises:
        UsageError: they are not.
    """
    from ..containers.sources import shown

    recorded = list(goldens.items())
    (a, first), (b, second) = recorded[0], recorded[-1]
    for what in ("tokens", "recorded_from", "layers", "activation_rounding"):
        of_a, of_b = getattr(first, what), getattr(second, what)
        if of_a != of_b:
            raise UsageError(f"{shown(a)} and {shown(b)} recorded different runs: {what}", expected=of_a, got=of_b)


def _check_same_shapes(a: Model, b: Model) -> None:
    """Refuse two models that cannot be compared, by the config key in which they differ."""
    keys = (
        "vocab_size", "hidden_size", "hc_mult", "num_attention_heads", "head_dim", "n_routed_experts",
        "num_experts_per_tok", "index_n_heads", "index_head_dim",
    )  # fmt: skip
    pairs = [(key, getattr(a.config, key), getattr(b.config, key)) for key in keys]
    ratios = [model.config.compress_ratios[: model.n_layers] for model in (a, b)]
    pairs += [("num_hidden_layers", a.n_layers, b.n_layers), ("compress_ratios", ratios[0], ratios[1])]
    for key, of_a, of_b in pairs:
        if of_a != of_b:
            hint = "--layers 0-N runs the first layers of both" if key == "num_hidden_layers" else None
            raise UsageError(f"the models differ in {key}", expected=of_a, got=of_b, hint=hint)


def _describe(comparison: Comparison) -> Iterator[Block]:
    """Yield a comparison as a table and a line."""
    yield Table(
        ("sub-block", "RMSE", "relative", "median", "1 - cosine", "largest"),
        [_row(difference) for difference in comparison.differences if difference.agreement is None],
        frozenset(range(1, 6)),
    )
    yield Table(
        ("choices", "agreement"),
        [(d.name, f"{d.agreement:.4%}") for d in comparison.differences if d.agreement is not None],
        frozenset({1}),
    )
    logits = comparison.logits
    yield (
        f"next token of {counted(logits.positions, 'position')}: argmax agrees in {logits.argmax_agreement:.2%}; "
        f"KL(A||B) mean {logits.kl_mean:.3g}, largest {logits.kl_max:.3g} nats; "
        f"cosine median {logits.cosine_median:.7f}, smallest {logits.cosine_min:.7f}"
    )


def _row(d: Difference) -> tuple[str, ...]:
    numbers = d.rmse, d.relative_rmse, d.median_relative_rmse, 1 - (d.cosine or 0), d.largest
    return d.name, *(f"{number:.2e}" for number in numbers)


def _verdict(comparison: Comparison, beyond: Difference | None, tolerance: float, median: bool, *, quiet: bool) -> None:
    worst = comparison.worst(median)
    if beyond is not None:
        raise VerifyError(
            f"the runs differ, first in {beyond.name}, most in {worst.name} ({worst.error(median):.3g})",
            expected=f"a relative RMSE of at most {tolerance:g}",
            got=f"{beyond.error(median):.3g}",
        )
    if not quiet:
        typer.echo(
            f"the same within {tolerance:g}: the largest relative RMSE is {worst.error(median):.3g} ({worst.name})"
        )
