"""The page of runs, live, for this machine alone; the watch command.

It is made anew when a browser asks and a file has changed. This file knows no plot.
"""

from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from dpojax.command_config import WatchConfig
from dpojax.progress import say
from dpojax.report.comparing import Listed, runs_at
from dpojax.report.page import page

_REFRESH = 5  # seconds between questions of a browser
_OWN_NAMES = ("127.0.0.1", "localhost")


def watch(config: WatchConfig) -> None:
    """Serves the page until Ctrl-C."""
    # Refuses what is no run before anything is served.
    page([runs_at(path) for path in config.runs])
    with make_server(config.runs, config.port) as server:
        say(f"http://127.0.0.1:{server.server_port} shows the page; Ctrl-C ends it.")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("Stopped.")


def make_server(runs: Sequence[str], port: int) -> ThreadingHTTPServer:
    """A server of the page, bound to this machine; port 0: one that is free.

    Raises:
      ValueError: if the port is taken.
    """
    newest = _Newest(runs)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Pages of other sites may resolve their names to this machine.
            host = self.headers.get("Host", "").rsplit(":", 1)[0]
            if self.path != "/" or host not in _OWN_NAMES:
                self.send_error(404)
                return
            body = newest.page().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing of each request."""

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ValueError(
            f"Port {port} cannot be had ({error.strerror}); choose another --port."
        ) from None


class _Newest:
    """The page as files have it now, made once for each of their states."""

    def __init__(self, runs: Sequence[str]):
        self._runs = runs
        self._lock = Lock()  # matplotlib's settings are the whole process's
        self._state: list[tuple[str, int, int]] = []
        self._page = ""

    def page(self) -> str:
        with self._lock:
            listed = [runs_at(path) for path in self._runs]
            state = _look(listed)
            if state != self._state:
                self._page, self._state = page(listed, _REFRESH), state
            return self._page


def _look(listed: Sequence[Listed]) -> list[tuple[str, int, int]]:
    runs = [Path(run) for each in listed for run in each.directories]
    files = [file for run in runs for file in run.glob("*.jsonl")]
    found = [(str(file), file.stat()) for file in sorted(files)]
    return [(name, stat.st_mtime_ns, stat.st_size) for name, stat in found]
