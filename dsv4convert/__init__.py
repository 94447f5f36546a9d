"""dsv4convert: DeepSeek-V4 checkpoints to GGUF, model-parallel shards, BF16, FP8, NVFP4 and MLX, exactly."""

from __future__ import annotations

# A constant that type checkers know; importing it from typing would be most of this module's time.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from .api import (
        check,
        convert_gguf,
        convert_maxtext,
        convert_mlx,
        dequantize,
        estimate,
        imatrix,
        inspect,
        list_recipes,
        load_model,
        mend,
        merge,
        open_checkpoint,
        repack,
        requantize,
        shard,
        unshard,
        verify,
        verify_manifest,
    )
    from .checkpoint.folder import Checkpoint
    from .engine.conversion import Summary
    from .engine.dry_run import DryRun
    from .engine.manifest import ManifestReport
    from .engine.upload import Upload
    from .errors import (
        ConfigError,
        DeviceError,
        Dsv4Error,
        FileFormatError,
        InputMissingError,
        InputOutputError,
        InventoryError,
        LockedError,
        LossyError,
        OutputExistsError,
        ReportError,
        ResumeError,
        RunInterruptedError,
        SpaceError,
        TokenizerError,
        UnsupportedError,
        UsageError,
        VerifyError,
    )
    from .estimation.estimate import Estimate
    from .inspection.census import CheckReport
    from .inspection.description import Description
    from .reference.importance import ImatrixSummary
    from .reference.model import Model
    from .targets.mend import MendSummary
    from .targets.recipe_sizes import RecipeSizes
    from .targets.repack import RepackSummary
    from .targets.shards import ShardSummary
    from .verification.report import Report

__all__ = [
    "CheckReport",
    "Checkpoint",
    "ConfigError",
    "Description",
    "DeviceError",
    "DryRun",
    "Dsv4Error",
    "Estimate",
    "FileFormatError",
    "ImatrixSummary",
    "InputMissingError",
    "InputOutputError",
    "InventoryError",
    "LockedError",
    "LossyError",
    "ManifestReport",
    "MendSummary",
    "Model",
    "OutputExistsError",
    "RecipeSizes",
    "RepackSummary",
    "Report",
    "ReportError",
    "ResumeError",
    "RunInterruptedError",
    "ShardSummary",
    "SpaceError",
    "Summary",
    "TokenizerError",
    "UnsupportedError",
    "Upload",
    "UsageError",
    "VerifyError",
    "__version__",
    "check",
    "convert_gguf",
    "convert_maxtext",
    "convert_mlx",
    "dequantize",
    "estimate",
    "imatrix",
    "inspect",
    "list_recipes",
    "load_model",
    "mend",
    "merge",
    "open_checkpoint",
    "repack",
    "requantize",
    "shard",
    "unshard",
    "verify",
    "verify_manifest",
]

__version__ = "0.1.0"

# The modules of the classes; errors are in .errors, functions in .api.
_CLASSES = {
    "CheckReport": ".inspection.census",
    "Checkpoint": ".checkpoint.folder",
    "Description": ".inspection.description",
    "DryRun": ".engine.dry_run",
    "Estimate": ".estimation.estimate",
    "ImatrixSummary": ".reference.importance",
    "ManifestReport": ".engine.manifest",
    "MendSummary": ".targets.mend",
    "Model": ".reference.model",
    "RecipeSizes": ".targets.recipe_sizes",
    "RepackSummary": ".targets.repack",
    "Report": ".verification.report",
    "ShardSummary": ".targets.shards",
    "Summary": ".engine.conversion",
    "Upload": ".engine.upload",
}


def __getattr__(name: str) -> object:
    """Load a public name when it is first used: importing the package itself loads nothing else."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    home = _CLASSES.get(name) or (".errors" if name.endswith("Error") else ".api")
    value: object = getattr(import_module(home, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
