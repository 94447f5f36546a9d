"""Every command that writes weights, over every kind of source, as command lines; and the digests of the files written.

``fixtures/output_digests.json`` holds the digests that the outputs must keep. A case that is new, or bytes that change
on purpose, are recorded with ``python -m tests.output_digests``, which writes that file anew.

Left out: manifests, which name the program's version, and what ``forward`` writes, whose last bits belong to the
processor. Folders that transformers saved again have no digests: their conversions equal the original's, and the tests
of re-saved folders hold them to it.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import string
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from .command_line import run_cli
from .oracles.safetensors_bytes import RawSafetensors

RECORD = Path(__file__).resolve().parents[1] / "fixtures" / "output_digests.json"

MANIFEST_SUFFIX = ".manifest.json"

SMALL = "--routed-experts 4 --vocab 400"
LAYER = "--ratios 4 --draft drop --routed-experts 2 --vocab 512"
# The published configs, with their own keys, at the size of tiny.
CUT = (
    "--ratios 0,4,128 --routed-experts 4 --vocab 400 --set hidden_size=160 --set moe_intermediate_size=96 "
    "--set num_attention_heads=4 --set head_dim=64 --set qk_rope_head_dim=32 --set q_lora_rank=64 "
    "--set o_groups=4 --set o_lora_rank=64 --set index_n_heads=4 --set index_head_dim=64"
)

# Case -> command line. {out} is the case's output: a folder named like the case (of a GGUF or a split: the folder to
# which its files or folders go).
# {other case} is the output of that case, made first. Option names may change; a case keeps its name.
SOURCES = {
    "synth/tiny": f"synth {{out}} --draft keep {SMALL}",
    "synth/base": f"synth {{out}} --variant base {SMALL}",
    "synth/base-any-scales": f"synth {{out}} --variant base --any-scales {SMALL}",
    "synth/dspark": f"synth {{out}} --variant dspark {SMALL}",
    "synth/vision": f"synth {{out}} --variant vision {SMALL}",
    "synth/without-draft": f"synth {{out}} --draft drop {SMALL}",
    "synth/eight": "synth {out} --preset tiny --set o_groups=8 --set index_head_dim=128",
    "synth/one-file": f"synth {{out}} --files 1 --seed 5 {SMALL}",
    "synth/three-files": f"synth {{out}} --files 3 --layers 0-1 {SMALL}",
    "synth/nano": f"synth {{out}} --preset nano {LAYER}",
    "synth/nano-base": f"synth {{out}} --preset nano --variant base --any-scales {LAYER}",
    "synth/flash": f"synth {{out}} --preset flash {CUT}",
    "synth/pro": f"synth {{out}} --preset pro {CUT}",
    "synth/flash-dspark": f"synth {{out}} --preset flash --variant dspark {CUT}",
    "synth/flash-base": f"synth {{out}} --preset flash --variant base {CUT}",
    "synth/v41-tiny": "synth {out} --preset v41-tiny --engram-rows 700",
    "synth/v41-flash": (
        f"synth {{out}} --preset v41-flash {CUT} --ratios 0,2,1 --vocab 512 --engram-rows 900 --set vision_n_layers=1 "
        "--set vision_dim=64 --set vision_n_heads=2 --set vision_inter_dim=96 --set engram_n_heads=2 "
        "--set engram_head_dim=32 --set dspark_n_routed_experts=4"
    ),
    "synth/headers-only": f"synth {{out}} --headers-only {SMALL}",
}

FOLDERS = {
    "bf16/tiny": "dequantize {synth/tiny} {out}",
    "f16/tiny": "dequantize {synth/tiny} {out} --dtype f16",
    "f32/tiny": "dequantize {synth/tiny} {out} --dtype f32",
    "bf16-official/tiny": "dequantize {synth/tiny} {out} --dtype bf16 --names official --draft keep",
    "bf16-stacked/tiny": "dequantize {synth/tiny} {out} --names transformers",
    "f16-stacked/tiny": "dequantize {synth/tiny} {out} --names transformers --dtype f16",
    "f32-stacked/tiny": "dequantize {synth/tiny} {out} --names transformers --dtype f32",
    "bf16-files/tiny": "dequantize {synth/tiny} {out} --max-file-size 700K",
    "bf16-stacked-files/tiny": "dequantize {synth/tiny} {out} --names transformers --max-file-size 700K",
    "bf16-without-draft/tiny": "dequantize {synth/tiny} {out} --draft drop",
    "bf16-stacked-without-draft/dspark": "dequantize {synth/dspark} {out} --names transformers --draft drop",
    "bf16-draft-alone/tiny": "dequantize {synth/tiny} {out} --draft only",
    "bf16-split/dspark": "dequantize {synth/dspark} {out}/model --draft split",
    "bf16-strict/tiny": "dequantize {synth/tiny} {out} --strict",
    "bf16/furnished": "dequantize {furnished} {out}",
    **{
        f"{dtype}/{source}": f"dequantize {{synth/{source}}} {{out}} --dtype {dtype}"
        for source in ("base", "base-any-scales", "dspark", "vision")
        for dtype in ("bf16", "f16", "f32")
    },
    **{
        f"bf16-stacked/{source}": f"dequantize {{synth/{source}}} {{out}} --names transformers"
        for source in ("base-any-scales", "dspark", "vision", "without-draft")
    },
    **{f"{dtype}/nano-base": f"dequantize {{synth/nano-base}} {{out}} --dtype {dtype}" for dtype in ("bf16", "f16")},
    **{f"bf16/{source}": f"dequantize {{synth/{source}}} {{out}}" for source in ("nano", "flash", "pro", "one-file")},
    "bf16/model-prefix": "dequantize {model-prefix} {out}",
    "bf16/v3-names": "dequantize {v3-names} {out}",
    "bf16/fp8": "dequantize {fp8/tiny} {out}",
    "f32/bf16": "dequantize {bf16/tiny} {out} --dtype f32",
    "bf16/stacked": "dequantize {bf16-stacked/tiny} {out}",
    **{
        f"{dtype}/v41-tiny": f"dequantize {{synth/v41-tiny}} {{out}} --dtype {dtype}"
        for dtype in ("bf16", "f16", "f32")
    },
    "fp8/v41-tiny": "repack {synth/v41-tiny} {out} --experts fp8",
    "fp8/tiny": "repack {synth/tiny} {out} --experts fp8",
    "fp8-lossless/tiny": "repack {synth/tiny} {out} --experts fp8 --strict --draft keep",
    "fp8-without-draft/dspark": "repack {synth/dspark} {out} --experts fp8 --draft drop",
    "fp8-draft-alone/dspark": "repack {synth/dspark} {out} --experts fp8 --draft only",
    "fp8-split/v41-tiny": "repack {synth/v41-tiny} {out}/model --experts fp8 --draft split",
    "fp8-files/tiny": "repack {synth/tiny} {out} --experts fp8 --max-file-size 700K",
    "fp8/furnished": "repack {furnished} {out} --experts fp8",
    **{
        f"fp8/{source}": f"repack {{synth/{source}}} {{out}} --experts fp8"
        for source in ("dspark", "vision", "nano", "flash", "pro", "one-file", "without-draft")
    },
    "fp8/model-prefix": "repack {model-prefix} {out} --experts fp8",
    "fp8/v3-names": "repack {v3-names} {out} --experts fp8",
    "mended/reindexed": "mend {synth/three-files} {out} --reindex",
    "mended/without-draft": "mend {synth/tiny} {out} --drop-draft",
    "mended/other-draft": "mend {synth/dspark} {out} --drop-draft --graft-draft {synth/tiny}",
    "mended/pruned": "mend {bf16-without-draft/tiny} {out} --prune-config",
    "mended/stacked": "mend {bf16/tiny} {out} --rename transformers --strict",
    "mended/stacked-fp4": "mend {synth/tiny} {out} --rename transformers",
    "mended/unstacked": "mend {mended/stacked-fp4} {out} --rename official",
    "nvfp4/tiny": "repack {synth/tiny} {out} --experts nvfp4",
    "nvfp4-draft/dspark": "repack {synth/dspark} {out} --experts nvfp4 --draft-experts --input-scale 8.4375,150.0",
    "nvfp4-files/tiny": "repack {synth/tiny} {out} --experts nvfp4 --max-file-size 700K --input-scale {nvfp4/tiny}",
    "nvfp4-split/v41-tiny": "repack {synth/v41-tiny} {out}/model --experts nvfp4 --draft split",
    "bf16/nvfp4": "dequantize {nvfp4/tiny} {out}",
    "official/nvfp4": "requantize {nvfp4/tiny} {out}",
    "nvfp4/v3-names": "repack {v3-names} {out} --experts nvfp4 --draft drop",
    **{f"official/{dtype}": f"requantize {{{dtype}/tiny}} {{out}}" for dtype in ("bf16", "f16", "f32")},
    "official/stacked": "requantize {bf16-stacked/tiny} {out} --max-file-size 700K",
    "official/base": "requantize {f32/base-any-scales} {out} --draft keep",
    "official/v41-tiny": "requantize {f32/v41-tiny} {out}",
    "official/without-draft": "requantize {bf16/dspark} {out} --draft drop",
    "official/draft-alone": "requantize {bf16/dspark} {out} --draft only",
    "official/split": "requantize {bf16/v41-tiny} {out}/model --draft split",
    "mlx/tiny": "mlx {synth/tiny} {out}",
    "mlx/files": "mlx {synth/tiny} {out} --dense mxfp8 --max-file-size 700K --strict",
    "mlx/affine8": "mlx {synth/tiny} {out} --dense affine8",
    "mlx/plain": "mlx {bf16-without-draft/tiny} {out}",
    "mlx/headers": "mlx {synth/dspark} {out} --index headers",
    **{f"mlx/{source}": f"mlx {{synth/{source}}} {{out}}" for source in ("base", "vision", "nano", "v41-tiny")},
    **{
        f"mlx-bf16/{source}": f"mlx {{synth/{source}}} {{out}} --dense bf16"
        for source in ("tiny", "base-any-scales", "v41-tiny")
    },
    "mlx/fp8": "mlx {fp8/tiny} {out}",
    "maxtext/tiny": "maxtext {synth/tiny} {out} --dtype bf16 --strict",
    "maxtext-scanned/tiny": "maxtext {synth/tiny} {out} --scan --index headers",
    "maxtext-f32/vision": "maxtext {synth/vision} {out} --dtype f32",
}

SHARDS = {
    **{f"mp{mp}/eight": f"shard {{synth/eight}} {{out}} --mp {mp}" for mp in (1, 2, 4, 8)},
    **{f"mp{mp}-fp8/eight": f"shard {{synth/eight}} {{out}} --mp {mp} --experts fp8" for mp in (1, 2, 4, 8)},
    **{f"mp{mp}/v41-tiny": f"shard {{synth/v41-tiny}} {{out}} --mp {mp}" for mp in (1, 2, 4, 8)},
    "mp4-fp8/v41-tiny": "shard {synth/v41-tiny} {out} --mp 4 --experts fp8",
    "mp2-without-draft/v41-tiny": "shard {synth/v41-tiny} {out} --mp 2 --draft drop",
    "unshard-wo_a-fp8/v41-tiny": "unshard {mp8/v41-tiny} {out} --wo-a fp8",
    "mp2-fp4/tiny": "shard {synth/tiny} {out} --mp 2 --experts fp4",
    "mp4-ranks/tiny": "shard {synth/tiny} {out} --mp 4 --rank 1 --rank 3",
    "mp2-draft/dspark": "shard {synth/dspark} {out} --mp 2 --draft keep",
    "mp2-without-draft/tiny": "shard {synth/tiny} {out} --mp 2 --draft drop",
    "mp2-fp8-without-draft/dspark": "shard {synth/dspark} {out} --mp 2 --experts fp8 --draft drop",
    "mp2-draft-alone/v41-tiny": "shard {synth/v41-tiny} {out} --mp 2 --draft only",
    "mp2-split/tiny": "shard {synth/tiny} {out}/model --mp 2 --draft split",
    "mp2-fp8/dspark": "shard {synth/dspark} {out} --mp 2 --experts fp8",
    "mp2-fp8/vision": "shard {synth/vision} {out} --mp 2 --experts fp8",
    **{
        f"mp2/{source}": f"shard {{synth/{source}}} {{out}} --mp 2"
        for source in ("base", "base-any-scales", "dspark", "vision", "without-draft", "nano", "flash", "pro")
    },
    "mp2/furnished": "shard {furnished} {out} --mp 2",
    "mp2/fp8": "shard {fp8/tiny} {out} --mp 2",
    "mp2/nvfp4": "shard {nvfp4/tiny} {out} --mp 2",
    "mp2/bf16": "shard {bf16/tiny} {out} --mp 2",
    "mp2/stacked": "shard {bf16-stacked/tiny} {out} --mp 2",
    "mp2/model-prefix": "shard {model-prefix} {out} --mp 2",
    "mp2/v3-names": "shard {v3-names} {out} --mp 2",
    **{
        f"unshard/{shards.replace('/', '-')}": f"unshard {{{shards}}} {{out}}"
        for shards in (
            "mp1/eight",
            "mp4/eight",
            "mp8/eight",
            "mp4-fp8/eight",
            "mp2-without-draft/tiny",
            "mp2/base",
            "mp2/dspark",
            "mp2/vision",
            "mp2/nano",
            "mp2/fp8",
        )
    },
    "unshard-wo_a-bf16/eight": "unshard {mp4/eight} {out} --wo-a bf16 --draft keep",
    "unshard-without-draft/eight": "unshard {mp4/eight} {out} --draft drop",
    "unshard-draft-alone/eight": "unshard {mp4/eight} {out} --draft only",
    "unshard-split/v41-tiny": "unshard {mp8/v41-tiny} {out}/model --draft split",
    "unshard-wo_a-fp8/eight": "unshard {mp4/eight} {out} --wo-a fp8",
    "unshard-wo_a-fp8/fp8": "unshard {mp2-fp8/eight} {out} --wo-a fp8",
    "unshard-wo_a-fp8/dspark": "unshard {mp2/dspark} {out} --wo-a fp8",
    "unshard-files/eight": "unshard {mp2/eight} {out} --max-file-size 700K",
}

GGUF = {
    **{
        f"gguf/{source}/split": f"hf-to-gguf {{synth/{source}}} {{out}}/model.gguf --draft split"
        for source in ("tiny", "base", "base-any-scales", "dspark", "flash", "pro", "flash-dspark", "flash-base")
    },
    "gguf/vision/split": "hf-to-gguf {synth/vision} {out}/model.gguf --draft split --mmproj split",
    **{
        f"gguf/v41-tiny/engram-{kind}": f"hf-to-gguf {{synth/v41-tiny}} {{out}}/model.gguf --engram {kind}"
        for kind in ("q8_0", "mxfp4", "bf16", "i8-row264", "i8-split")
    },
    "gguf/v41-tiny/files": (
        "hf-to-gguf {synth/v41-tiny} {out}/model.gguf --draft split --mmproj split --max-file-size 3M --engram-last"
    ),
    "gguf/v41-tiny/slice": "hf-to-gguf {synth/v41-tiny} {out}/model.gguf --layers 1-3 --experts q8_0 --dense bf16",
    "gguf/v41-flash/split": "hf-to-gguf {synth/v41-flash} {out}/model.gguf --draft split --mmproj split",
    "gguf/tiny/draft-drop": "hf-to-gguf {synth/tiny} {out}/model.gguf --draft drop",
    "gguf/tiny/draft-only": "hf-to-gguf {synth/tiny} {out}/model.gguf --draft only",
    "gguf/dspark/draft-only": "hf-to-gguf {synth/dspark} {out}/model.gguf --draft only",
    "gguf/vision/draft-only": "hf-to-gguf {synth/vision} {out}/model.gguf --draft only",
    "gguf/vision/mmproj-only": "hf-to-gguf {synth/vision} {out}/model.gguf --mmproj only",
    "gguf/vision/mmproj-f32": "hf-to-gguf {synth/vision} {out}/model.gguf --mmproj only --dense f32",
    **{
        f"gguf/tiny/dense-{dtype}": f"hf-to-gguf {{synth/tiny}} {{out}}/model.gguf --draft split --dense {dtype}"
        for dtype in ("q8_0", "bf16", "f16", "f32")
    },
    **{
        f"gguf/{source}/experts-{dtype}": f"hf-to-gguf {{{folder}}} {{out}}/model.gguf --draft split --experts {dtype}"
        for source, folder in (
            ("tiny", "synth/tiny"),
            ("base-any-scales", "synth/base-any-scales"),
            ("fp8", "fp8/tiny"),
            ("bf16", "bf16/tiny"),
        )
        for dtype in ("mxfp4", "q8_0", "bf16", "f16", "f32")
    },
    "gguf/dspark/f16-f32": "hf-to-gguf {synth/dspark} {out}/model.gguf --draft split --dense f16 --experts f32",
    "gguf/tiny/files": "hf-to-gguf {synth/tiny} {out}/model.gguf --draft split --max-file-size 700K",
    "gguf/vision/files": (
        "hf-to-gguf {synth/vision} {out}/model.gguf --draft split --mmproj split --max-file-size 700K"
    ),
    "gguf/tiny/metadata-first": "hf-to-gguf {synth/tiny} {out}/m.gguf --max-file-size 700K --no-tensor-first-split",
    "gguf/tiny/merged": "merge {gguf/tiny/files}/model-00002-of-00006.gguf {out}/model.gguf",
    "gguf/tiny/slice": "hf-to-gguf {synth/tiny} {out}/model.gguf --layers 1-2",
    "gguf/tiny/one-layer": "hf-to-gguf {synth/tiny} {out}/model.gguf --layers 3-3",
    "gguf/tiny/named": "hf-to-gguf {synth/tiny} {out}/model.gguf --name Example --tokenizer-pre joyai-llm",
    "gguf/tiny/conventional": "hf-to-gguf {synth/tiny} {out} --draft split --max-file-size 1M",
    "gguf/furnished/conventional": "hf-to-gguf {furnished} {out} --draft split --mmproj split",
    **{
        f"gguf/{source}/dialect-{draft}": (
            f"hf-to-gguf {{synth/{source}}} {{out}}/model.gguf --dialect deepseek-v4 --draft {draft}"
        )
        for source in ("tiny", "base", "without-draft")
        for draft in ("keep", "drop")
    },
    "gguf/tiny/dialect-ds4": "hf-to-gguf {synth/tiny} {out}/model.gguf --dialect ds4",
    "gguf/vision/dialect-ds4": "hf-to-gguf {synth/vision} {out}/model.gguf --dialect ds4",
    "gguf/tiny/dialect-llama": "hf-to-gguf {synth/tiny} {out}/model.gguf --dialect llama.cpp",
    "gguf/tiny/dialect-types": (
        "hf-to-gguf {synth/tiny} {out}/model.gguf --dialect deepseek-v4 --draft keep --dense bf16 --experts q8_0"
    ),
    "gguf/nano/default": "hf-to-gguf {synth/nano} {out}/model.gguf",
    "gguf/nano/bf16-f16": "hf-to-gguf {synth/nano} {out}/model.gguf --dense bf16 --experts f16",
    "gguf/nano-base/default": "hf-to-gguf {synth/nano-base} {out}/model.gguf",
    "gguf/one-file/default": "hf-to-gguf {synth/one-file} {out}/model.gguf",
    "gguf/without-draft/default": "hf-to-gguf {synth/without-draft} {out}/model.gguf",
    "gguf/fp8/default": "hf-to-gguf {fp8/tiny} {out}/model.gguf",
    "gguf/nvfp4/default": "hf-to-gguf {nvfp4/tiny} {out}/model.gguf",
    "gguf/bf16/default": "hf-to-gguf {bf16/tiny} {out}/model.gguf",
    "gguf/f16/default": "hf-to-gguf {f16/tiny} {out}/model.gguf",
    "gguf/f32/default": "hf-to-gguf {f32/tiny} {out}/model.gguf",
    "gguf/stacked/default": "hf-to-gguf {bf16-stacked/tiny} {out}/model.gguf",
    "gguf/model-prefix/default": "hf-to-gguf {model-prefix} {out}/model.gguf",
    "gguf/v3-names/default": "hf-to-gguf {v3-names} {out}/model.gguf",
    "gguf/unsharded/default": "hf-to-gguf {unshard/mp2-dspark} {out}/model.gguf --draft split",
}

CASES = {**SOURCES, **FOLDERS, **SHARDS, **GGUF}

# Outputs that other cases read; the rest are removed once their digests are taken.
READ_AGAIN = {field for line in CASES.values() for _, field, _, _ in string.Formatter().parse(line) if field}

# Where a checkpoint for MaxText has its arrays, two files each.
ARRAYS = "0/items/params."

Digests = dict[str, dict[str, str]]


class Outputs:
    """The outputs of cases in a folder, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, Path] = {}

    def __getitem__(self, case: str) -> Path:
        """Return the output of a case, or one of the hand-made sources."""
        if case not in self._made:
            self._made[case] = self._make(case)
        return self._made[case]

    def digests(self, case: str) -> dict[str, str]:
        """Return the SHA-256 of every file that a case writes, by its path within the output; manifests left out.

        The many files of a checkpoint for MaxText have one together: that of their paths and digests.
        """
        out = self[case]
        found = {
            path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(out.rglob("*"))
            if path.is_file() and not path.name.endswith(MANIFEST_SUFFIX)
        }
        arrays = [f"{name} {found.pop(name)}\n" for name in list(found) if name.startswith(ARRAYS)]
        if arrays:
            found[ARRAYS] = hashlib.sha256("".join(arrays).encode()).hexdigest()
        if case not in READ_AGAIN:
            shutil.rmtree(self._made.pop(case))
        return found

    def remove(self) -> None:
        """Remove everything that was made."""
        shutil.rmtree(self._root)

    def _make(self, case: str) -> Path:
        out = self._root / case
        out.parent.mkdir(parents=True, exist_ok=True)
        if case in RESAVED:
            RESAVED[case](self, out)
            return out
        if "{out}/" in CASES[case] or case.startswith("gguf/"):
            out.mkdir()
        named = _Named(self, out)
        words = [word.format_map(named) for word in shlex.split(CASES[case])]
        result = run_cli(*words, "--quiet")
        assert result.code == 0, f"{case}: {result.err}"
        return out


