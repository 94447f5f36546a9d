"""The package's imports: none runs upwards, and no two packages import each other."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dsv4convert"

# Ground first. A module may import from its own room and from rooms on its own floor or below.
FLOORS = (
    {"errors", "plan", "scale_forms", ""},  # "": the package itself, for its version
    {"formats", "model", "containers"},
    {"checkpoint"},
    {"targets", "engine", "synth"},
    {"verification", "reference", "inspection"},
    {"estimation"},
    {"api"},
    {"html_report"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and room of every import of ours, those inside functions too."""
    package = ("dsv4convert", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            # "from .. import name" imports a room, or a name of the package itself.
            targets = [[*module, alias.name] if module == ["dsv4convert"] else module for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "dsv4convert":
                room = target[1] if len(target) > 1 else ""
                yield node.lineno, room if room in FLOOR else ""


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_runs_upwards(path: Path) -> None:
    room = room_of(path)
    assert room in FLOOR, f"{room} is on no floor"
    # The package's own names are imported lazily: they may come from anywhere.
    if room == "":
        return
    upwards = [f"line {line}: {other}" for line, other in imported_rooms(path) if FLOOR[other] > FLOOR[room]]
    assert not upwards


def test_no_two_packages_import_each_other() -> None:
    edges = {
        (room_of(path), other)
        for path in modules()
        for _, other in imported_rooms(path)
        if room_of(path) != other and "" not in (room_of(path), other)
    }
    reached = dict.fromkeys((room for edge in edges for room in edge), frozenset[str]())
    for _ in reached:  # as many rounds as the longest path can have
        for room, other in edges:
            reached[room] |= {other} | reached[other]
    assert not {room for room in reached if room in reached[room]}


def test_contributing_tells_the_same_floors() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (sentence,) = re.findall(r"The floors, ground first: ([^.]+)\.", text)
    told = [set(re.findall(r"`(\w+)`", floor)) for floor in sentence.split(";")]
    assert told == [floor - {""} for floor in FLOORS if floor != {"__main__"}]


def test_the_engine_loads_no_name_table_and_no_reader_of_checkpoints() -> None:
    program = "import sys, dsv4convert.engine.run; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    ours = {name.split(".")[1] for name in done.stdout.split() if name.startswith("dsv4convert.")}
    assert ours <= {"errors", "plan", "scale_forms", "formats", "containers", "engine"}


def test_no_test_imports_a_conftest_and_no_benchmark_a_test() -> None:
    for path in (*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert "conftest" not in (node.module or ""), path
                assert path.is_relative_to(ROOT / "tests") or (node.module or "").split(".")[0] != "tests", path
