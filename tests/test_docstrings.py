"""Whatever is public says in a docstring what it does, and a function that raises says so."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "dsv4convert"


@cache
def trees() -> dict[str, ast.Module]:
    """Return every module of the package, parsed, by its path."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


Definition = ast.FunctionDef | ast.ClassDef


def public(tree: ast.Module | ast.ClassDef) -> Iterator[Definition]:
    """Yield the public classes, functions and methods, without the signatures of overloads."""
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not any(isinstance(name, ast.Name) and name.id == "overload" for name in node.decorator_list):
            yield node
        if isinstance(node, ast.ClassDef):
            yield from public(node)


def raised(node: ast.AST) -> Iterator[ast.Raise]:
    """Yield what a function itself raises anew, not what a function within it does."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
            yield child
        elif not isinstance(child, ast.FunctionDef):
            yield from raised(child)


def test_what_is_public_has_a_docstring() -> None:
    missing = [name for name, tree in trees().items() if tree.body and not ast.get_docstring(tree)]
    missing += [
        f"{name}: {node.name}" for name, tree in trees().items() for node in public(tree) if not described(node)
    ]
    assert missing == []


def test_a_function_that_raises_says_so() -> None:
    silent = [
        f"{name}: {node.name}"
        for name, tree in trees().items()
        if not name.startswith("cli/")  # the docstrings of commands are their help texts
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and any(raised(node))
        # A twin raises as the codec that its docstring names.
        if "Raise" not in described(node) and not described(node).startswith("Twin of")
    ]
    assert silent == []


def described(node: Definition) -> str:
    return ast.get_docstring(node) or ""