class _Named(dict[str, Path]):
    """The paths that the placeholders of a case's command line stand for."""

    def __init__(self, outputs: Outputs, out: Path) -> None:
        super().__init__(out=out)
        self._outputs = outputs

    def __missing__(self, case: str) -> Path:
        return self._outputs[case]


def _furnish(outputs: Outputs, out: Path) -> None:
    """A vision checkpoint with everything that may lie beside the weights."""
    shutil.copytree(outputs["synth/vision"], out)
    (out / "README.md").write_text(
        "---\nlicense: mit\nbase_model:\n- example/Base-7B\ntags:\n- text-generation\nlanguage: [en]\n---\n# Example\n"
    )
    (out / "LICENSE").write_text("MIT\n")
    (out / "chat_template.jinja").write_text("{{ messages[0]['content'] }}\n")
    (out / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.25, 0.75], "image_std": [0.5, 0.5, 0.125]}')


def _prefix(outputs: Outputs, out: Path) -> None:
    """``model.`` before every name, and scales under the name that V3 gave them."""
    _rename(
        outputs["synth/dspark"],
        out,
        lambda name: "model." + (f"{name[:-6]}.weight_scale_inv" if name.endswith(".scale") else name),
    )


# Parts of official names -> what V3 called them.
V3_PARTS = {
    "attn": "self_attn",
    "ffn": "mlp",
    "scale": "weight_scale_inv",
    "embed": "embed_tokens",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "wq_a": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "wq_b": "q_b_proj",
    "wkv": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "head": "lm_head",
}


