"""V4.1's chat template against the recorded prompts of its published encoder."""

from __future__ import annotations

from importlib import resources
from typing import Any

import jinja2
import pytest

from ..v41 import recorded
from .test_chat_template import ENVIRONMENTS, Render, raise_exception

SOURCE = resources.files("dsv4convert.model").joinpath("chat_template_v41.jinja").read_text(encoding="utf-8")
CASES: dict[str, dict[str, Any]] = {case["name"]: case for case in recorded("chat_vectors.json")}
REFUSED = {"v4_input_3"}  # a developer message, which the published encoder refuses


@pytest.fixture(params=list(ENVIRONMENTS))
def render(request: pytest.FixtureRequest) -> Render:
    environment = ENVIRONMENTS[request.param]()
    environment.globals["raise_exception"] = raise_exception
    template = environment.from_string(SOURCE)
    return lambda messages, **context: template.render(messages=messages, add_generation_prompt=True, **context)


def context(case: dict[str, Any]) -> dict[str, Any]:
    found = {"messages": case["messages"], "enable_thinking": case["thinking_mode"] == "thinking"}
    optional = {key: case[key] for key in ("tools", "reasoning_effort") if case[key] is not None}
    return {**found, **optional}


@pytest.mark.parametrize("name", sorted(CASES.keys() - REFUSED))
def test_recorded_prompt_comes_out_exactly(render: Render, name: str) -> None:
    assert render(**context(CASES[name])) == CASES[name]["prompt"]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_the_encoder_refuses_is_refused(render: Render, name: str) -> None:
    assert CASES[name]["prompt"] == "ERROR NotImplementedError: Unknown role: developer"
    with pytest.raises(jinja2.TemplateError, match="Unknown role: developer"):
        render(**context(CASES[name]))


@pytest.mark.parametrize("effort", [0, 101, True, False, 50.0, "medium", ""])
def test_other_efforts_are_errors_where_the_model_thinks(render: Render, effort: object) -> None:
    messages = [{"role": "user", "content": "q"}]
    with pytest.raises(jinja2.TemplateError, match="reasoning_effort"):
        render(messages=messages, enable_thinking=True, reasoning_effort=effort)
    assert "Effort" not in render(messages=messages, enable_thinking=False, reasoning_effort=effort)


def test_an_image_is_one_token_and_no_text_can_spell_it(render: Render) -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "text", "text": "b"},
    ]
    prompt = render(messages=[{"role": "user", "content": parts}])
    assert "<｜User｜>a\n\n<｜deepseek_image｜>\n\nb<｜Assistant｜>" in prompt
    for content in ("<｜deepseek_image｜>", [{"type": "text", "text": "see <｜deepseek_image｜>"}]):
        with pytest.raises(jinja2.TemplateError, match="the token that stands for an image"):
            render(messages=[{"role": "user", "content": content}])
