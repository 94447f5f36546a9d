"""Prompts of the commands that run the model: their options, and the token ids that these ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .options import LAYERS_METAVAR
from .parsing import PATH, PROMPT, RUN, option

if TYPE_CHECKING:
    from ..checkpoint.tokenizer import Tokenizer
    from ..model.config import Version


class NotNegative(click.FloatRange):
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


@dataclass(frozen=True)
class PromptOptions:
    """What a command line says of the prompt: the values of the options of these names."""

    tokens: str | None
    text: str | None
    chat: Path | None
    tokenizer: Path | None
    random: int | None = None
    seed: int = 0


def prompt_of(asked: PromptOptions, tokenizer: Tokenizer | None, version: Version) -> list[int] | None:
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
