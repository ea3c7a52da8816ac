"""A headless Chromium, driven over its DevTools pipe: opens a page, presses keys, evaluates expressions."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REQUIRE = "MOE_HARNESS_REQUIRE_BROWSER"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
)  # fmt: skip
KEYS = {
    "Tab": 9, "Enter": 13, "Escape": 27, "Space": 32, "End": 35, "Home": 36,
    "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40,
}  # fmt: skip


def binary() -> str:
    """The browser's path. Without a browser the test skips, or fails if REQUIRE is set."""
    name = os.environ.get("CHROMIUM")
    path = shutil.which(name) if name else next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        reason = f"no browser: CHROMIUM={name!r} is none" if name else f"no browser: none of {', '.join(NAMES)}"
        if os.environ.get(REQUIRE) == "1":
            pytest.fail(f"{reason}, and {REQUIRE}=1 requires one")
        pytest.skip(reason)
    return path


class Browser:
    """One browser process with one page at a time."""

    def __init__(self, patience: float = 60.0) -> None:
        self.patience = patience  #: seconds that an answer may take
        self.profile = tempfile.mkdtemp(prefix="moe-harness-chromium-")
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        # The protocol uses the file descriptors 3 and 4.
        shell = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, binary(), *FLAGS, f"--user-data-dir={self.profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
        os.close(self._to)
        os.close(self._from)
        shutil.rmtree(self.profile, ignore_errors=True)

    # -- the protocol -------------------------------------------------------------------------------------------------
    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command; its result. Events that come before it are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._to, data) :]

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + self.patience
        while b"\0" not in self._buffer:
            if not select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"the browser said nothing for {self.patience:g} s")
            found = os.read(self._from, 1 << 20)
            if not found:
                raise RuntimeError(f"the browser ended, exit code {self.process.wait(timeout=30)}")
            self._buffer += found
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    # -- a page -------------------------------------------------------------------------------------------------------
    def open(self, path: Path, fragment: str = "", width: int = 1400, scheme: str = "light") -> None:
        """A page of its own for this file, drawn to the end."""
        self._session, self.events = "", []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.show(width, scheme)
        self.send("Page.navigate", url=path.resolve().as_uri() + fragment)
        self.wait("document.documentElement?.dataset.ready === 'yes'")

    def show(self, width: int = 1400, scheme: str = "light", height: int = 1000) -> None:
        """The window's size and the system's colour scheme."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited; RuntimeError if it throws."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until the expression is true."""
        deadline = time.monotonic() + self.patience
        while not self.ask(f"Boolean({condition})"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"never true: {condition}; {self.complaints()}")
            time.sleep(0.05)

    def press(self, *keys: str, shift: bool = False) -> None:
        """Keys of the keyboard, one after the other: names of KEYS."""
        for key in keys:
            text = {"Enter": "\r", "Space": " "}.get(key)
            name = " " if key == "Space" else key
            same = {"key": name, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 if shift else 0}
            pressed = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
            self.send("Input.dispatchKeyEvent", **pressed, **same)
            self.send("Input.dispatchKeyEvent", type="keyUp", **same)

    def complaints(self) -> list[str]:
        """What the page wrote to the console as warnings and errors, threw, or asked of the network."""
        self.ask("0")  # whatever was on its way is here then
        found = []
        for event in self.events:
            kind, told = event.get("method"), event.get("params", {})
            if kind == "Runtime.exceptionThrown":
                found.append(str(told["exceptionDetails"].get("exception", {}).get("description")))
            elif kind == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
                found.append(f"{told['type']}: {[a.get('value') for a in told['args']]}")
            elif kind == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
                found.append(told["entry"]["text"])
            elif kind == "Network.requestWillBeSent" and not told["request"]["url"].startswith("file:"):
                found.append(f"request: {told['request']['url']}")
        return found

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """A picture of the window, or of the whole page."""
        found = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))
