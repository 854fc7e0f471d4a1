"""A bucket on this machine, which may refuse every request at first, for tests."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import ThreadingHTTPServer
from io import BytesIO
from threading import Lock, Thread

import pytest
from fsspec.config import conf
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler, Router
from gcp_storage_emulator.storage import Storage

NAME = "gs://bucket"


class Bucket(ThreadingHTTPServer):
    """Takes requests of all clients."""

    def __init__(self):
        """On a free port; empty, and in memory."""
        self._storage = Storage(use_memory_fs=True)
        create_bucket("bucket", self._storage)
        super().__init__(("localhost", 0), partial(_Handler, self._storage))
        self.lock = Lock()
        self.is_flaky = False
        self.is_forbidden = False
        self.refused: set[tuple[str, str]] = set()

    def handle_error(self, *_: object) -> None:
        """A client that has gone away is none of ours."""


class _Handler(RequestHandler):
    """Refuses some requests, and what was to be new but is there."""

    server: Bucket

    def _answer(self) -> None:
        with self.server.lock:  # what holds the objects is not made for threads
            Router(self).handle(self.command)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer

    def parse_request(self) -> bool:
        """Whether to go on with a request whose first lines are read."""
        if not super().parse_request():
            return False
        status = self._refusal()
        if status is None:
            return True
        size = int(self.headers.get("Content-Length", 0))
        self.rfile.read(size)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False

    def _refusal(self) -> int | None:
        if self.server.is_forbidden:
            return 403
        if self.server.is_flaky and self._is_first():
            return 503
        if "ifGenerationMatch=0" in self.path and self._is_there():
            return 412
        return None

    def _is_first(self) -> bool:
        """Of two equal requests: clients beside each other do not upset the order."""
        request = self.command, self.path
        with self.server.lock:
            self.server.refused ^= {request}
            return request in self.server.refused

    def _is_there(self) -> bool:
        """Whether there is the object that a body begins to describe."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.rfile = BytesIO(body)
        found = re.search(rb'"name": "([^"]+)"', body[:1000])
        try:
            self.storage.get_file_obj("bucket", found[1].decode() if found else "")
        except NotFound:
            return False
        return True

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def bucket() -> Iterator[Bucket]:
    """What clients of this process and of its children take for Google's."""
    with Bucket() as server, pytest.MonkeyPatch.context() as patch:
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        url = f"http://localhost:{server.server_address[1]}"
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        patch.setenv("FSSPEC_GCS_TOKEN", "anon")  # which children read,
        patch.setitem(conf, "gcs", {"token": "anon"})  # and this process has read
        yield server
        server.shutdown()
        thread.join()
