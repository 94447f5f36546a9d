"""The committed golden activations against what the forward pass computes today."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4convert.engine.conversion import execute
from dsv4convert.reference import Model
from dsv4convert.reference.compare import compare
from dsv4convert.reference.goldens import Goldens, open_goldens, recorded_activations
from dsv4convert.reference.weights.open import open_source
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions

FOLDER = Path(__file__).resolve().parents[2] / "fixtures" / "goldens" / "tiny"

# Other BLAS libraries and processors sum in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def goldens() -> Goldens:
    return open_goldens(FOLDER)


def test_the_tiny_checkpoint_computes_its_goldens(tiny: Path, goldens: Goldens) -> None:
    run = recorded_activations(Model(open_source(tiny)), goldens.tokens, goldens.recorded_from)
    comparison = compare(goldens.activations(), run)
    beyond = comparison.first_beyond(TOLERANCE, by_median=False)
    assert beyond is None, beyond
    assert all(d.agreement in (None, 1.0) for d in comparison.differences)


def test_a_gguf_of_it_computes_them_too(tiny: Path, goldens: Goldens, tmp_path: Path) -> None:
    execute(plan_gguf(tiny, tmp_path / "tiny.gguf", GgufOptions(dense="f32")), threads=2)
    model = Model(open_source(tmp_path / "tiny.gguf"))
    run = recorded_activations(model, goldens.tokens, goldens.recorded_from)
    assert compare(goldens.activations(), run).first_beyond(TOLERANCE, by_median=False) is None


def test_the_goldens_cover_every_kind_of_sub_block(goldens: Goldens) -> None:
    values = dict(goldens.activations())
    assert values["layers.2.attn.compressor.entries"].shape[0] == 1
    chosen = values["layers.3.attn.indexer.chosen"]
    assert 0 < chosen[0].sum() < chosen.shape[1]
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 300_000
