"""A real browser for tests: Debian's chromium without a window, spoken to over two pipes in DevTools' protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Where another chromium than that of PATH is, and where axe-core's script is.
CHROMIUM_VARIABLE, AXE_VARIABLE = "DSV4CONVERT_CHROMIUM", "DSV4CONVERT_AXE"
# Set where the tests of pages must run, such as in .ci/run: without a browser they then fail.
REQUIRED_VARIABLE = "DSV4CONVERT_BROWSER_TESTS"

SECONDS = 30
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # which root cannot have
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--hide-scrollbars",
)


def chromium() -> str | None:
    """Return chromium's program, None without one."""
    return os.environ.get(CHROMIUM_VARIABLE) or shutil.which("chromium") or shutil.which("chromium-browser")


def axe_script() -> Path | None:
    """Return axe-core's script, None without it."""
    path = os.environ.get(AXE_VARIABLE)
    return Path(path) if path and Path(path).is_file() else None


class Browser:
    """A browser with one page; ``complaints`` are the console's errors and warnings, and exceptions, since it began."""

    def __init__(self, process: subprocess.Popen[bytes], writing: int, reading: int) -> None:
        self._process, self._writing, self._reading = process, writing, reading
        self._number = 0
        self._received = b""
        self._session: str | None = None
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of DevTools' protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self._note(answer)

    def open(self, path: Path) -> None:
        """Show a file, and wait until it is loaded."""
        self.complaints, self.requests = [], []
        self.call("Page.navigate", url=path.resolve().as_uri())
        while (event := self._next()).get("method") != "Page.loadEventFired":
            self._note(event)

    def run(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, awaited where it is a promise."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def show(self, *, width: int = 1200, height: int = 900, dark: bool = False, media: str = "screen") -> None:
        """Set the window's size, whether the reader prefers dark pages, and the medium: screen or print."""
        is_phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=is_phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def _note(self, event: dict[str, Any]) -> None:
        """Keep what the console was told, and what was asked for."""
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]))
        elif event.get("method") == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(parameters["args"]))
        elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.complaints.append(str(parameters["entry"]["text"]))
        elif event.get("method") == "Network.requestWillBeSent":
            self.requests.append(str(parameters["request"]["url"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            content = os.read(self._reading, 2**20)
            assert content, f"the browser ended with {self._process.poll()}"
            self._received += content
        message, _, self._received = self._received.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        return decoded

    def close(self) -> None:
        """End the browser."""
        with suppress(OSError):
            os.write(self._writing, b'{"id": 0, "method": "Browser.close"}\0')
        try:
            self._process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._writing)
        os.close(self._reading)


@contextmanager
def started(program: str) -> Iterator[Browser]:
    """Start a browser, and end it afterwards."""
    to_browser, from_browser = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The browser reads from descriptor 3 and writes to 4: a shell puts the pipes there.
        script = f'exec "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
        command = ["bash", "-c", script, "bash", program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            command,
            pass_fds=(to_browser[0], from_browser[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": profile},
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        browser = Browser(process, to_browser[1], from_browser[0])
        try:
            yield browser
        finally:
            browser.close()
