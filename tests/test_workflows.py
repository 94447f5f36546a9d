"""Workflows, tasks and issue forms name the same Python versions, sessions and variables as the project."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsv4convert.formats.backend import COMPILED_VARIABLE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(set((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) - {ROOT / ".github/ISSUE_TEMPLATE/config.yml"})
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def nox_sessions() -> set[str]:
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("session" in ast.unparse(d) for d in node.decorator_list)
    }


def supported_versions() -> list[str]:
    prefix = "Programming Language :: Python :: 3."
    return ["3." + line.removeprefix(prefix) for line in PROJECT["classifiers"] if line.startswith(prefix)]


def test_the_matrix_has_every_supported_python_with_and_without_the_compiled_library() -> None:
    job = load(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["test"]
    assert job["strategy"]["matrix"] == {"python": supported_versions(), "compiled": ["1", "0"]}
    assert job["env"][COMPILED_VARIABLE] == "${{ matrix.compiled }}"
    assert PROJECT["requires-python"] == f">={supported_versions()[0]}"


def test_nox_has_the_same_versions_and_variable() -> None:
    text = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    constants = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert list(constants["PYTHONS"]) == supported_versions()
    assert constants["COMPILED_VARIABLE"] == COMPILED_VARIABLE
    assert {"test", "lint", "bench", "docs", "wheels"} <= nox_sessions()


def test_ci_has_the_versions_of_other_programs_that_nox_and_contributing_have() -> None:
    ci, nox, contributing = (
        (ROOT / name).read_text(encoding="utf-8") for name in (".ci/run", "noxfile.py", "CONTRIBUTING.md")
    )
    installed = re.findall(r"(?:maxtext==|azurite@|wrapper==)([\d.]+)", ci)
    assert sorted(installed) == sorted(re.findall(r'"(\d+\.\d+\.\d+)"', nox))
    axe = re.compile(r"axe-core@([\d.]+)")
    assert axe.findall(ci) == axe.findall(contributing)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_tasks_that_exist_with_few_rights_and_a_time_limit(path: Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 60
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            if "uses" in step:
                assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
            elif step["run"].startswith("nox"):
                assert re.fullmatch(r"nox -s (\w+)", step["run"]).group(1) in nox_sessions()  # type: ignore[union-attr]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_have_fields_with_names_of_their_own(path: Path) -> None:
    form = load(path)
    assert form.keys() == {"name", "description", "labels", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 0
    assert all(field["attributes"]["label"] for field in fields)


def test_every_page_is_in_the_site() -> None:
    listed = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= set(listed)
