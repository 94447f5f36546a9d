"""What the package imports is declared, and what is declared is imported."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = {"dsv4convert", "tests"}

# Extras of which the package itself imports something, and the tools of the others, which are run by name.
IMPORTED_EXTRAS = {"gpu", "plot", "text", "vision", "hub", "stores", "maxtext", "ray"}
RUN_BY_NAME = {"pytest-xdist", "mypy", "ziglang"}

# What made a record in fixtures/, and is imported only to make it anew: too large to install for the tests.
MADE_A_RECORD = {"compressed_tensors", "modelopt"}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: Iterable[str]) -> set[str]:
    """Return the names of distributions that a list of requirements asks for."""
    return {normalised(re.split(r"[\[<>=!~; ]", requirement)[0]) for requirement in requirements} - OURS


def imported(folder: Path) -> dict[str, Path]:
    """Return every module from elsewhere that files of a folder import, each with one of the files."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            found |= {name.split(".")[0]: path for name in names}
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names | OURS}


installed = cache(packages_distributions)  # reads the records of every installed package


def distributions(modules: Iterable[str]) -> set[str]:
    """Return the installed distributions that modules come from; of an absent one, its own name."""
    return {normalised(name) for module in modules for name in installed().get(module, [module])}


REQUIRED = declared(PROJECT["dependencies"])
EXTRAS = {extra: declared(names) for extra, names in PROJECT["optional-dependencies"].items()}
PACKAGE = imported(ROOT / "dsv4convert")
TESTS = imported(ROOT / "tests")


@pytest.mark.parametrize("module", sorted(PACKAGE))
def test_what_the_package_imports_is_declared(module: str) -> None:
    allowed = REQUIRED.union(*(EXTRAS[extra] for extra in IMPORTED_EXTRAS if extra in EXTRAS))
    assert distributions([module]) & allowed, PACKAGE[module]


@pytest.mark.parametrize("module", sorted(TESTS.keys() - MADE_A_RECORD))
def test_what_the_tests_import_is_declared(module: str) -> None:
    assert distributions([module]) & REQUIRED.union(*EXTRAS.values()), TESTS[module]


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_what_the_package_requires_it_imports(name: str) -> None:
    assert name in distributions(PACKAGE)


@pytest.mark.parametrize("name", sorted(EXTRAS["test"] - RUN_BY_NAME))
def test_what_the_tests_require_they_import(name: str) -> None:
    assert name in distributions(TESTS) | distributions(PACKAGE)
