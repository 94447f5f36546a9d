"""The tokenizer reader against its rules, the published files' sections, and the tokenizers package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4convert.checkpoint.tokenizer import (
    TokenType,
    bytes_to_unicode,
    load_tokenizer,
    recognise_pre,
    unicode_to_bytes,
)
from dsv4convert.errors import DeviceError, TokenizerError, UsageError
from dsv4convert.synth.tokenizer import (
    BOS_TEXT,
    EOS_TEXT,
    PROMPT_TEXTS,
    published_pre_tokenizer,
    synth_tokenizer_document,
    write_synth_tokenizer,
)

VOCAB = 700

# The section as DeepSeek-V4 publishes it, spelled out so that a change of the table is a failure here.
PUBLISHED_PRE_TOKENIZER = json.loads(
    r"""{"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}"}, "behavior": "Isolated", "invert": false},
    {"type": "Split", "pattern": {"Regex": "[一-龥\u3040-ゟ゠-ヿ]+"}, "behavior": "Isolated", "invert": false},
    {"type": "Split", "pattern": {"Regex": "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"},
     "behavior": "Isolated", "invert": false},
    {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]}"""  # noqa: E501
)

Document = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_synth_tokenizer(tmp_path, VOCAB, seed=3)
    return tmp_path


def edit(folder: Path, change: Callable[[Document], object], name: str = "tokenizer.json") -> None:
    path = folder / name
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def test_published_pre_tokenizer_section_is_recognised_and_written() -> None:
    assert published_pre_tokenizer() == PUBLISHED_PRE_TOKENIZER
    assert recognise_pre({"pre_tokenizer": PUBLISHED_PRE_TOKENIZER}, "x") == "joyai-llm"


def test_tokens_types_merges_and_ids_come_out_as_written(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(folder, VOCAB)
    assert (tokenizer.model, tokenizer.pre) == ("gpt2", "joyai-llm")
    assert len(tokenizer.tokens) == len(tokenizer.token_types) == VOCAB
    for text, token_id in document["model"]["vocab"].items():
        assert tokenizer.tokens[token_id] == text
        expected = TokenType.CONTROL if token_id <= 2 else TokenType.NORMAL
        assert tokenizer.token_types[token_id] == expected
    assert list(tokenizer.merges) == document["model"]["merges"]
    assert tokenizer.special_ids == {"bos": 0, "eos": 1, "pad": 1}
    assert tokenizer.add_special == {"bos": False, "eos": False}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_added_tokens_get_types_by_flag_and_look(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, VOCAB)
    kinds = {text: tokenizer.token_types[tokenizer.tokens.index(text)] for text in tokenizer.tokens}
    assert kinds[BOS_TEXT] == kinds[EOS_TEXT] == TokenType.CONTROL
    assert kinds["<｜end_of_query｜>"] == TokenType.CONTROL  # flagged special
    assert kinds["<｜User｜>"] == kinds["<|EOT|>"] == TokenType.CONTROL  # only looks special
    for text in ("<think>", "</think>", "｜DSML｜", "<dsml:", "<｜/table>｜"):
        assert kinds[text] == TokenType.USER_DEFINED


def test_sentencepiece_spaces_become_spaces_in_user_defined_tokens_only(folder: Path) -> None:
    edit(folder, lambda d: d["added_tokens"][-1].update(content="a▁b"))
    tokenizer = load_tokenizer(folder, VOCAB)
    assert "a b" in tokenizer.tokens
    assert BOS_TEXT in tokenizer.tokens


def test_rows_without_token_are_padding(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, VOCAB + 40)
    for token_id in range(VOCAB - 3, VOCAB + 40):
        assert tokenizer.tokens[token_id] == f"[PAD{token_id}]"
        assert tokenizer.token_types[token_id] == TokenType.UNUSED


def test_hole_inside_the_vocabulary_is_padding(folder: Path) -> None:
    edit(folder, lambda d: d["added_tokens"].pop(5))
    tokenizer = load_tokenizer(folder, VOCAB)
    assert tokenizer.token_types.count(TokenType.UNUSED) == 4


def test_merges_as_pairs_read_like_merges_as_lines(folder: Path) -> None:
    lines = load_tokenizer(folder, VOCAB).merges
    edit(folder, lambda d: d["model"].update(merges=[m.split(" ") for m in d["model"]["merges"]]))
    assert load_tokenizer(folder, VOCAB).merges == lines


def test_space_inside_a_merge_pair_is_spelled_in_the_byte_alphabet(folder: Path) -> None:
    edit(folder, lambda d: d["model"].update(merges=[[" a", "b "]]))
    assert load_tokenizer(folder, VOCAB).merges == ("Ġa bĠ",)


def test_ids_fall_back_to_config_json(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text('{"bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 8}')
    assert load_tokenizer(folder, VOCAB).special_ids == {"bos": 5, "pad": 8}


def test_settings_say_what_to_add_where_the_post_processor_does_not(folder: Path) -> None:
    edit(folder, lambda d: d.update(post_processor=None))
    edit(folder, lambda d: d.update(add_bos_token=True), "tokenizer_config.json")
    assert load_tokenizer(folder, VOCAB).add_special == {"bos": True, "eos": False}


def test_template_processing_says_what_to_add(folder: Path) -> None:
    single = [{"SpecialToken": {"id": BOS_TEXT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    edit(folder, lambda d: d.update(post_processor={"type": "TemplateProcessing", "single": single}))
    assert load_tokenizer(folder, VOCAB).add_special == {"bos": True, "eos": False}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, {}, id="none"),
        pytest.param({"chat_template.jinja": "J"}, {"default": "J"}, id="jinja file"),
        pytest.param({"chat_template.json": '{"chat_template": "K"}'}, {"default": "K"}, id="json file"),
        pytest.param(
            {"chat_template.jinja": "J", "chat_template.json": '{"chat_template": "K"}'},
            {"default": "J"},
            id="both",
        ),
    ],
)
def test_chat_template_of_the_folder_is_kept(folder: Path, files: dict[str, str], expected: object) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)
    assert load_tokenizer(folder, VOCAB).chat_templates == expected


def test_a_template_in_a_file_comes_first_as_in_transformers(folder: Path) -> None:
    edit(folder, lambda d: d.update(chat_template="S"), "tokenizer_config.json")
    assert load_tokenizer(folder, VOCAB).chat_templates == {"default": "S"}
    (folder / "chat_template.jinja").write_text("J")
    found = load_tokenizer(folder, VOCAB)
    assert found.chat_templates == {"default": "J"}
    assert found.notes == ("chat templates are those of chat_template.jinja and its like, not tokenizer_config.json's",)
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    edit(folder, lambda d: d.update(chat_template=named), "tokenizer_config.json")
    assert load_tokenizer(folder, VOCAB).chat_templates == {"default": "D", "tool_use": "T"}


def forged_id(document: Document) -> None:
    document["added_tokens"][-1]["id"] = 10**12


def taken_id(document: Document) -> None:
    document["model"]["vocab"]["!"] = document["model"]["vocab"]['"']


def second_id(document: Document) -> None:
    document["added_tokens"][1]["id"] = 2


BROKEN: list[Any] = [
    pytest.param(lambda d: d.pop("model"), "key model is missing", id="no model"),
    pytest.param(lambda d: d["model"].update(type="Unigram"), "got Unigram with ByteLevel", id="unigram"),
    pytest.param(lambda d: d.update(decoder={"type": "Metaspace"}), "BPE with Metaspace", id="decoder"),
    pytest.param(lambda d: d["model"].update(byte_fallback=True), "unknown kind", id="byte fallback"),
    pytest.param(lambda d: d.update(normalizer={"type": "NFC"}), "got NFC", id="normaliser"),
    pytest.param(lambda d: d.update(pre_tokenizer={"type": "Metaspace"}), "got Metaspace", id="other pre"),
    pytest.param(lambda d: d.update(pre_tokenizer=None), "got none", id="no pre"),
    pytest.param(
        lambda d: d["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{N}"),
        r"got Split(\p{N}) + Split(",
        id="other digits",
    ),
    pytest.param(
        lambda d: d["pre_tokenizer"]["pretokenizers"][-1].update(add_prefix_space=True),
        "pre-tok",
        id="prefix",
    ),
    pytest.param(lambda d: d["model"].update(vocab={}), "key model.vocab", id="empty vocabulary"),
    pytest.param(lambda d: d["model"]["vocab"].update(zz=-1), "token 'zz': no usable id", id="negative id"),
    pytest.param(lambda d: d["model"]["vocab"].update(zz=True), "token 'zz'", id="boolean id"),
    pytest.param(lambda d: d["model"]["vocab"].update({"世": 699}), "byte-level alphabet", id="raw character"),
    pytest.param(lambda d: d["model"]["vocab"].pop("!"), "none for byte 0x21", id="byte without token"),
    pytest.param(taken_id, "duplicate id ", id="one id for two"),
    pytest.param(second_id, "has two ids", id="two ids for one"),
    pytest.param(forged_id, "expected ids below vocab_size 700, got 1000000000000", id="too large"),
    pytest.param(lambda d: d.update(added_tokens={}), "key added_tokens: not a list", id="added no list"),
    pytest.param(lambda d: d["added_tokens"].append(3), "expected an integer id", id="added no object"),
    pytest.param(lambda d: d["added_tokens"][-1].update(content="\ud800"), "surrogate", id="surrogate"),
    pytest.param(lambda d: d["model"].update(merges=[]), "key model.merges", id="no merges"),
    pytest.param(lambda d: d["model"].update(merges=["ab"]), "merges[0]: not two parts", id="merge of one"),
    pytest.param(lambda d: d["model"].update(merges=["a b c"]), "merges[0]", id="merge of three"),
    pytest.param(lambda d: d["model"].update(merges=[["a", "b"], ["a"]]), "merges[1]", id="merge no pair"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_broken_tokenizer_is_one_clear_line(folder: Path, change: Callable[[Document], object], message: str) -> None:
    edit(folder, change)
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(folder, VOCAB)
    line = str(caught.value)
    assert message in line
    assert str(folder / "tokenizer.json") in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"a": 1, "a": 2}', "duplicate key 'a'"),
        ("[" * 100_000, "JSON"),
    ],
    ids=["cut", "list", "key twice", "deep"],
)
def test_tokenizer_that_is_no_json_object_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(folder, VOCAB)


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing; is the download complete"):
        load_tokenizer(tmp_path, VOCAB)


def test_broken_settings_are_named(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{]")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        load_tokenizer(folder, VOCAB)


def test_vocabulary_smaller_than_the_tokenizer_is_refused(folder: Path) -> None:
    with pytest.raises(TokenizerError, match="larger than the vocabulary: expected ids below vocab_size 500"):
        load_tokenizer(folder, 500)


def test_special_id_outside_the_vocabulary_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"mask_token_id": VOCAB}))
    with pytest.raises(TokenizerError, match="mask token outside the vocabulary"):
        load_tokenizer(folder, VOCAB)


def test_explicit_pre_allows_an_unknown_pre_tokenizer(folder: Path) -> None:
    edit(folder, lambda d: d.update(pre_tokenizer={"type": "ByteLevel", "use_regex": True}))
    with pytest.raises(TokenizerError, match="--tokenizer-pre"):
        load_tokenizer(folder, VOCAB)
    assert load_tokenizer(folder, VOCAB, "gpt-2").pre == "gpt-2"


def test_byte_alphabet_is_a_bijection_that_keeps_visible_ascii() -> None:
    alphabet = bytes_to_unicode()
    assert sorted(alphabet) == list(range(256))
    assert all(unicode_to_bytes()[char] == byte for byte, char in alphabet.items())
    assert all(alphabet[byte] == chr(byte) for byte in range(ord("!"), ord("~") + 1))
    assert (alphabet[ord(" ")], alphabet[ord("\n")]) == ("Ġ", "Ċ")


TEXTS = [
    "Hello, world! 12345 3..3\n\n  x\t\r\n",
    "世界著名温泉 カタカナ ひらがな 🚀 café naïve",
    "<｜User｜>What's up?<｜Assistant｜><think>hm</think>fine<｜end▁of▁sentence｜>",
    "<｜DSML｜tool_calls>\n</｜DSML｜tool_calls>",
]


@pytest.mark.parametrize("text", TEXTS)
def test_decode_undoes_encode(folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(folder, VOCAB)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.decode([i]) for i in ids if text.isascii()) == (text if text.isascii() else "")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_decode_undoes_encode_for_any_text(folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(folder, VOCAB)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_shows_incomplete_utf8_as_replacement_and_leaves_out_padding(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, VOCAB)
    first = tokenizer.tokens.index(bytes_to_unicode()["世".encode()[0]])
    assert tokenizer.decode([first]) == "\ufffd"
    assert tokenizer.decode([VOCAB - 1]) == ""
    with pytest.raises(TokenizerError, match="token id outside the vocabulary: expected 0-699, got 700"):
        tokenizer.decode([700])


def test_encode_without_the_package_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(DeviceError, match="tokenizers"):
        load_tokenizer(folder, VOCAB).encode("x")


@pytest.mark.parametrize("vocab_size", [320, 333, 512, 1000, 9000])
def test_synthetic_tokenizer_fits_its_vocabulary(tmp_path: Path, vocab_size: int) -> None:
    write_synth_tokenizer(tmp_path, vocab_size, seed=vocab_size)
    tokenizer = load_tokenizer(tmp_path, vocab_size)
    assert set(PROMPT_TEXTS) <= set(tokenizer.tokens)
    assert len(set(tokenizer.tokens)) == vocab_size
    assert tokenizer.token_types[-1] == TokenType.UNUSED
    assert tokenizer.merges


def test_synthetic_tokenizers_differ_by_seed_and_repeat(tmp_path: Path) -> None:
    assert synth_tokenizer_document(600, 1) == synth_tokenizer_document(600, 1)
    assert synth_tokenizer_document(600, 1)["model"]["merges"] != synth_tokenizer_document(600, 2)["model"]["merges"]


def test_vocabulary_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 320, got 319"):
        write_synth_tokenizer(tmp_path, 319, 0)


def test_merges_of_a_synthetic_tokenizer_are_used(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, VOCAB)
    left, right = tokenizer.merges[0].split(" ")
    merged = tokenizer.tokens.index(left + right)
    assert tokenizer.encode(tokenizer.decode([merged])) == [merged]


def test_transformers_reads_a_synthetic_tokenizer_alike(folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder, VOCAB)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 1)
    assert all(ours.tokens[i] == text for text, i in theirs.get_vocab().items())
    assert len(theirs) == VOCAB - ours.token_types.count(TokenType.UNUSED)
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
