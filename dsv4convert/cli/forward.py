"""Commands that run the model in numpy: forward and compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import typer

from ..errors import UsageError, VerifyError, counted, escape_control
from .options import LAYERS_METAVAR, cache_option, json_option, overwrite_option, tokenizer_option
from .pages import check_page, report_option, write_page
from .parsing import COMPARISON, FOLDER, PATH, PROMPT, RUN, RUN_MODEL, argument, command, option
from .saying import print_json, report_before_verdict, say
from .tables import Block, Table, print_result

if TYPE_CHECKING:
    from ..checkpoint.tokenizer import Tokenizer
    from ..engine.names import Identity
    from ..model.config import Version
    from ..reference import Model
    from ..reference.compare import Comparison, Difference
    from ..reference.goldens import Goldens
    from ..reference.weights.protocol import Array

DEFAULT_TOLERANCE = 1e-5
RESULT = "Result"


class _NotNegative(click.FloatRange):
    """A number from 0 on; NaN, which no comparison refuses, is none."""

    def __init__(self) -> None:
        super().__init__(min=0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


tokens_option = option("--tokens", metavar="IDS", panel=PROMPT, help="Token ids, e.g. 0,17,5.")
text_option = option("--text", metavar="TEXT", panel=PROMPT, help="Text, encoded by the tokenizer.")
chat_option = option(
    "--chat", type=PATH, metavar="FILE", panel=PROMPT, help="JSON file of messages, rendered by the chat template."
)
image_option = option(
    "--image",
    "images",
    type=PATH,
    metavar="FILE",
    multiple=True,
    panel=PROMPT,
    help="Image for the next image token of the prompt; may be repeated.",
)
seed_option = option("--seed", type=click.IntRange(0), metavar="N", default=0, panel=PROMPT, help="Random seed.")
layers_option = option(
    "--layers",
    metavar=LAYERS_METAVAR,
    panel=RUN,
    help="Range of layers to run before the head, from layer 0, e.g. 0-3; by default all.",
)
rounding_option = option(
    "--activation-rounding",
    is_flag=True,
    panel=RUN,
    help="Round activations as the published FP8 and FP4 kernels do.",
)


@command(
    "forward", panel=RUN_MODEL, example='dsv4convert forward DeepSeek-V4-Flash.gguf --text "The capital of France is"'
)
@argument("path", type=PATH, metavar="MODEL", description="Checkpoint folder, .gguf file or folder of shards.")
@tokens_option
@text_option
@chat_option
@tokenizer_option
@image_option
@option(
    "--generate",
    type=click.IntRange(0),
    metavar="N",
    default=0,
    panel=PROMPT,
    help="Number of tokens to continue the prompt by.",
)
@option(
    "--temperature",
    type=_NotNegative(),
    metavar="T",
    default=0.0,
    panel=PROMPT,
    help="Sampling temperature; 0 takes the likeliest token.",
)
@seed_option
@option(
    "--speculate",
    is_flag=True,
    panel=PROMPT,
    help="Generate with V4.1's DSpark draft: the same tokens in fewer runs of the trunk.",
)
@layers_option
@rounding_option
@cache_option
@option(
    "--top",
    type=click.IntRange(1, 100),
    metavar="N",
    default=5,
    panel=RESULT,
    help="Number of next-token candidates to print per position.",
)
@option("--logits", type=PATH, metavar="FILE", panel=RESULT, help=".npy file for the logits of every position.")
@option(
    "--goldens",
    type=FOLDER,
    metavar="FOLDER",
    panel=RESULT,
    help="Folder for every activation, one .npy file each.",
)
@option(
    "--record-last",
    type=click.IntRange(1),
    metavar="N",
    panel=RESULT,
    help="Number of last positions whose activations --goldens writes; by default all.",
)
@overwrite_option
@json_option
def forward(
    path: Path,
    tokens: str | None,
    text: str | None,
    chat: Path | None,
    tokenizer: Path | None,
    images: tuple[Path, ...],
    generate: int,
    temperature: float,
    seed: int,
    speculate: bool,
    layers: str | None,
    activation_rounding: bool,
    top: int,
    logits: Path | None,
    goldens: Path | None,
    record_last: int | None,
    cache: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Run a model in numpy, float32, and print the likeliest next tokens of every position."""
    from ..api import load_model
    from ..containers.sources import local_path
    from ..reference import Speculation, generate_speculatively
    from ..reference import generate as generate_tokens
    from ..reference.goldens import write_goldens
    from ..reference.prompt import find_tokenizer
    from ..reference.vision import IMAGE, embed_image, with_images

    if record_last is not None and goldens is None:
        raise UsageError("--record-last needs --goldens")
    if images and goldens is not None:
        raise UsageError("--image and --goldens cannot be combined", hint="goldens record runs of token ids alone")
    for name, value in (("--speculate", speculate), ("--temperature", temperature)):
        if value and not generate:
            raise UsageError(f"{name} needs --generate")
    replaced = None
    if logits is not None:
        from ..engine.conversion import check_result

        replaced = check_result(logits, filter(None, (path, tokenizer, chat, *images)), overwrite=overwrite)
    # One pass reads each weight once. More are made for tokens, images, and positions that are not recorded.
    is_read_again = generate > 0 or len(images) > 1 or (goldens, record_last, logits).count(None) < 2
    place = local_path(path, cache=cache)
    model = load_model(place, layers=layers, activation_rounding=activation_rounding, cached=is_read_again)
    if tokenizer is not None:
        tokenizer = local_path(tokenizer, headers_only=True)
    vocabulary = find_tokenizer(place, model.config.vocab_size, tokenizer)
    prompt = _prompt(PromptOptions(tokens, text, chat, tokenizer), vocabulary, model.config.version)
    if prompt is None:
        raise UsageError("prompt is missing", hint="pass --tokens, --text or --chat")
    if IMAGE in prompt and not images:
        raise UsageError("an image among the --tokens has no file", hint="pass --image FILE once for each")
    embedded = [embed_image(model.parameters, image) for image in images]
    if embedded:
        prompt, embedded = with_images(prompt, embedded, model.parameters)
    room = model.config.max_position_embeddings - len(prompt) + 1
    if generate > room:
        raise UsageError("--generate: the context gets too long", expected=f"at most {room} tokens", got=generate)
    if goldens is not None:
        recorded_from = 0 if record_last is None else max(0, len(prompt) - record_last)
        count = write_goldens(goldens, model, prompt, recorded_from, overwrite=overwrite)
        say(f"wrote {count} activations to {escape_control(str(goldens))}")
        if logits is None and not generate:
            return
    state = model.new_state()
    of_prompt = model.forward(prompt, state, images=embedded)
    if logits is not None:
        _save(logits, of_prompt, replaced)
    speculation = Speculation()
    run: Callable[..., Iterator[int]] = generate_tokens
    if speculate:
        run = partial(generate_speculatively, speculation=speculation)
    continuation = list(run(model, of_prompt[-1], state, generate, temperature=temperature, seed=seed))
    positions = _likeliest(prompt, of_prompt, top, vocabulary)
    if as_json:
        document: dict[str, Any] = {"tokens": prompt, "positions": positions}
        if generate:
            document["generated"] = {"tokens": continuation, "text": _text_of(continuation, vocabulary)}
            if speculate:
                document["speculation"] = asdict(speculation)
        print_json(document)
        return
    for position in positions:
        typer.echo(_position_line(position))
    if generate:
        typer.echo("generated: " + ",".join(map(str, continuation)))
        if vocabulary is not None:
            typer.echo(escape_control(_text_of(continuation, vocabulary) or ""))
    if speculate:
        say(
            f"drafts: {speculation.accepted} of {speculation.drafted} guesses accepted"
            f" in {counted(speculation.steps, 'run')} of the trunk"
        )


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
    type=_NotNegative(),
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


