"""Workers of a cluster that are killed through a whole run from one store into another: the bytes of one machine."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..clusters import INPUT_OUTPUT, SLOW_OPTIONS, close_ray, needs_ray, processes
from .hub_server import Hub
from .store_server import BUCKET, MARK, StoreServer
from .support import Remote, contents, finished
from .test_cluster_source import SOURCE, put_source
from .test_cluster_upload import TARGET, left, without_card

pytest.importorskip("obstore")
pytest.importorskip("moto")

pytestmark = needs_ray

# So long after a worker got its task the first is killed; so many times as long lies between each two that follow, so
# that the run ends on a slow machine too. A task is begun again ten times, then the run is, so often at most.
KILL_SECONDS, KILL_GROWTH, RUNS = 0.7, 1.4, 4
WRITE_SECONDS = 0.2  # that the store takes for a request that writes


class Killer:
    """Kills a worker that has a task, again and again, and calls ``look`` each time."""

    def __init__(self, token: str, look: Callable[[], None]) -> None:
        self._token, self._look = token, look
        self._ending = threading.Event()
        self.killed = 0

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Kill in a thread of its own meanwhile."""
        thread = threading.Thread(target=self._kill)
        thread.start()
        try:
            yield
        finally:
            self._ending.set()
            thread.join()

    def _kill(self) -> None:
        chance = random.Random(0)
        while not self._ending.wait(KILL_SECONDS * KILL_GROWTH**self.killed):
            while not (working := processes(self._token, b"ray::make_file")):
                if self._ending.wait(0.05):
                    return
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(working), signal.SIGKILL)
                self.killed += 1
            self._look()


@pytest.mark.parametrize(
    ("line", "out"),
    [
        (("shard", "{source}", "{out}", "--mp", "4", "--quiet"), "shards"),
        (("hf-to-gguf", "{source}", "{out}", "--max-file-size", "3M", *SLOW_OPTIONS), "model.gguf"),
    ],
    ids=["shards", "split GGUF"],
)
def test_workers_are_killed_again_and_again(
    line: tuple[str, ...],
    out: str,
    store: StoreServer,
    slow: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token = close_ray(monkeypatch)
    remote = Remote(Hub(), tmp_path / "home", store.environment)

    def command(source: object, folder: Path) -> list[str]:
        folder.mkdir()
        return [word.format(source=source, out=folder / out) for word in line]

    source = Path(shutil.copytree(slow, tmp_path / Path(SOURCE).name))  # by which a GGUF calls itself
    assert finished(remote.start(*command(source, tmp_path / "alone"))).code == 0
    made = contents(tmp_path / "alone").items()
    whole = {Path(name).name: content for name, content in made if not name.endswith(".manifest.json")}
    put_source(store, source)
    store.before_upload = lambda number: time.sleep(WRITE_SECONDS)
    wrong: set[str] = set()

    def look() -> None:
        found = without_card(store)
        found.pop(MARK, None)
        wrong.update(name for name, content in found.items() if content != whole.get(name))

    run = [*command(f"s3://{BUCKET}/{SOURCE}", tmp_path / "out"), "--upload", TARGET, "--delete-uploaded"]
    run += ["--workers", "ray:2"]
    killer = Killer(token, look)
    with killer.at_work():
        for number in range(RUNS):
            process = remote.start(*run, *["--resume"][:number])
            _, said = process.communicate(timeout=120)
            if process.returncode == 0:
                break
            assert process.returncode == INPUT_OUTPUT, said
            assert said.endswith("run again with --resume\n")
    assert process.returncode == 0
    assert killer.killed >= 2
    assert wrong == set()
    assert without_card(store) == whole
    assert left(tmp_path / "out") == []
