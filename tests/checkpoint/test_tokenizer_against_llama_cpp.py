"""llama.cpp reads the vocabulary that we write and cuts text as the tokenizers package does."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4convert.checkpoint.tokenizer import load_tokenizer
from dsv4convert.engine.conversion import execute
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions

from ..checkpoints import MakeCheckpoint
from ..model.test_chat_template import PUBLISHED, example
from .test_tokenizer import TEXTS

pytestmark = pytest.mark.llama


@pytest.mark.parametrize("seed", [0, 1])
def test_llama_cpp_tokenizes_alike(make_checkpoint: MakeCheckpoint, tmp_path: Path, seed: int) -> None:
    from llama_cpp import Llama

    source = make_checkpoint("tiny", seed=seed)
    execute(plan_gguf(source, tmp_path / "model.gguf", GgufOptions()), threads=2)
    model = Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    ours = load_tokenizer(source, model.n_vocab())
    assert (model.token_bos(), model.token_eos()) == (ours.bos_token_id, ours.eos_token_id)
    for text in [*TEXTS, *(example(number)[1] for number, _ in PUBLISHED)]:
        theirs = model.tokenize(text.encode(), add_bos=False, special=True)
        assert theirs == ours.encode(text)
        assert model.detokenize(theirs, special=True).decode() == text == ours.decode(theirs)
