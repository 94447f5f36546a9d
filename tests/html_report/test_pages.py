"""Pages of reports in a real browser: they render, sort, filter, pass axe-core, and no name in a model is markup."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from dsv4convert.containers.json_object import schema_path
from dsv4convert.html_report.page import without_secrets
from dsv4convert.html_report.tables import MAX_ROWS, table
from dsv4convert.targets.gguf import plan_gguf
from dsv4convert.targets.gguf_tensors import GgufOptions

from ..checkpoints import MakeCheckpoint
from ..command_line import run_cli
from ..engine.plans import interrupt
from ..oracles.safetensors_bytes import RawSafetensors
from .browser import Browser

MORE: dict[str, list[object]] = {
    "shard": ["--mp", 2],
    "repack": ["--experts", "fp8"],
    "mend": ["--drop-draft"],
    "hf_to_gguf": ["--split-max-tensors", 40],
}
CONVERSIONS = ("shard", "dequantize", "requantize", "repack", "mend", "mlx", "maxtext", "merge", "hf_to_gguf")
PAGES = ("inspect", "verify", "verify-manifest", "compare", "estimate", "shard", "repack")
# Pages with a map or a plot; the others have tables alone, and none where nothing is to be told.
DRAWN = ("inspect", "verify", "compare", "estimate", "repack")


@pytest.fixture(scope="module")
def pages(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a page of each command, by the command's name."""
    folder = tmp_path_factory.mktemp("pages")
    source = make_checkpoint()
    gguf = folder / "model.gguf"
    assert run_cli("hf-to-gguf", source, gguf, "--experts", "q8_0", "-q").code == 0
    commands: dict[str, list[object]] = {
        "inspect": ["inspect", source],
        "verify": ["verify", source, gguf],
        "verify-manifest": ["verify", "--manifest", gguf],
        "compare": ["compare", source, gguf, "--random", 8, "--tolerance", 1],
        "estimate": ["estimate", source, "--hardware", "dgx-spark", "--mp", 2],
        "shard": ["shard", source, folder / "shards", "--mp", 2],
        "repack": ["repack", source, folder / "repacked", "--experts", "fp8", "--draft", "split"],
    }
    made = {name: folder / f"{name}.html" for name in commands}
    for name, arguments in commands.items():
        result = run_cli(*arguments, "--report", made[name])
        assert result.code == 0, result.err
    return made


def opened(browser: Browser, page: Path, **look: Any) -> Browser:
    """Show a page, having made sure that it asks for nothing and that nothing complains."""
    browser.show(**look)
    browser.open(page)
    browser.run("new Promise(resolve => requestAnimationFrame(() => resolve(0)))")
    assert browser.complaints == []
    assert browser.requests == [page.resolve().as_uri()]
    return browser


@pytest.mark.parametrize("name", DRAWN)
def test_a_page_shows_pictures_and_tables(name: str, browser: Browser, pages: dict[str, Path]) -> None:
    opened(browser, pages[name])
    assert browser.run("document.querySelectorAll('svg rect').length") > 20
    assert browser.run("document.querySelectorAll('table tbody tr').length") > 20


@pytest.mark.parametrize("name", PAGES)
def test_a_page_tells_where_it_comes_from(name: str, browser: Browser, pages: dict[str, Path]) -> None:
    opened(browser, pages[name])
    text = browser.run("document.body.innerText")
    assert f"dsv4convert {name.partition('-')[0]} " in text
    for told in ("codecs", "Python", "finished", "SHA-256"):
        assert told in text


