"""``hf-to-gguf``: a checkpoint folder and options become the plan of every GGUF file."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from importlib import resources
from pathlib import Path

from ..checkpoint.engram import read_engram_constants
from ..checkpoint.folder import BY_INDEX, Checkpoint
from ..checkpoint.image_processor import read_image_normalisation
from ..checkpoint.meaning import open_checked
from ..checkpoint.model_card import read_model_card
from ..checkpoint.tokenizer import PATTERNS_BY_PRE, Tokenizer, load_tokenizer
from ..checkpoint.weights import Encoding
from ..containers.gguf_write import KeyValue
from ..containers.presence import is_folder
from ..errors import UsageError, counted
from ..model.config import CHAT_TEMPLATES, Version
from ..model.engram import EngramConstants
from ..model.gguf_keys import DRAFT
from ..model.tensors import Draft
from ..plan import OutputFile, Plan
from .ds4 import vision_keys
from .ds4_v41 import ds4_keys
from .engram_tables import encoding_name
from .gguf_metadata import (
    ParameterCounts,
    default_output_name,
    dspark_keys,
    file_type,
    mmproj_metadata,
    model_keys,
    noise_token,
    text_metadata,
)
from .gguf_tensors import (
    DS4,
    FILE_PREFIX,
    GgufModel,
    GgufOptions,
    Kind,
    engram_type,
    gguf_files,
    gguf_models,
    tensor_dialect,
)
from .low_bit import LowBitMaker
from .segments import MXFP4


def plan_gguf(
    source: Path,
    out: Path | None,
    options: GgufOptions,
    *,
    tokenizer_pre: str | None = None,
    name: str | None = None,
    strict: bool = False,
    index: str = BY_INDEX,
    low_bit: LowBitMaker | None = None,
) -> Plan:
    """Plan ``hf-to-gguf``: every output file of the GGUF of ``source``.

    ``out`` is a file name, a folder to put conventionally named files in, or None for the current folder. ``low_bit``
    makes the low-bit tensors, None as the options say.

    Raises:
        Dsv4Error: whatever is wrong with the source, the options or the names.
    """
    checkpoint = open_for_gguf(source, options, strict=strict, index=index)
    return plan_checkpoint(checkpoint, out, options, tokenizer_pre=tokenizer_pre, name=name, low_bit=low_bit)


def open_for_gguf(source: Path, options: GgufOptions, *, strict: bool = False, index: str = BY_INDEX) -> Checkpoint:
    """Open ``source`` as ``options`` need it: without its draft where no file takes that.

    Raises:
        Dsv4Error: whatever is wrong with the source.
    """
    draft_wanted = options.draft not in (None, "drop") or (options.draft is None and options.dialect == "deepseek-v4")
    return open_checked(source, draft_wanted=draft_wanted, strict=strict, index=index)


def plan_checkpoint(
    checkpoint: Checkpoint,
    out: Path | None,
    options: GgufOptions,
    *,
    tokenizer_pre: str | None = None,
    name: str | None = None,
    low_bit: LowBitMaker | None = None,
) -> Plan:
    """Plan every GGUF file of an open checkpoint; see ``plan_gguf``.

    ``low_bit`` makes the low-bit tensors, None as the options say.

    Raises:
        Dsv4Error: whatever is wrong with the checkpoint, the options or the names.
    """
    made = gguf_models(checkpoint, options, low_bit)
    models, maker = made.models, made.low_bit
    imatrix_keys = maker.imatrix.key_values() if maker.imatrix is not None else []
    describe = _Describer(checkpoint, options, tokenizer_pre, name)
    files: list[OutputFile] = []
    folder = _output_folder(out)
    for model in models:
        counts = model.parameters()
        default = default_output_name(
            model.config, describe.card, counts, experts=model.main_type, prefix=FILE_PREFIX[model.kind], name=name
        )
        stem = _stem(out, default, model, len(models))
        files += gguf_files(
            model.tensors,
            [*describe.metadata(model, counts), *imatrix_keys],
            stem,
            options.split_max_bytes,
            options.split_max_tensors,
            alignment=model.alignment,
            no_tensor_first=options.no_tensor_first_split,
        )
    return Plan(
        target="gguf",
        source=checkpoint.folder,
        destination=folder,
        is_folder=False,
        files=tuple(files),
        dropped=made.dropped,
        options={
            **asdict(options),
            "tokenizer_pre": tokenizer_pre,
            "name": name,
            **({"ggml": maker.quantiser.version} if maker.is_used else {}),
        },
        source_bytes=checkpoint.nbytes,
        notes=(
            *checkpoint.notes,
            *_draft_note(checkpoint),
            *_rounding_note(checkpoint, options),
            *made.notes,
            *describe.notes,
        ),
    )


class _Describer:
    """Makes the key-values of every kind of file from what lies in the source folder next to its weights."""

    def __init__(
        self, checkpoint: Checkpoint, options: GgufOptions, tokenizer_pre: str | None, name: str | None
    ) -> None:
        self._source = checkpoint.folder
        self._config = checkpoint.config
        self.card = read_model_card(self._source)
        self._notes = [*self.card.notes]
        self._tokenizer_pre = tokenizer_pre
        self._name = name
        self._options = options
        self._dialect = tensor_dialect(checkpoint.config, options.dialect)

    def metadata(self, model: GgufModel, counts: ParameterCounts) -> list[KeyValue]:
        kind = file_type(model.main_type)
        if model.kind is Kind.MMPROJ:
            normalisation, notes = read_image_normalisation(self._source)
            self._notes += notes
            return mmproj_metadata(
                model.config, self.card, counts=counts, file_type=kind, name=self._name, **normalisation
            )
        is_dspark = model.kind is Kind.DSPARK
        keys = text_metadata(
            DRAFT if is_dspark else self._dialect.architecture,
            model.config,
            dspark_keys(model.config) if is_dspark else self._config_keys(model),
            self._tokenizer,
            self.card,
            counts=counts,
            file_type=kind,
            chat_template=self._template,
            name=self._name,
            mask_token=noise_token(model.config) if is_dspark else None,
        )
        if self._options.dialect == DS4 and self._config.version is Version.V4 and self._config.has_vision:
            keys += vision_keys(self._dialect.architecture)
        return keys

    def _config_keys(self, model: GgufModel) -> list[KeyValue]:
        if self._options.dialect == DS4 and self._config.version is Version.V41:
            calibration = "none" if self._options.imatrix is None else Path(self._options.imatrix).name
            calibration = self._options.importance or calibration
            return ds4_keys(model.config, self._engram, self._engram_encoding, model.main_type, calibration)
        return model_keys(
            model.config,
            self._dialect.architecture,
            model.block_count,
            mtp=model.kind is Kind.MTP,
            engram=self._engram,
            engram_encoding=self._engram_encoding,
        )

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        pre = self._tokenizer_pre
        found = load_tokenizer(self._source, self._config.vocab_size, pre)
        self._notes += found.notes
        if pre is not None and pre not in PATTERNS_BY_PRE:
            note = f"--tokenizer-pre {pre} is not checked: llama.cpp loads no file with a name that it does not know"
            self._notes.append(note)
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what of the files next to the weights could not be used, as far as they have been read."""
        return tuple(dict.fromkeys(self._notes))

    @cached_property
    def _template(self) -> str:
        name = CHAT_TEMPLATES[self._config.version]
        return resources.files("dsv4convert.model").joinpath(name).read_text(encoding="utf-8")

    @cached_property
    def _engram(self) -> EngramConstants | None:
        """Return what finds the rows of the n-gram tables of the layers that are written."""
        if self._config.engram is None:
            return None
        constants = read_engram_constants(self._source, self._config)
        return constants if self._options.layers is None else constants.sliced(*self._options.layers)

    @property
    def _engram_encoding(self) -> str | None:
        engram = self._config.engram
        return None if engram is None else encoding_name(engram_type(self._options, self._dialect), engram.head_dim)


