"""The chat template against the published prompts, against the rules in plain Python, in jinja2 and llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

FIXTURES = Path(__file__).parents[2] / "fixtures" / "chat"
# Number of the published example, and whether its prompt is one of the thinking mode.
PUBLISHED = ((1, True), (2, True), (3, True), (4, False))

SOURCE = resources.files("dsv4convert.model").joinpath("chat_template.jinja").read_text(encoding="utf-8")

Message = dict[str, Any]
Render = Callable[..., str]


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def as_transformers_does() -> jinja2.Environment:
    """Return the environment of transformers' apply_chat_template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def tojson(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


def as_llama_cpp_python_does() -> jinja2.Environment:
    """Return a sandbox with jinja2's own tojson, which sorts keys and escapes for HTML."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment


ENVIRONMENTS = {
    "transformers": as_transformers_does,
    "llama-cpp-python": as_llama_cpp_python_does,
    "plain jinja2": jinja2.Environment,
}


@pytest.fixture(params=list(ENVIRONMENTS))
def render(request: pytest.FixtureRequest) -> Render:
    template = ENVIRONMENTS[request.param]().from_string(SOURCE)
    return lambda messages, **context: template.render(messages=messages, **context)


def example(number: int) -> tuple[dict[str, Any], str]:
    """Return (template context, published prompt) of an example."""
    document = json.loads((FIXTURES / f"input_{number}.json").read_text(encoding="utf-8"))
    context = document if isinstance(document, dict) else {"messages": document}
    return context, (FIXTURES / f"output_{number}.txt").read_text(encoding="utf-8")


def with_object_arguments(messages: list[Message]) -> list[Message]:
    """Return ``messages`` with the JSON texts of tool calls parsed, as some callers pass them."""
    messages = json.loads(json.dumps(messages))
    for message in messages:
        for call in message.get("tool_calls") or []:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return messages


# The published prompts


@pytest.mark.parametrize("generate", [False, True], ids=["whole", "generation prompt"])
@pytest.mark.parametrize(("number", "thinking"), PUBLISHED)
def test_published_prompt_comes_out_exactly(render: Render, number: int, thinking: bool, generate: bool) -> None:
    context, expected = example(number)
    assert render(**context, enable_thinking=thinking, add_generation_prompt=generate) == expected
    context["messages"] = with_object_arguments(context["messages"])
    assert render(**context, enable_thinking=thinking, add_generation_prompt=generate) == expected


@pytest.mark.parametrize(("number", "thinking"), PUBLISHED)
def test_cut_before_its_answer_it_is_the_prompt_for_that_answer(render: Render, number: int, thinking: bool) -> None:
    context, expected = example(number)
    answer = context["messages"][-1]
    reasoning = f"{answer.get('reasoning_content', '')}</think>" if thinking else ""
    ending = f"{reasoning}{answer['content']}<｜end▁of▁sentence｜>"
    assert expected.endswith(ending)
    context["messages"] = context["messages"][:-1]
    found = render(**context, enable_thinking=thinking, add_generation_prompt=True)
    assert found == expected.removesuffix(ending)


@pytest.mark.parametrize("generate", [False, True])
def test_transformers_renders_it_as_a_tokenizers_template(tmp_path: Path, generate: bool) -> None:
    from transformers import AutoTokenizer

    from dsv4convert.synth.tokenizer import write_synth_tokenizer

    write_synth_tokenizer(tmp_path, 600, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for number, thinking in PUBLISHED:
        context, expected = example(number)
        text = tokenizer.apply_chat_template(
            context["messages"],
            tools=context.get("tools"),
            chat_template=SOURCE,
            tokenize=False,
            enable_thinking=thinking,
            add_generation_prompt=generate,
        )
        assert text == expected
        assert tokenizer.decode(tokenizer.encode(text)) == expected


# Single rules

HELLO = [{"role": "user", "content": "Hello"}]


def test_generation_prompt_opens_or_closes_the_thoughts(render: Render) -> None:
    asked = "<｜begin▁of▁sentence｜><｜User｜>Hello"
    assert render(HELLO) == asked
    assert render(HELLO, add_generation_prompt=True) == asked + "<｜Assistant｜></think>"
    assert render(HELLO, add_generation_prompt=True, enable_thinking=False) == asked + "<｜Assistant｜></think>"
    assert render(HELLO, add_generation_prompt=True, enable_thinking=True) == asked + "<｜Assistant｜><think>"
    assert render(HELLO, add_generation_prompt=True, thinking=True) == asked + "<｜Assistant｜><think>"
    # enable_thinking has the last word.
    both = render(HELLO, add_generation_prompt=True, thinking=True, enable_thinking=False)
    assert both == asked + "<｜Assistant｜></think>"


def test_generation_prompt_follows_a_lone_system_message(render: Render) -> None:
    found = render([{"role": "system", "content": "S"}], add_generation_prompt=True)
    assert found == "<｜begin▁of▁sentence｜>S<｜Assistant｜></think>"


def test_tools_without_system_message_open_the_prompt(render: Render) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "items": []}}}
    found = render(HELLO, tools=[tool])
    assert found.startswith("<｜begin▁of▁sentence｜>\n\n## Tools\n\n")
    assert '{"name": "f", "parameters": {"type": "object", "items": []}}\n\nYou MUST' in found
    assert found.endswith("to invoke tool calls.\n<｜User｜>Hello")
    assert render(HELLO, tools=[tool["function"]]) == found


def test_earlier_thoughts_stay_when_asked(render: Render) -> None:
    context, dropped = example(2)
    kept = render(**context, enable_thinking=True, drop_thinking=False)
    assert "<think>The user said hello, I should greet back.</think>Hi there!" in kept
    assert len(kept) > len(dropped)


def test_no_thoughts_are_shown_without_thinking(render: Render) -> None:
    context, _ = example(1)
    found = render(**context, enable_thinking=False)
    conversation = found[found.index("<｜User｜>") :]
    assert "The user wants to know" not in conversation
    assert "<think>" not in conversation
    assert conversation.count("<｜Assistant｜></think>") == 2


def test_tool_results_come_in_the_order_of_their_calls(render: Render) -> None:
    calls = [{"id": name, "function": {"name": name, "arguments": "{}"}} for name in ("a", "b", "c")]
    found = render(
        [
            *HELLO,
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "c", "content": "C"},
            {"role": "tool", "tool_call_id": "a", "content": "A"},
            {"role": "user", "content": "and"},
            {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "B"}, {"type": "image"}]},
            {"role": "assistant", "tool_calls": calls[:1]},
        ]
    )
    assert '<｜DSML｜invoke name="b">\n\n</｜DSML｜invoke>\n' in found
    assert (
        "<｜User｜><tool_result>A</tool_result>\n\n<tool_result>B\n\n[Unsupported image]</tool_result>\n\nand"
        "\n\n<tool_result>C</tool_result><｜Assistant｜>"
    ) in found


@pytest.mark.parametrize("task", ["query", "authority", "domain", "title", "read_url"])
def test_task_token_stands_where_the_answer_begins(render: Render, task: str) -> None:
    found = render([{**HELLO[0], "task": task}, {"role": "assistant", "content": "x"}])
    assert found == f"<｜begin▁of▁sentence｜><｜User｜>Hello<｜{task}｜>x<｜end▁of▁sentence｜>"


def test_unknown_role_and_unknown_task_are_refused(render: Render) -> None:
    with pytest.raises(jinja2.TemplateError):
        render([{"role": "critic", "content": "x"}])
    with pytest.raises(jinja2.TemplateError):
        render([{**HELLO[0], "task": "sing"}], add_generation_prompt=True)


ARGUMENTS: list[Any] = [
    {},
    {"text": ""},
    {"text": 'a "quoted" \\ back\\slash\\\\ \n\t\r\b\f / é 世界 🚀 <&>\''},
    {"n": 12, "x": 0.5, "tiny": 1e-07, "big": 1e22, "neg": -3, "yes": True, "no": False, "nothing": None},
    {"list": [1, "a", [], {}, [None, True], {"k": "v, w: {x}"}], "object": {"a": {"b": ["c"]}}},
    {"colon: comma, {brace}": "[1, 2]", 'quo"te': '}"{'},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=range(len(ARGUMENTS)))
@pytest.mark.parametrize(
    "spell",
    [
        lambda value: value,
        json.dumps,
        lambda value: json.dumps(value, ensure_ascii=False),
        lambda value: json.dumps(value, separators=(",", ":")),
        lambda value: " " + json.dumps(value, indent=2) + "\n",
    ],
    ids=["object", "ascii", "unicode", "compact", "indented"],
)
def test_arguments_read_the_same_in_every_spelling(render: Render, arguments: Any, spell: Callable[..., Any]) -> None:
    call = {"function": {"name": "f", "arguments": spell(arguments)}}
    found = render([{"role": "assistant", "tool_calls": [call]}])
    assert found == f"{BOS}{tool_calls([call])}{EOS}"


def test_arguments_that_are_no_json_object_are_one_parameter(render: Render) -> None:
    call = {"function": {"name": "f", "arguments": "not JSON"}}
    found = render([{"role": "assistant", "tool_calls": [call]}])
    assert '<｜DSML｜parameter name="arguments" string="true">not JSON</｜DSML｜parameter>' in found


# The rules once more, in plain Python: what the template must do for any conversation

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TASKS = ("action", "query", "authority", "domain", "title", "read_url")
TOOLS_TEXT = example(1)[1].partition("## Tools")[2].partition('{"name"')[0]


def tools_section(tools: list[Message]) -> str:
    schemas = "".join(json.dumps(tool["function"], ensure_ascii=False) + "\n" for tool in tools)
    ending = "You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"
    return f"\n\n## Tools{TOOLS_TEXT}{schemas}\n{ending}"


def tool_calls(calls: list[Message]) -> str:
    invocations = []
    for call in calls:
        arguments = call["function"]["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        lines = [
            f'<｜DSML｜parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
            f"{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}</｜DSML｜parameter>"
            for key, value in arguments.items()
        ]
        name = call["function"]["name"]
        invocations.append(f'<｜DSML｜invoke name="{name}">\n' + "\n".join(lines) + "\n</｜DSML｜invoke>")
    return "\n\n<｜DSML｜tool_calls>\n" + "\n".join(invocations) + "\n</｜DSML｜tool_calls>"


def merge_turns(messages: list[Message]) -> list[Message]:
    """Join runs of user and tool messages into user turns; order results by the calls they answer."""
    turns: list[Message] = []
    seats: dict[str, int] = {}
    for message in messages:
        role = message["role"]
        if role not in ("user", "tool"):
            if role == "assistant" and message.get("tool_calls"):
                seats = {call.get("id"): i for i, call in enumerate(message["tool_calls"])}
            turns.append(message)
            continue
        last = turns[-1] if turns else {}
        if last.get("role") != "user" or (role == "user" and last["task"]):
            turns.append({"role": "user", "task": message.get("task") if role == "user" else None, "parts": []})
        seat = seats.get(message.get("tool_call_id", ""), 0) if role == "tool" else None
        turns[-1]["parts"].append((seat, message["content"]))
    for turn in turns:
        if turn["role"] == "user":
            results = iter(sorted((part for part in turn["parts"] if part[0] is not None), key=lambda p: p[0]))
            turn["content"] = "\n\n".join(
                text if seat is None else f"<tool_result>{next(results)[1]}</tool_result>"
                for seat, text in turn["parts"]
            )
    return turns


def last_user(turns: list[Message]) -> int:
    return max((i for i, turn in enumerate(turns) if turn["role"] in ("user", "developer")), default=-1)


def encode(messages: list[Message], thinking: bool, drop: bool) -> str:
    """Return the prompt of a conversation that ends where the answer begins, or after an answer."""
    turns = merge_turns(messages)
    drop = drop and thinking and not any(turn.get("tools") for turn in turns)
    if drop:
        turns = [t for i, t in enumerate(turns) if t["role"] != "developer" or i >= last_user(turns)]
    edge = last_user(turns)
    prompt = BOS
    for i, turn in enumerate(turns):
        role, task = turn["role"], turn.get("task")
        if role == "assistant":
            if thinking and not (i and turns[i - 1].get("task")) and (not drop or i > edge):
                prompt += (turn.get("reasoning_content") or "") + "</think>"
            prompt += (turn.get("content") or "") + (tool_calls(turn["tool_calls"]) if turn.get("tool_calls") else "")
            prompt += EOS
        else:
            prompt += {"system": "", "latest_reminder": "<｜latest_reminder｜>"}.get(role, "<｜User｜>")
            prompt += turn["content"] + (tools_section(turn["tools"]) if turn.get("tools") else "")
        if i + 1 < len(turns) and turns[i + 1]["role"] not in ("assistant", "latest_reminder"):
            continue
        opening = "<think>" if thinking and (not drop or i >= edge) else "</think>"
        if task == "action":
            prompt += f"<｜Assistant｜>{'<think>' if thinking else '</think>'}<｜action｜>"
        elif task:
            prompt += f"<｜{task}｜>"
        elif role in ("user", "developer"):
            prompt += f"<｜Assistant｜>{opening}"
    return prompt


texts = st.sampled_from(["", "a", "two\nlines", '"quoted" \\', "世界<&>'", "{}[]:,", " space "])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**9) | st.sampled_from([0.5, 1e-7, 3.0]) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=5,
)
arguments = st.dictionaries(st.sampled_from(["x", "items", 'k"', "世"]), values, max_size=3)
calls = st.lists(
    st.builds(
        lambda i, value, text: {
            "id": i,
            "type": "function",
            "function": {"name": f"f{i}", "arguments": json.dumps(value, ensure_ascii=text == 1) if text else value},
        },
        st.sampled_from("abc"),
        arguments,
        st.integers(0, 2),
    ),
    max_size=3,
    unique_by=lambda call: call["id"],
)
tools = st.sampled_from([[], [{"type": "function", "function": {"name": "f", "items": {"values": ["'||'", "<é>"]}}}]])


def message(role: str, content: st.SearchStrategy[str | None], **optional: st.SearchStrategy[Any]) -> Any:
    return st.fixed_dictionaries({"role": st.just(role), "content": content}, optional=optional)


messages = st.lists(
    st.one_of(
        message("user", texts, task=st.sampled_from(TASKS)),
        message("tool", texts, tool_call_id=st.sampled_from("abcd")),
        message("assistant", st.none() | texts, tool_calls=calls, reasoning_content=st.none() | texts),
        message("system", texts, tools=tools),
        message("developer", texts, tools=tools),
        message("latest_reminder", texts),
    ),
    min_size=1,
    max_size=8,
)
TEMPLATE = as_transformers_does().from_string(SOURCE)
PLAIN = jinja2.Environment().from_string(SOURCE)


def test_the_plain_rules_give_the_published_prompts() -> None:
    for number, thinking in PUBLISHED:
        context, expected = example(number)
        conversation = [dict(message) for message in context["messages"]]
        conversation[0] |= {"tools": context.get("tools")}
        assert encode(conversation, thinking, drop=True) == expected


@settings(max_examples=400)
@given(conversation=messages, thinking=st.booleans(), drop=st.booleans())
def test_any_conversation_follows_the_rules(conversation: list[Message], thinking: bool, drop: bool) -> None:
    context = {
        "messages": conversation,
        "enable_thinking": thinking,
        "drop_thinking": drop,
        # The rules have no generation prompt after a lone system message or reminder; the template has.
        "add_generation_prompt": conversation[-1]["role"] in ("user", "tool", "developer"),
    }
    expected = encode(conversation, thinking, drop)
    assert TEMPLATE.render(**context) == expected
    assert PLAIN.render(**context) == expected