@pytest.mark.parametrize("name", ["compare", "estimate"])
def test_the_json_of_a_page_keeps_to_its_schema_and_is_that_of_its_digest(
    name: str, tiny: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    arguments = [tiny, tiny, "--random", 4] if name == "compare" else [tiny, "--memory", "1GB"]
    result = run_cli(name, *arguments, "--json", "--report", page)
    assert result.code == 0, result.err
    jsonschema.validate(json.loads(result.out), json.loads(schema_path(f"{name}.schema.json").read_text()))
    assert hashlib.sha256(result.out.encode()).hexdigest() in page.read_text()


def manifested(found: dict[str, Any], out: Path) -> Path:
    """Return what the manifest is named after: the output, or the first file of a split one."""
    return out if out.exists() else Path(found["files"][0]["path"])


@pytest.mark.parametrize("name", CONVERSIONS)
def test_the_page_of_a_conversion_is_made_of_its_json(name: str, tiny: Path, tmp_path: Path) -> None:
    source, out, page = tiny, tmp_path / "out", tmp_path / "page.html"
    if name == "requantize":
        assert run_cli("dequantize", tiny, tmp_path / "floats", "-q").code == 0
        source = tmp_path / "floats"
    if name == "merge":
        (tmp_path / "split").mkdir()
        assert run_cli("hf-to-gguf", tiny, tmp_path / "split", "--max-file-size", "1500K", "-q").code == 0
        source = next((tmp_path / "split").glob("*-00001-of-*.gguf"))
    more = MORE.get(name, [])
    out = out.with_suffix(".gguf") if name in ("merge", "hf_to_gguf") else out
    result = run_cli(name.replace("_", "-"), source, out, *more, "--report", page, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    jsonschema.validate(found, json.loads(schema_path("conversion.schema.json").read_text()))
    assert hashlib.sha256(result.out.encode()).hexdigest() in page.read_text()
    # Every file has the checksum that its manifest has, and the threads wrote all but headers and padding.
    manifest = json.loads((tmp_path / f"{manifested(found, out).name}.manifest.json").read_text())
    named = {str(out / f["name"] if manifest["is_folder"] else tmp_path / f["name"]): f for f in manifest["files"]}
    assert found["checksums"] == {path: file["checksum"] for path, file in named.items()}
    assert {file["path"]: file["bytes"] for file in found["files"]} == {p: f["bytes"] for p, f in named.items()}
    assert 0 < sum(counts[-1] for counts in found["timeline"]["threads"]) <= found["written_bytes"]
    assert all(counts == sorted(counts) for counts in found["timeline"]["threads"])
    assert found["timeline"]["seconds"][0] == 0
    assert {counts[0] for counts in found["timeline"]["threads"]} == {0}
    assert found["timeline"]["seconds"][-1] <= found["seconds"] + 0.001  # rounded to milliseconds
    assert "Rate of threads over time" in page.read_text()
    stored = {name: sum(part["bytes"] for part in found[name]) for name in ("before", "after")}
    assert stored["before"] == json.loads(run_cli("inspect", source, "--json").out)["bytes"]
    assert name == "maxtext" or 0 < stored["after"] <= sum(file["bytes"] for file in found["files"])


def test_a_page_of_a_run_that_went_on_says_what_was_done_before(tiny: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "model.gguf", tmp_path / "page.html"
    interrupt(plan_gguf(tiny, out, GgufOptions()), 20)
    result = run_cli("hf-to-gguf", tiny, out, "--resume", "--report", page, "--json")
    found = json.loads(result.out)
    assert found["resumed_bytes"] > 0
    assert sum(counts[-1] for counts in found["timeline"]["threads"]) <= found["written_bytes"] - found["resumed_bytes"]
    assert "by an earlier run" in page.read_text()


def test_a_dry_run_has_no_page(tiny: Path, tmp_path: Path) -> None:
    result = run_cli("hf-to-gguf", tiny, tmp_path / "out.gguf", "--dry-run", "--report", tmp_path / "page.html")
    assert result.code == 2
    assert "--report and --dry-run exclude each other" in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["out/page.html", "out-draft/page.html"])
def test_the_page_of_a_conversion_lies_in_no_output(place: str, tiny: Path, tmp_path: Path) -> None:
    result = run_cli("dequantize", tiny, tmp_path / "out", "--draft", "split", "--report", tmp_path / place)
    assert result.code == 2
    assert "would lie in the output" in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_page_is_no_file_of_the_source(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    (source / "page.html").write_text("theirs")
    recipe = tmp_path / "recipe.html"
    recipe.write_text('experts = "q8_0"\n')
    for page in (source / "page.html", recipe):
        result = run_cli(
            "hf-to-gguf", source, tmp_path / "out.gguf", "--recipe", recipe, "--report", page, "--overwrite"
        )
        assert result.code == 2, result.err
    assert (source / "page.html").read_text() == "theirs"
    assert not (tmp_path / "out.gguf").exists()


def test_a_conversion_page_compares_families_and_draws_every_thread(browser: Browser, pages: dict[str, Path]) -> None:
    opened(browser, pages["repack"])
    titles = set(browser.run("[...document.querySelectorAll('h2')].map(h => h.textContent)"))
    assert {"Map by type", "Bytes before and after", "Files", "Threads"} <= titles
    families = column(browser, "Families before and after", 0)
    before, after = (column(browser, "Families before and after", number) for number in (1, 2))
    experts = families.index("routed experts")
    assert float(after[experts]) > 1.5 * float(before[experts])  # FP4 to FP8


def test_an_estimate_page_shows_what_each_rank_and_operator_takes(browser: Browser, pages: dict[str, Path]) -> None:
    opened(browser, pages["estimate"])
    assert column(browser, "Ranks", 0) == ["0", "1"]
    titles = browser.run("[...document.querySelectorAll('h2')].map(h => h.textContent)")
    assert {"Each device, against its 121 GB", "GGUF by recipe", "Times", "Map by type"} <= set(titles)
    assert ">draft<" in pages["estimate"].read_text()
    assert "draft draft" not in pages["estimate"].read_text()
    assert [title for title in titles if title.startswith("Operators of ")][:2] != []


def test_a_comparison_page_has_a_cell_for_every_layer_and_sub_block(browser: Browser, pages: dict[str, Path]) -> None:
    opened(browser, pages["compare"])
    drawn = "[...document.querySelectorAll('svg.plot rect title')].map(t => t.textContent.split(':')[0])"
    cells = browser.run(drawn)
    layers, blocks, agreed = (column(browser, "Sub-blocks", number) for number in (0, 1, 7))
    told = [(n, b) for n, b, share in zip(layers, blocks, agreed, strict=True) if n and not share]
    assert sorted(cells) == sorted(f"{block}, layer {layer}" for layer, block in told)


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(
    "look",
    [{"dark": False}, {"dark": True}, {"dark": True, "width": 360, "height": 740}, {"media": "print"}],
    ids=["light", "dark", "phone", "print"],
)
def test_a_page_passes_axe(name: str, look: dict[str, Any], browser: Browser, axe: str, pages: dict[str, Path]) -> None:
    opened(browser, pages[name], **look)
    browser.run(axe + "; 0")
    found = browser.run("axe.run().then(r => ({violations: r.violations, passes: r.passes.length}))")
    told = [(v["id"], [node["html"][:200] for node in v["nodes"]][:3]) for v in found["violations"]]
    assert told == []
    assert found["passes"] > 10
    # Nothing but what scrolls by itself is wider than the window.
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_light_and_a_dark_page_differ(browser: Browser, pages: dict[str, Path]) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    assert opened(browser, pages["inspect"]).run(colour) == "rgb(255, 255, 255)"
    assert opened(browser, pages["inspect"], dark=True).run(colour) == "rgb(21, 24, 28)"
    assert opened(browser, pages["inspect"], dark=True, media="print").run(colour) == "rgb(255, 255, 255)"


SECTION = "[...document.querySelectorAll('section.table')].find(s => s.querySelector('h2').textContent === {title!r})"


def column(browser: Browser, title: str, number: int) -> list[str]:
    """Return the cells of a column of the table under a title, of the rows that are shown."""
    rows = f"[...{SECTION.format(title=title)}.querySelectorAll('tbody tr')].filter(r => !r.hidden)"
    found: list[str] = browser.run(f"{rows}.map(r => r.cells[{number}].dataset.value ?? r.cells[{number}].textContent)")
    return found


def press(browser: Browser, title: str, number: int) -> str:
    """Press the heading of a column and return how the column says that it is sorted."""
    section = SECTION.format(title=title)
    browser.run(f"{section}.querySelectorAll('th button')[{number}].click()")
    order: str = browser.run(f"{section}.querySelectorAll('th')[{number}].getAttribute('aria-sort')")
    return order


def test_a_table_sorts_numbers_by_value_and_words_by_letters(browser: Browser, pages: dict[str, Path]) -> None:
    opened(browser, pages["inspect"])
    before = sorted(float(value) for value in column(browser, "Families", 2))
    assert press(browser, "Families", 2) == "ascending"
    assert [float(value) for value in column(browser, "Families", 2)] == before
    assert press(browser, "Families", 2) == "descending"
    assert [float(value) for value in column(browser, "Families", 2)] == before[::-1]
    assert press(browser, "Families", 0) == "ascending"
    names = column(browser, "Families", 0)
    assert names == sorted(names)
    assert len(names) == len(before)
    assert browser.complaints == []


def test_a_table_filters_by_words(browser: Browser, pages: dict[str, Path]) -> None:
    opened(browser, pages["verify"])
    title = "Tensors that are not exact"
    everything = column(browser, title, 0)
    section = SECTION.format(title=title)

    def typed(text: str) -> list[str]:
        field = f"{section}.querySelector('input')"
        browser.run(f"{field}.value = {json.dumps(text)}; {field}.dispatchEvent(new Event('input')); 0")
        return column(browser, title, 0)

    assert typed("Q8_0 blk.1.") == [name for name in everything if name.startswith("blk.1.")]
    assert 0 < len(typed("blk.1.")) < len(everything)
    assert browser.run(f"{section}.querySelector('output').textContent").endswith(f" of {len(everything)} rows")
    assert typed("no such tensor") == []
    assert typed("") == everything
    assert browser.complaints == []


def test_a_long_table_ends_and_says_so() -> None:
    made = str(table("Many", ("number",), [(number,) for number in range(MAX_ROWS + 5)]))
    assert made.count("<tr>") == MAX_ROWS + 1
    assert "5 more rows are in the JSON" in made


# ---- what is hostile ----------------------------------------------------------------------------------

INJECTIONS = (
    "</script><script>window.hacked=1</script>",
    "</title></head><body onload=window.hacked=1>",
    '"><img src=x onerror=window.hacked=1>',
    "' onmouseover='window.hacked=1",
    "</svg><iframe srcdoc='<script>parent.hacked=1</script>'>",
    "<style>*{display:none}</style>",
    "<!--",
    "javascript:window.hacked=1",
    "\u202egnp.exe\x1b[31m\x00",
)
FOLDER = "a\"><img src=x onerror=window.hacked=1><b onmouseover='window.hacked=1'>"


@pytest.fixture
def hostile(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """Return a checkpoint with names and texts that want to be markup, in a folder of such a name."""
    source = Path(shutil.copytree(make_checkpoint(), tmp_path / FOLDER))
    first = sorted(source.glob("*.safetensors"))[0]
    raw = RawSafetensors.read(first)
    small = next(tensor for tensor in raw.tensors.values() if len(tensor.data) < 5000)
    for text in INJECTIONS:
        raw.tensors[f"layers.0.{text}"] = small
    raw.write(first)
    (source / "model.safetensors.index.json").unlink(missing_ok=True)
    card = "\n".join(
        f"{key}: {json.dumps(text)}" for key, text in zip(("license", "library_name"), INJECTIONS[:2], strict=True)
    )
    (source / "README.md").write_text(f"---\n{card}\n---\n# {INJECTIONS[0]}\n")
    return source


def assert_harmless(browser: Browser, page: Path) -> str:
    """Make sure that a page has no element and runs nothing that a name brought in; return its text."""
    opened(browser, page)
    assert browser.run("typeof window.hacked") == "undefined"
    assert browser.run("document.scripts.length") == 1
    assert browser.run("document.querySelectorAll('img, iframe, body b, link, base, form, main style').length") == 0
    handlers = "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames()).filter(n => n.startsWith('on'))"
    assert browser.run(handlers) == []
    assert browser.run("getComputedStyle(document.querySelector('h1')).display") == "block"
    text: str = browser.run("document.body.textContent")
    return text


def test_names_in_a_checkpoint_are_text(browser: Browser, hostile: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run_cli("inspect", hostile, "--index", "headers", "--report", page).code == 0
    text = assert_harmless(browser, page)
    assert FOLDER in text
    for injection in INJECTIONS[:-1]:
        assert f"layers.0.{injection}" in text
    assert "\\u202egnp.exe\\x1b[31m\\x00" in text


def test_names_in_a_verification_are_text(browser: Browser, hostile: Path, tiny: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = run_cli("verify", tiny, hostile, "--report", page)
    assert result.code != 0
    text = assert_harmless(browser, page)
    assert "the output differs from the source" in text
    for injection in INJECTIONS[:-1]:
        assert injection in text


@pytest.mark.parametrize("name", ["compare", "estimate", "verify-manifest", "conversion"])
def test_the_name_of_a_folder_is_text(name: str, browser: Browser, tiny: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny, tmp_path / FOLDER))
    made = tmp_path / (FOLDER + ".made")
    page = tmp_path / "page.html"
    if name == "verify-manifest":
        assert run_cli("dequantize", source, made, "-q").code == 0
        (made / f"{INJECTIONS[2]} {INJECTIONS[3]}".replace("/", "")).touch()
    commands: dict[str, list[object]] = {
        "compare": ["compare", source, source, "--random", 4],
        "estimate": ["estimate", source],
        "verify-manifest": ["verify", "--manifest", made],
        "conversion": ["dequantize", source, made],
    }
    result = run_cli(*commands[name], "--report", page)
    assert (result.code == 0) == (name != "verify-manifest"), result.err
    assert FOLDER in assert_harmless(browser, page)


@pytest.mark.parametrize(
    ("argument", "cut"),
    [
        ("https://me:pass@models.example/x", "https://…@models.example/x"),
        ("https://me:p@ss@models.example/x", "https://…@models.example/x"),
        ("s3://bucket/x?X-Amz-Signature=abc&y=1", "s3://bucket/x?…"),
        ("https://models.example/x#abc", "https://models.example/x?…"),
        ("--token=abc", "--token=…"),
        ("hf_abcdefghijkl", "hf_…"),
        ("hf://OWNER/NAME@main/part", "hf://OWNER/NAME@main/part"),
        ("--tokens=1,2", "--tokens=1,2"),
        ("a?b#c@d", "a?b#c@d"),
    ],
)
def test_no_secret_of_the_command_line_is_shown(argument: str, cut: str) -> None:
    assert without_secrets(["x", argument]) == ["x", cut]
    assert without_secrets(["--token", argument, "x"]) == ["--token", "…", "x"]


def test_the_policy_stops_a_script_that_got_in_all_the_same(
    browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    injected = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1><style>h1{display:none}</style>"
    page.write_text(pages["inspect"].read_text().replace("</main>", injected + "</main>"))
    browser.show()
    browser.open(page)
    browser.run("new Promise(resolve => setTimeout(() => resolve(0), 100))")
    assert browser.run("document.scripts.length") == 2
    assert browser.run("typeof window.hacked") == "undefined"
    assert browser.run("getComputedStyle(document.querySelector('h1')).display") == "block"
    assert browser.complaints


# ---- the file -----------------------------------------------------------------------------------------


def test_a_page_replaces_nothing_unasked(tiny: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("mine")
    result = run_cli("inspect", tiny, "--report", page)
    assert (result.code, page.read_text()) == (9, "mine")
    assert "already exists; pass --overwrite" in result.error
    result = run_cli("dequantize", tiny, tmp_path / "out", "--report", page)
    assert (result.code, page.read_text()) == (9, "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html"]
    assert run_cli("inspect", tiny, "--report", page, "--overwrite").code == 0
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html"]


def test_what_a_killed_run_left_of_a_page_is_told_before_the_work(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html.partial").touch()
    for command in (["verify", tiny, tmp_path / "no.gguf", "--report"], ["inspect", tiny, "--report"]):
        result = run_cli(*command, tmp_path / "page.html")
        assert result.code == 9
        assert f"{tmp_path}/page.html.partial: already exists; move that file away" in result.error


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("page.txt", "--report: not the name of a page"),
        ("absent/page.html", "output folder is missing"),
        ("folder.html", "already exists and is not a file"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_at_once(name: str, says: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.html").mkdir()
    result = run_cli("verify", tiny, tmp_path / "no.gguf", "--report", tmp_path / name)
    assert says in result.error


def test_a_page_does_not_replace_the_model(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.html"
    assert run_cli("hf-to-gguf", tiny, tmp_path / "model.gguf", "-q").code == 0
    (tmp_path / "model.gguf").rename(model)
    before = model.read_bytes()
    result = run_cli("inspect", model, "--report", model, "--overwrite")
    assert result.code == 2
    assert "the output would replace a file of the source" in result.error
    assert model.read_bytes() == before


def test_a_page_does_not_lie_in_the_folder_that_is_verified(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, out, link = make_checkpoint(), tmp_path / "out", tmp_path / "link"
    assert run_cli("dequantize", source, out, "-q").code == 0
    link.symlink_to(out)
    for folder in (out, link):
        result = run_cli("verify", source, out, "--report", folder / "page.html")
        assert result.code == 2
        assert "the page would lie in the output" in result.error
    assert run_cli("verify", "--manifest", out).code == 0


def test_a_failed_verification_has_its_page(editable: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    other = editable(seed=1)
    page = tmp_path / "page.html"
    result = run_cli("verify", tiny, other.folder, "--report", page)
    assert result.code != 0
    assert "the output differs from the source" in page.read_text()
