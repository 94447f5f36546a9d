"""How long a phase takes on a machine: a roofline, operator by operator, and what ranks tell each other.

An operator takes as long as the longest of three things: its FLOPs and its bytes, at the shares of the maker's rates
that kernels reach, and the decoding of its weights, where a machine's file says how fast kernels decode their type; and
a kernel's own time in every run. Ranks split heads, vocabulary and experts as the published code does, and add up what
they have after every sublayer. Nothing overlaps: neither operators nor communication.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..model.cache_bytes import BF16_BYTES
from ..model.config import ModelConfig
from .hardware import Hardware
from .operators import BY_EXPERT, BY_OUTPUT_RANK, BY_RANK, WHOLE, Operator, Phase

# Products whose weights are stored in FP8 or FP4 run at the rate of FP8; a GGUF's are decoded to 16 bits first.
SCALED = ("dense", "experts")


class Machine(NamedTuple):
    """What a model runs on: ``mp`` devices, of which ``o_proj_tp`` share the output projections.

    ``is_gguf``: weights are of ggml's types.
    """

    hardware: Hardware
    mp: int
    o_proj_tp: int
    is_gguf: bool


class Message(NamedTuple):
    """What the ranks tell each other in a phase: bytes that each device sends, in so many collective operations."""

    name: str
    sent_bytes: float
    operations: int


@dataclass(frozen=True)
class Timed:
    """How long a phase takes, and why.

    ``compute``, ``memory`` and ``decoding`` are the seconds of the operators that FLOPs limit, bytes, or the decoding
    of weights; ``kernels`` those of kernels as such. ``operators`` are seconds by sublayer and operator.
    """

    phase: Phase
    compute: float
    memory: float
    decoding: float
    kernels: float
    communication: float
    messages: tuple[Message, ...]
    operators: dict[tuple[str, str], float]

    @property
    def seconds(self) -> float:
        """Return the seconds of the phase."""
        return self.compute + self.memory + self.decoding + self.kernels + self.communication

    @property
    def tokens_per_second(self) -> float:
        """Return the tokens of all sequences that are computed in a second."""
        return self.phase.tokens / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Return the time as plain JSON values."""
        return {
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "compute_seconds": self.compute,
            "memory_seconds": self.memory,
            "decoding_seconds": self.decoding,
            "kernel_seconds": self.kernels,
            "communication_seconds": self.communication,
            "messages": [message._asdict() for message in self.messages],
            "operators": [
                {"sublayer": sublayer, "name": name, "seconds": seconds}
                for (sublayer, name), seconds in self.operators.items()
            ],
        }


class Limits(NamedTuple):
    """The seconds that an operator takes at least, by what limits it: the longest counts, of two alike the first."""

    memory: float
    compute: float
    decoding: float


def timed(phase: Phase, config: ModelConfig, machine: Machine) -> Timed:
    """Return how long a phase takes."""
    hardware = machine.hardware
    kernel = phase.runs * hardware.kernel_seconds
    limits = dict.fromkeys(Limits._fields, 0.0)
    operators: dict[tuple[str, str], float] = {}
    for operator in phase.operators:
        seconds = _seconds(operator, machine)
        longest = max(seconds)
        limits[Limits._fields[seconds.index(longest)]] += longest
        key = operator.sublayer, operator.name
        operators[key] = operators.get(key, 0.0) + longest + kernel
    messages = tuple(_messages(phase, config, machine)) if machine.mp > 1 else ()
    communication = sum(
        message.sent_bytes / (hardware.link_bandwidth * hardware.bandwidth_share)
        + message.operations * hardware.link_latency
        for message in messages
    )
    kernels = len(phase.operators) * kernel
    return Timed(phase, **limits, kernels=kernels, communication=communication, messages=messages, operators=operators)


def _seconds(operator: Operator, machine: Machine) -> Limits:
    """Return the seconds of an operator's bytes, of its FLOPs and of the decoding of its weights on one device."""
    hardware = machine.hardware
    ranks = {WHOLE: 1, BY_RANK: machine.mp, BY_EXPERT: machine.mp, BY_OUTPUT_RANK: machine.o_proj_tp}[operator.divided]
    rate = hardware.fp8 if operator.arithmetic in SCALED and not machine.is_gguf else hardware.bf16
    multiplying = operator.flops / ranks / (rate * hardware.flops_share)
    moving = operator.bytes / ranks / (hardware.bandwidth * hardware.bandwidth_share)
    return Limits(moving, multiplying, _decoding_seconds(operator, hardware) / ranks)


def _decoding_seconds(operator: Operator, hardware: Hardware) -> float:
    """Return the seconds that kernels decode weights: once for every ``decoded_tile`` tokens that share them."""
    once = sum(count / hardware.decoded[kind] for kind, count in operator.weights.items() if kind in hardware.decoded)
    if not once:
        return 0.0
    tokens = operator.flops / 2 / sum(operator.weights.values())
    return once * max(1.0, tokens / hardware.decoded_tile)


def _messages(phase: Phase, config: ModelConfig, machine: Machine) -> list[Message]:
    """Return what the ranks add up or gather: a ring sends 2·(n−1)/n of a sum, and (n−1)/n of what is gathered."""
    mp, output = machine.mp, machine.o_proj_tp
    layers, runs = config.num_hidden_layers, phase.runs
    added, gathered = 2 * (mp - 1) / mp, (mp - 1) / mp
    streams = phase.tokens * config.hidden_size * BF16_BYTES
    found = [
        Message("sum of the embedding", added * streams, runs),
        Message("sums of attention", 2 * (output - 1) / output * streams * layers, layers * runs if output > 1 else 0),
        Message("sums of the experts", added * streams * layers, layers * runs),
    ]
    if output < mp:
        heads = phase.tokens * config.num_attention_heads * config.head_dim * BF16_BYTES
        found.append(Message("heads to the output ranks", (1 / output - 1 / mp) * heads * layers, layers * runs))
    scores = [operator for operator in phase.operators if operator.name == "indexer scores"]
    if scores:
        total = sum(operator.written_bytes for operator in scores)
        found.append(Message("sums of the indexer's scores", added * total, len(scores) * runs))
    logits = sum(operator.written_bytes for operator in phase.operators if operator.name == "head")
    found.append(Message("logits", gathered * logits, runs))
    return found
