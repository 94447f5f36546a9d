"""The command that runs the model: forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import typer

from ..errors import UsageError, counted, escape_control
from .options import cache_option, json_option, overwrite_option, tokenizer_option
from .parsing import FOLDER, PATH, PROMPT, RESULT, RUN_MODEL, argument, command, option
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
from .saying import print_json, say

if TYPE_CHECKING:
    from ..checkpoint.tokenizer import Tokenizer
    from ..engine.names import Identity
    from ..reference.weights.protocol import Array


@command(
    "forward", panel=RUN_MODEL, example='dsv4convert forward DeepSeek-V4-Flash.gguf --text "The capital of France is"'
)
@argument("path", type=PATH, metavar="MODEL", description="Checkpoint folder, .gguf file or folder of shards.")
@tokens_option
@text_option
@chat_option
@tokenizer_option
@option(
    "--image",
    "images",
    type=PATH,
    metavar="FILE",
    multiple=True,
    panel=PROMPT,
    help="Image for the next image token of the prompt; can be repeated.",
)
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
    type=NotNegative(),
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
    prompt = prompt_of(PromptOptions(tokens, text, chat, tokenizer), vocabulary, model.config.version)
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
    document: dict[str, Any] = {"tokens": prompt, "positions": _likeliest(prompt, of_prompt, top, vocabulary)}
    if generate:
        document["generated"] = {"tokens": continuation, "text": _text_of(continuation, vocabulary)}
    if speculate:
        document["speculation"] = asdict(speculation)
    if as_json:
        print_json(document)
    else:
        _print_result(document)


def _save(path: Path, logits: Array, replaced: Identity | None) -> None:
    import io

    import numpy as np

    from ..engine.outputs import write_file

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(logits))
    write_file(path, (header.getvalue(), np.ascontiguousarray(logits).data.cast("B")), replaced)


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


def _print_result(document: dict[str, Any]) -> None:
    """Print what ``--json`` prints, for people."""
    for position in document["positions"]:
        typer.echo(_position_line(position))
    if "generated" in document:
        generated = document["generated"]
        typer.echo("generated: " + ",".join(map(str, generated["tokens"])))
        if generated["text"] is not None:
            typer.echo(escape_control(generated["text"]))
    if "speculation" in document:
        guesses = document["speculation"]
        runs = counted(guesses["steps"], "run")
        say(f"drafts: {guesses['accepted']} of {guesses['drafted']} guesses accepted in {runs} of the trunk")


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
