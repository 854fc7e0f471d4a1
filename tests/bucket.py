"""A bucket on this machine, which may refuse every request at first, for tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import ThreadingHTTPServer
from io import BytesIO
from re import fullmatch, search, sub
from threading import Lock, Thread
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from fsspec.config import conf
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler, Router
from gcp_storage_emulator.storage import Storage

NAME = "gs://bucket"


class Bucket(ThreadingHTTPServer):
    """Takes requests of all clients."""

    request_queue_size = 1024  # clients open many connections at once

    def __init__(self):
        """On a free port; empty, and in memory."""
        self._storage = Storage(use_memory_fs=True)
        create_bucket("bucket", self._storage)
        super().__init__(("localhost", 0), partial(_Handler, self._storage))
        self.lock = Lock()
        self.is_flaky = False
        self.is_forbidden = False
        self.last = "nothing"  # once an object's name ends so, all is forbidden
        self.refused: set[tuple[str, str]] = set()

    def handle_error(self, *_: object) -> None:
        """A client that has gone away is none of ours."""


class _Handler(RequestHandler):
    """Refuses some requests, and keeps to the generations of objects.

    TensorStore's database takes turns by them: without, it waits for ever or fails.
    """

    server: Bucket
    _generation = "0"

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.rfile = BytesIO(body)
        with self.server.lock:  # what holds the objects is not made for threads
            name = self._find_name(body)
            self._generation = self._find_generation(name)
            status = self._refusal()
            if status is None:
                Router(self).handle(self.command)
                if name.endswith(self.server.last):
                    self.server.is_forbidden = self._find_generation(name) != "0"
                return
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer

    def end_headers(self) -> None:
        """Before the blank line, the generation of an object that is read."""
        if self.command == "GET" and self._generation != "0":
            self.send_header("x-goog-generation", self._generation)
        super().end_headers()

    def _refusal(self) -> int | None:
        if self.server.is_forbidden:
            return 403
        if self.server.is_flaky and self._is_first():
            return 503
        wanted = parse_qs(urlsplit(self.path).query)
        if wanted.get("ifGenerationMatch", [self._generation]) != [self._generation]:
            return 412
        if wanted.get("ifGenerationNotMatch") == [self._generation]:
            return 304
        return None

    def _is_first(self) -> bool:
        """Of two equal requests: clients beside each other do not upset the order."""
        url = sub(r"tensorstore=\w+", "", self.path)  # its own number for each try
        request = self.command, url
        self.server.refused ^= {request}
        return request in self.server.refused

    def _find_name(self, body: bytes) -> str:
        """Of the object that a request is about; empty where it is about none."""
        url = urlsplit(self.path)
        in_path = fullmatch(r".*/b/bucket/o/([^/]+)", url.path)
        in_query = parse_qs(url.query).get("name")
        in_body = search(rb'"name": "([^"]+)"', body[:1000])
        if in_path:
            return unquote(in_path[1])
        if in_query:
            return in_query[0]
        return in_body[1].decode() if in_body else ""

    def _find_generation(self, name: str) -> str:
        """Zero where there is no such object."""
        try:
            return self.storage.get_file_obj("bucket", name)["generation"]
        except NotFound:
            return "0"

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