def _v3(outputs: Outputs, out: Path) -> None:
    """The names of V3."""
    _rename(
        outputs["synth/tiny"],
        out,
        lambda name: "model." + ".".join(V3_PARTS.get(part, part) for part in name.split(".")),
    )


def _rename(source: Path, out: Path, rename: Callable[[str], str]) -> None:
    """Write the tensors of a folder under other names in one file without an index."""
    out.mkdir()
    files = [RawSafetensors.read(path) for path in sorted(source.glob("*.safetensors"))]
    tensors = {rename(name): tensor for file in files for name, tensor in file.tensors.items()}
    RawSafetensors(tensors, None).write(out / "model.safetensors")
    for path in source.glob("*.json"):
        if path.name != "model.safetensors.index.json":
            shutil.copy(path, out)


# Sources that no command writes.
RESAVED: Mapping[str, Callable[[Outputs, Path], None]] = {
    "furnished": _furnish,
    "model-prefix": _prefix,
    "v3-names": _v3,
}


def all_digests() -> Digests:
    """Return the digests of every case: {case: {file: SHA-256}}."""
    with tempfile.TemporaryDirectory() as root:
        outputs = Outputs(Path(root))
        return {case: outputs.digests(case) for case in sorted(CASES)}


if __name__ == "__main__":
    RECORD.write_text(json.dumps(all_digests(), indent=0) + "\n")