# ---- prompts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptOptions:
    """What a command line says of the prompt: the values of the options of these names."""

    tokens: str | None
    text: str | None
    chat: Path | None
    tokenizer: Path | None
    random: int | None = None
    seed: int = 0


def _prompt(asked: PromptOptions, tokenizer: Tokenizer | None, version: Version) -> list[int] | None:
    """Return the token ids that --tokens, --text or --chat asks for; None without any of them."""
    from ..reference.prompt import encode_chat, encode_text, parse_tokens

    options = (("--tokens", asked.tokens), ("--text", asked.text), ("--chat", asked.chat))
    given = [name for name, value in options if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} cannot be combined", hint="pass only one of them")
    if asked.tokens is not None:
        return parse_tokens(asked.tokens)
    if asked.text is not None:
        return encode_text(asked.text, tokenizer)
    return encode_chat(asked.chat, tokenizer, version) if asked.chat is not None else None


def _save(path: Path, logits: Array, replaced: Identity | None) -> None:
    import io

    import numpy as np

    from ..engine.outputs import write_file

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(logits))
    write_file(path, (header.getvalue(), np.ascontiguousarray(logits).data.cast("B")), replaced)


# ---- what forward prints ------------------------------------------------------------------------------


def _likeliest(tokens: Sequence[int], logits: Array, top: int, tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    """Return, per position, its token and the ``top`` likeliest next ones with their probabilities."""
    import numpy as np

    log_p = logits.astype(np.float64)
    log_p -= log_p.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    best = np.argsort(-log_p, axis=1, kind="stable")[:, :top]

    def entry(token: int) -> dict[str, Any]:
        text = _text_of([token], tokenizer)
        return {"token": token} if text is None else {"token": token, "text": text}

    return [
        {
            "position": position,
            **entry(int(tokens[position])),
            "next": [{**entry(int(i)), "probability": float(np.exp(log_p[position, i]))} for i in row],
        }
        for position, row in enumerate(best)
    ]


def _position_line(position: dict[str, Any]) -> str:
    candidates = "  ".join(f"{_shown(c)} {c['probability']:.1%}" for c in position["next"])
    return f"{position['position']:>5}  {_shown(position):<24}  {candidates}"


def _shown(entry: dict[str, Any]) -> str:
    return f"{entry['token']} {entry['text']!r}" if "text" in entry else str(entry["token"])


def _text_of(ids: Sequence[int], tokenizer: Tokenizer | None) -> str | None:
    """Return the text of ids; None without a vocabulary that holds them."""
    if tokenizer is None or not all(0 <= i < tokenizer.vocab_size for i in ids):
        return None
    return tokenizer.decode(ids)


# ---- what compare runs and prints ---------------------------------------------------------------------


def _runs(a: Path, b: Path, asked: PromptOptions, layers: str | None, activation_rounding: bool) -> tuple[Any, Any]:
    """Return the activations of both sides, on the same tokens."""
    from ..api import load_model
    from ..reference.goldens import is_goldens, open_goldens, recorded_activations

    recorded = [open_goldens(path) for path in (a, b) if is_goldens(path)]
    if recorded:
        prompt_options = (asked.tokens, asked.text, asked.chat, asked.random)
        if any(value is not None for value in (*prompt_options, layers)) or activation_rounding:
            raise UsageError(
                "goldens contain their own tokens, layers and rounding",
                hint="omit --tokens, --text, --chat, --random, --layers and --activation-rounding",
            )
        _check_same_run(recorded, a, b)
        golden = recorded[0]

        def run(path: Path) -> Any:
            if is_goldens(path):
                return open_goldens(path).activations()
            model = load_model(
                path,
                layers=f"0-{golden.layers - 1}",
                activation_rounding=golden.activation_rounding,
                cached=golden.recorded_from > 0,
            )
            return recorded_activations(model, golden.tokens, golden.recorded_from)

        return run(a), run(b)

    models = [load_model(path, layers=layers, activation_rounding=activation_rounding) for path in (a, b)]
    _check_same_shapes(*models)
    prompt = _comparison_prompt(models[0], a, asked)
    return models[0].activations(prompt), models[1].activations(prompt)


def _comparison_prompt(model: Model, path: Path, asked: PromptOptions) -> list[int]:
    from ..containers.sources import local_path
    from ..reference.prompt import find_tokenizer

    vocab_size = model.config.vocab_size
    needs_text = asked.text is not None or asked.chat is not None
    folder = None if asked.tokenizer is None else local_path(asked.tokenizer, headers_only=True)
    tokenizer = find_tokenizer(path, vocab_size, folder) if needs_text else None
    prompt = _prompt(asked, tokenizer, model.config.version)
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


def _check_same_run(recorded: list[Goldens], a: Path, b: Path) -> None:
    from ..containers.sources import shown

    if len(recorded) < 2:
        return
    for what in ("tokens", "recorded_from", "layers", "activation_rounding"):
        of_a, of_b = (getattr(goldens, what) for goldens in recorded)
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
