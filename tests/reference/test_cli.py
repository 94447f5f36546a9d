"""The commands forward and compare."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from dsv4convert.cli import app
from dsv4convert.engine.conversion import execute
from dsv4convert.errors import Dsv4Error
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions

from ..v41 import TINY, recorded

PROMPT = "0,17,5,300"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ok(*arguments: object) -> str:
    result = run(*arguments)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def error(*arguments: object) -> Dsv4Error:
    result = run(*arguments)
    assert isinstance(result.exception, Dsv4Error), result.output
    assert "\n" not in str(result.exception)
    return result.exception


@pytest.fixture(scope="module")
def gguf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny checkpoint's default GGUF."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    execute(plan_gguf(tiny, path, GgufOptions()), threads=2)
    return path


# ---- forward ------------------------------------------------------------------------------------------


def test_forward_prints_the_likeliest_tokens_of_every_position(tiny: Path) -> None:
    lines = ok("forward", tiny, "--tokens", PROMPT, "--top", 3).splitlines()
    assert len(lines) == 4
    assert lines[1].split()[:2] == ["1", "17"]
    assert all(line.count("%") == 3 for line in lines)


def test_forward_decodes_with_the_models_own_vocabulary(tiny: Path, gguf: Path) -> None:
    for model in (tiny, gguf):
        document = json.loads(ok("forward", model, "--tokens", "42,71", "--json"))
        assert [position["text"] for position in document["positions"]] == ["H", "e"]


def test_forward_json_holds_probabilities_in_order(tiny: Path) -> None:
    document = json.loads(ok("forward", tiny, "--tokens", PROMPT, "--json", "--top", 100))
    assert document["tokens"] == [0, 17, 5, 300]
    for position in document["positions"]:
        probabilities = [entry["probability"] for entry in position["next"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0.1 < sum(probabilities) < 1


def test_forward_writes_logits(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "logits.npy"
    ok("forward", tiny, "--tokens", PROMPT, "--logits", out)
    logits = np.load(out)
    assert logits.shape == (4, 512)
    assert logits.dtype == np.float32
    assert "already exists" in str(error("forward", tiny, "--tokens", PROMPT, "--logits", out))
    ok("forward", tiny, "--tokens", PROMPT, "--logits", out, "--overwrite")


def test_forward_takes_text_and_conversations(tiny: Path, gguf: Path, tmp_path: Path) -> None:
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps([{"role": "user", "content": "hello"}]))
    text = json.loads(ok("forward", tiny, "--text", "hello", "--json"))
    decoded = "".join(position["text"] for position in text["positions"])
    assert decoded == "hello"
    prompt = json.loads(ok("forward", tiny, "--chat", chat, "--json"))
    decoded = "".join(position["text"] for position in prompt["positions"])
    assert decoded.startswith("<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜>")
    assert prompt["tokens"][0] == 0
    assert prompt["tokens"][1] != 0
    through_gguf = json.loads(ok("forward", gguf, "--text", "hello", "--tokenizer", tiny, "--json"))
    assert through_gguf["tokens"] == text["tokens"]


def test_conversations_of_v41_go_through_its_own_template(tmp_path: Path) -> None:
    case = next(case for case in recorded("chat_vectors.json") if case["name"] == "chat_system")
    chat = tmp_path / "chat.json"
    asked = {"messages": case["messages"], "enable_thinking": case["thinking_mode"] == "thinking"}
    chat.write_text(json.dumps(asked | ({"tools": case["tools"]} if case["tools"] else {})))
    runs = (["--chat", chat], ["--text", case["prompt"]])
    of_chat, of_text = (json.loads(ok("forward", TINY["tiny-a"], *run, "--top", "1", "--json")) for run in runs)
    assert of_chat["tokens"] == of_text["tokens"]


def test_generation_is_greedy_by_default_and_seeded_otherwise(tiny: Path) -> None:
    def generated(*options: object) -> list[int]:
        out = ok("forward", tiny, "--tokens", PROMPT, "--generate", 6, "--json", *options)
        tokens: list[int] = json.loads(out)["generated"]["tokens"]
        return tokens

    greedy = generated()
    tokens = [0, 17, 5, 300]
    for token in greedy:  # each is the likeliest after a prefill of all before it
        document = json.loads(ok("forward", tiny, "--tokens", ",".join(map(str, tokens)), "--json", "--top", 1))
        assert document["positions"][-1]["next"][0]["token"] == token
        tokens.append(token)
    warm = generated("--temperature", 1, "--seed", 1)
    assert warm == generated("--temperature", 1, "--seed", 1)
    assert warm != generated("--temperature", 1, "--seed", 2)


def test_generation_ends_with_the_sentence(make_checkpoint: object, tiny: Path, tmp_path: Path) -> None:
    out = json.loads(ok("forward", tiny, "--tokens", PROMPT, "--generate", 3, "--json"))
    first = out["generated"]["tokens"][0]
    folder = tmp_path / "ends"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((tiny / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": first}))
    out = json.loads(ok("forward", folder, "--tokens", PROMPT, "--generate", 3, "--json"))
    assert out["generated"]["tokens"] == [first]


def test_layers_runs_the_first_ones_only(tiny: Path) -> None:
    assert ok("forward", tiny, "--tokens", PROMPT, "--layers", "0-0") != ok("forward", tiny, "--tokens", PROMPT)
    too_many = error("forward", tiny, "--tokens", PROMPT, "--layers", "0-4")
    assert "number of layers: expected 1 to 4, got 5" in str(too_many)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        (
            "2",
            "--layers must start at layer 0: expected a range such as 0-3, got 2; --layers 0-1 takes the first 2",
        ),
        ("1-3", "--layers must start at layer 0: expected a range such as 0-3, got 1-3; use --layers 0-3"),
        ("all", "--layers: not a range"),
    ],
)
def test_layers_of_a_forward_pass_start_at_the_first(tiny: Path, layers: str, says: str) -> None:
    assert says in str(error("forward", tiny, "--tokens", PROMPT, "--layers", layers))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "prompt is missing; pass --tokens, --text or --chat"),
        (["--tokens", ""], "the prompt is empty"),
        (["--tokens", "1,512"], "token id out of range: expected 0 to 511, got 512"),
        (["--tokens", "1,x"], "--tokens: not a list of token ids: expected a list such as 1,2,3, got '1,x'"),
        (["--tokens", "1,-1"], "--tokens: not a list of token ids: expected a list such as 1,2,3, got '1,-1'"),
        (["--tokens", "9" * 5000], "--tokens: not a list of token ids: expected a list such as 1,2,3, got '999"),
        (["--tokens", "1", "--text", "a"], "--tokens and --text cannot be combined"),
        (["--chat", "nowhere.json"], "nowhere.json: no such file"),
        (["--tokens", "1", "--record-last", "2"], "--record-last needs --goldens"),
        (["--tokens", "1", "--temperature", "1"], "--temperature needs --generate"),
        (["--tokens", ",".join(["1"] * 4097)], "more tokens than the model's context: expected at most 4096"),
    ],
    ids=["none", "empty", "range", "letters", "negative", "long", "two", "no-chat", "record", "temperature", "context"],
)
def test_bad_prompts_get_one_line(tiny: Path, options: list[str], line: str) -> None:
    assert str(error("forward", tiny, *options)).startswith(line)


@pytest.mark.parametrize("text", ["{", "3", '{"messages": 3}', "[1]"], ids=["cut", "number", "object", "list"])
def test_a_file_that_is_no_conversation_gets_one_line(tiny: Path, tmp_path: Path, text: str) -> None:
    chat = tmp_path / "chat.json"
    chat.write_text(text)
    assert "chat.json: not " in str(error("forward", tiny, "--chat", chat))


def test_an_enormous_conversation_is_refused_and_not_read(tiny: Path, tmp_path: Path) -> None:
    chat = tmp_path / "chat.json"
    chat.touch()
    os.truncate(chat, 2**42)
    assert "chat.json: too large" in str(error("forward", tiny, "--chat", chat))


def test_text_without_a_tokenizer_says_how_to_name_one(gguf: Path) -> None:
    assert "--tokenizer" in str(error("forward", gguf, "--text", "hello"))


def test_a_missing_weight_is_named(tiny: Path, gguf: Path, tmp_path: Path) -> None:
    mtp = tmp_path / "mtp.gguf"
    execute(plan_gguf(tiny, mtp, GgufOptions(draft="only")), threads=2)
    assert "mtp.gguf: no weight layers.0.hc_attn_base" in str(error("forward", mtp, "--tokens", "1"))


def test_the_program_prints_errors_without_a_traceback(tiny: Path) -> None:
    command = [sys.executable, "-m", "dsv4convert", "forward", str(tiny), "--tokens", "512"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: token id out of range: expected 0 to 511, got 512\n"


# ---- compare ------------------------------------------------------------------------------------------


def test_a_model_equals_itself(tiny: Path) -> None:
    lines = ok("compare", tiny, tiny, "--tokens", PROMPT).splitlines()
    assert lines[-1] == "the same within 1e-05: the largest relative RMSE is 0 (embed)"
    assert "argmax agrees in 100.00%" in lines[-2]
    assert any(re.fullmatch(r"layers\.3\.ffn\.gate\.experts +100\.0000%", line) for line in lines)
    assert any(re.fullmatch(r"layers\.3\.attn\.q( +0\.00e\+00){5}", line) for line in lines)


def test_a_quantised_model_differs_and_the_exit_code_says_so(tiny: Path, gguf: Path) -> None:
    failure = error("compare", tiny, gguf, "--random", 100)
    assert failure.exit_code == 12
    assert "first in layers.0.attn.q" in str(failure)
    ok("compare", tiny, gguf, "--random", 100, "--median", "--tolerance", 0.1)


def test_compare_json_has_the_verdict_and_every_sub_block(tiny: Path, gguf: Path) -> None:
    result = run("compare", tiny, gguf, "--random", 50, "--json")
    assert isinstance(result.exception, Dsv4Error)
    document = json.loads(result.stdout)
    assert document["within"] is False
    assert document["first_beyond"] == "layers.0.attn.q"
    names = [block["name"] for block in document["blocks"]]
    assert names[0] == "embed"
    assert names[-1] == "logits"
    assert document["logits"]["positions"] == 50
    assert 0.9 < document["logits"]["argmax_agreement"] <= 1
    assert 0 < document["logits"]["kl_mean"] < 0.1


def test_compare_draws_the_error_by_layer(tiny: Path, gguf: Path, tmp_path: Path) -> None:
    picture = tmp_path / "errors.png"
    error("compare", tiny, gguf, "--random", 20, "--plot", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "nowhere: output folder is missing" in str(
        error("compare", tiny, gguf, "--random", 20, "--plot", tmp_path / "nowhere" / "errors.png")
    )


def test_goldens_stand_in_for_either_side(tiny: Path, gguf: Path, tmp_path: Path) -> None:
    goldens = tmp_path / "goldens"
    ok("forward", tiny, "--tokens", ",".join(map(str, range(140))), "--goldens", goldens, "--record-last", 2)
    assert "the same" in ok("compare", goldens, tiny)
    assert "the same" in ok("compare", tiny, goldens)
    assert "the same" in ok("compare", goldens, goldens)
    assert error("compare", goldens, gguf).exit_code == 12
    assert "goldens contain their own tokens" in str(error("compare", goldens, tiny, "--tokens", "1"))
    other = tmp_path / "other"
    ok("forward", tiny, "--tokens", "1,2", "--goldens", other)
    assert "recorded different runs: tokens" in str(error("compare", goldens, other))


def test_models_of_different_shapes_are_refused_by_the_key(tiny: Path, make_checkpoint: object) -> None:
    make = make_checkpoint
    assert callable(make)
    other = make("tiny", overrides={"hidden_size": 224})
    assert str(error("compare", tiny, other, "--tokens", "1")) == (
        "the models differ in hidden_size: expected 160, got 224"
    )
    shorter = make("tiny", overrides={"num_hidden_layers": 2, "compress_ratios": [0, 4, 0]})
    assert "differ in num_hidden_layers: expected 4, got 2; --layers" in str(
        error("compare", tiny, shorter, "--tokens", "1")
    )


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "prompt is missing; pass --tokens, --text, --chat or --random"),
        (["--random", "3", "--tokens", "1"], "--random cannot be combined with another prompt"),
    ],
    ids=["none", "two"],
)
def test_compare_wants_one_prompt(tiny: Path, options: list[str], line: str) -> None:
    assert str(error("compare", tiny, tiny, *options)).startswith(line)