def _output_folder(out: Path | None) -> Path:
    if out is None:
        return Path()
    return out if is_folder(out) else out.parent


def _stem(out: Path | None, default: str, model: GgufModel, n_models: int) -> str:
    """Return the file name without ``.gguf``: the one asked for, or the conventional one."""
    if out is None or is_folder(out):
        return default.removesuffix(".gguf")
    if out.suffix != ".gguf":
        raise UsageError("the output must end in .gguf or be an existing folder", where=out)
    return (FILE_PREFIX[model.kind] if n_models > 1 else "") + out.stem


def _draft_note(checkpoint: Checkpoint) -> tuple[str, ...]:
    if checkpoint.draft is Draft.DSPARK and checkpoint.config.num_nextn_predict_layers != checkpoint.n_draft:
        return (
            f"the draft is DSpark with {counted(checkpoint.n_draft, 'stage')}, whatever num_nextn_predict_layers says",
        )
    return ()


def _rounding_note(checkpoint: Checkpoint, options: GgufOptions) -> tuple[str, ...]:
    """Return what MXFP4 means for experts that are not FP4; from an FP4 origin nothing is lost, as counts show."""
    held = {weight.encoding for weight in checkpoint.weights.values() if weight.expert is not None}
    if options.experts != MXFP4.name or held <= {Encoding.FP4}:
        return ()
    others = ", ".join(sorted(encoding.value for encoding in held - {Encoding.FP4}))
    return (f"--experts {MXFP4.name} rounds {others} experts: every element that changes is counted",)
