"""Chromium without a window, driven over two pipes by its DevTools protocol.

No driver and no library is needed, and nothing listens on a port.
"""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
    "--disable-background-networking", "--remote-debugging-pipe",
)  # fmt: skip


def find_chromium() -> str | None:
    """Its path, where it is installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Tab:
    """A page, with everything that the browser has told of it."""

    def __init__(self, commands: int, answers: int):
        self._commands, self._answers = commands, answers
        self._number, self._rest = 0, b""
        self._session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def open(self, path: Path, width: int) -> None:
        """Loads a file at a width, and waits until it is whole."""
        self.events.clear()
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self.send("Page.navigate", url=path.as_uri())
        while not self.told("Page.loadEventFired"):
            self.events.append(self._receive())

    def told(self, method: str) -> list[dict[str, Any]]:
        """What events of a kind said."""
        return [one["params"] for one in self.events if one.get("method") == method]

    def value(self, expression: str) -> Any:
        """What an expression is within the page."""
        answer = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True
        )
        return answer["result"]["value"]

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to a command."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        os.write(self._commands, json.dumps(command | self._session).encode() + b"\0")
        while True:
            message = self._receive()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            read = os.read(self._answers, 1 << 16)
            assert read, "The browser has ended."
            self._rest += read
        first, self._rest = self._rest.split(b"\0", 1)
        return json.loads(first)


@contextmanager
def browser(executable: str, profile: Path) -> Iterator[Tab]:
    """A tab of a new browser, which ends with the context."""
    pipes = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for _ in range(2) for end in _pipe()]
    own, theirs = (pipes[1], pipes[2]), (pipes[0], pipes[3])
    command = f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}'
    arguments = [executable, *FLAGS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        ["bash", "-c", command, "bash", *arguments],
        pass_fds=theirs,
        stderr=subprocess.DEVNULL,
    )
    for end in theirs:
        os.close(end)
    try:
        yield Tab(*own)
    finally:
        process.kill()
        process.wait()
        for end in own:
            os.close(end)


def _pipe() -> tuple[int, int]:
    """Kept until both are doubled: numbers below 10 are bash's."""
    return os.pipe()
