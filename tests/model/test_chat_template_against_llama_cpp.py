"""The chat template in llama.cpp's own Jinja engine, bare and through the front end of its server."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from ..oracles.llama_cpp import llama_cpp_folder
from .test_chat_template import ARGUMENTS, FIXTURES, HELLO, PUBLISHED, TEMPLATE, example, with_object_arguments
from .test_chat_template_v41 import CASES, REFUSED, context

pytestmark = pytest.mark.llama

RenderAll = Callable[..., list[str]]
LIBRARIES = ("llama-common", "llama", "ggml", "ggml-base")


@pytest.fixture(scope="module")
def render_all(tmp_path_factory: pytest.TempPathFactory) -> RenderAll:
    """Return a function that renders requests; the program behind it is built against the installed wheel."""
    import llama_cpp

    folder = tmp_path_factory.mktemp("render_chat")
    program, requests_path = folder / "render_chat", folder / "requests.json"
    libraries = Path(llama_cpp.__file__).parents[1] / "lib"
    source = llama_cpp_folder()
    includes = [source / "common", source / "include", source / "ggml" / "include", source / "vendor"]
    subprocess.run(
        ["g++", "-std=c++17", "-O0", str(Path(__file__).with_name("render_chat.cpp")), "-o", str(program),
         *(f"-I{path}" for path in includes), f"-L{libraries}", *(f"-l{name}" for name in LIBRARIES),
         "-Wl,--allow-shlib-undefined"],
        check=True,
    )  # fmt: skip

    def render(requests: list[dict[str, Any]], name: str = "chat_template.jinja") -> list[str]:
        requests_path.write_text(json.dumps(requests), encoding="utf-8")
        with resources.as_file(resources.files("dsv4convert.model") / name) as template:
            done = subprocess.run(
                [str(program), str(template), str(requests_path)],
                check=True,
                capture_output=True,
                env={**os.environ, "LD_LIBRARY_PATH": str(libraries)},
            )
        texts: list[str] = json.loads(done.stdout)
        return texts

    return render


def published(number: int, thinking: bool, generate: bool) -> dict[str, Any]:
    return {**example(number)[0], "enable_thinking": thinking, "add_generation_prompt": generate}


def test_published_prompts_come_out_exactly(render_all: RenderAll) -> None:
    contexts, expected = [], []
    for number, thinking in PUBLISHED:
        for generate in (False, True):
            context = published(number, thinking, generate)
            contexts += [context, context | {"messages": with_object_arguments(context["messages"])}]
            expected += [example(number)[1]] * 2
    assert len(contexts) == 4 * len(PUBLISHED) == 4 * len(list(FIXTURES.glob("input_*.json")))
    assert render_all([{"context": context} for context in contexts]) == expected


def test_recorded_prompts_of_v41_come_out_exactly(render_all: RenderAll) -> None:
    cases = [CASES[name] for name in sorted(CASES.keys() - REFUSED)]
    requests = [{"context": {**context(case), "add_generation_prompt": True}} for case in cases]
    assert render_all(requests, "chat_template_v41.jinja") == [case["prompt"] for case in cases]


@pytest.mark.parametrize("effort", [0, 101, True, 50.5, "medium"])
def test_efforts_that_v41_does_not_have_are_errors(render_all: RenderAll, effort: object) -> None:
    request = {"messages": [{"role": "user", "content": "q"}], "enable_thinking": True, "reasoning_effort": effort}
    (found,) = render_all([{"context": request}], "chat_template_v41.jinja")
    assert found.startswith("ERROR")
    assert "reasoning_effort" in found


def conversations() -> list[dict[str, Any]]:
    """Return contexts that visit every rule: results out of order, tasks, turns that merge, dropped thoughts."""
    calls = [
        {"id": name, "type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments in zip("abcdef", ARGUMENTS, strict=True)
    ]
    exchange = [
        {"role": "system", "content": "S"},
        {"role": "developer", "content": "D"},
        *HELLO,
        {"role": "assistant", "reasoning_content": "R1", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c", "content": "C"},
        {
            "role": "tool",
            "tool_call_id": "a",
            "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "A2"}],
        },
        {"role": "user", "content": "and"},
        {"role": "user", "content": "so"},
        {"role": "latest_reminder", "content": "L"},
        {"role": "assistant", "reasoning_content": "R2", "content": "x"},
        {"role": "user", "content": "q", "task": "query"},
        {"role": "user", "content": "r", "task": "action"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "items": {"values": ["'<é>'", 1.5, None, True]}}}]
    generate = {"add_generation_prompt": True}
    return [
        {"messages": exchange[:end], "enable_thinking": thinking, "drop_thinking": drop, **extra, **generate}
        for end in range(1, len(exchange) + 1)
        for thinking in (False, True)
        for drop in (False, True)
        for extra in ({}, {"tools": tools})
    ]


def test_other_conversations_come_out_as_in_jinja2(render_all: RenderAll) -> None:
    contexts = conversations()
    found = render_all([{"context": context} for context in contexts])
    assert found == [TEMPLATE.render(**context) for context in contexts]


def test_server_front_end_gives_the_published_prompts_that_it_can_pass_on(render_all: RenderAll) -> None:
    # It takes the OpenAI form: examples 3 and 4 need developer messages with tools, and tasks.
    numbers = [(number, thinking) for number, thinking in PUBLISHED if number in (1, 2)]
    found = render_all([{"chat": published(number, thinking, True)} for number, thinking in numbers])
    assert found == [example(number)[1] for number, _ in numbers]


def test_what_the_engine_cannot_spell_is_refused(render_all: RenderAll) -> None:
    call = {"function": {"name": "f", "arguments": '{"x": "\\u4e16"}'}}
    (found,) = render_all([{"context": {"messages": [{"role": "assistant", "tool_calls": [call]}]}}])
    assert found.startswith("ERROR")
    assert "give the arguments of tool calls as an object" in found
