"""An emulator of Google's buckets on loopback, which can be told to fail."""

import collections
import contextlib
import functools
import itertools
import logging
import socket
import struct
import threading
import urllib.parse
from collections.abc import Iterator
from http import HTTPStatus, server

import gcp_storage_emulator.server as emulator
import pytest
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.storage import Storage

from tests.conftest import free_port

BUCKET = "models"


class Faults:
    """Faults that the emulator makes in place of what it is asked, each counted by its kind."""

    def __init__(self) -> None:
        self.every = 0  # each so-many-th request fails, with 503 or a connection that is reset; 0: none
        self.refused = ""  # the client that may not write arrays
        self.counts: collections.Counter[str] = collections.Counter()
        self._requests, self._lock = itertools.count(1), threading.Lock()

    def next(self) -> str | None:
        with self._lock:
            number = next(self._requests)
            self.counts["requests"] += 1
            if not self.every or number % self.every:
                return None
            found = "reset" if number // self.every % 4 == 0 else "503"
            self.counts[found] += 1
            return found


def with_generations(handler):
    """The emulator's handler with what TensorStore asks of the real one: generations and conditions on them."""

    def handle(request, response, storage, *args, **kwargs):
        name = request.params.get("object_id") or request.query.get("name", [""])[0]
        try:
            generation = storage.get_file_obj(request.params["bucket_name"], name)["generation"]
        except NotFound:
            generation = "0"
        response["x-goog-generation"] = generation
        for condition, status in (("ifGenerationMatch", 412), ("ifGenerationNotMatch", 304)):
            if (wanted := request.query.get(condition)) and (wanted[0] == generation) == (status == 304):
                response.status = HTTPStatus(status)
                return None
        return handler(request, response, storage, *args, **kwargs)

    return handle


def one_at_a_time(handler, lock):
    """The emulator's handler under a lock: its store builds new dicts as it deletes, and loses what others write."""

    def handle(request, *args, **kwargs):
        if request.method in ("POST", "PUT", "PATCH"):
            _ = request.data  # read from the client before the lock is taken
        with lock:
            return handler(request, *args, **kwargs)

    return handle


class _Handler(emulator.RequestHandler):
    def __init__(self, faults: Faults, *args):
        self._faults = faults
        super().__init__(*args)

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        writes = self.command == "POST" and "/params/" in urllib.parse.unquote(self.path)
        if writes and self._faults.refused and self._faults.refused in self.headers.get("User-Agent", ""):
            return self._fails(HTTPStatus.FORBIDDEN)
        fault = self._faults.next()
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return False
        return self._fails(HTTPStatus.SERVICE_UNAVAILABLE) if fault else True

    def _fails(self, status: HTTPStatus) -> bool:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_error(status)
        return False

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # of a connection that was reset on purpose
            super().finish()


class _Server(server.ThreadingHTTPServer):
    request_queue_size = 512  # a burst of TensorStore's connections beyond it waits for seconds
    daemon_threads = True

    def handle_error(self, *_) -> None:
        """Says nothing of connections that were reset on purpose."""


@contextlib.contextmanager
def serving() -> Iterator[tuple[str, Faults]]:
    """A new bucket's URL, which this process and those that it starts find by their environment, and its faults."""
    faults, storage, port = Faults(), Storage(use_memory_fs=True), free_port()
    storage.create_bucket(BUCKET, {"name": BUCKET})
    taught = {f: with_generations(f) for f in (objects.insert, objects.get, objects.download, objects.delete)}
    lock = threading.Lock()
    handlers = tuple(
        (route, {method: one_at_a_time(taught.get(f, f), lock) for method, f in methods.items()})
        for route, methods in emulator.HANDLERS
    )
    for logger in ("google.auth", "gcp_storage_emulator"):  # there are no credentials, which they look for
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    variables = dict.fromkeys(("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"), f"http://127.0.0.1:{port}")
    variables["NO_GCE_CHECK"] = "true"  # there is no machine of Google's to ask for credentials
    with pytest.MonkeyPatch.context() as m:
        m.setattr(emulator, "HANDLERS", handlers)
        for name, value in variables.items():
            m.setenv(name, value)
        httpd = _Server(("127.0.0.1", port), functools.partial(_Handler, faults, storage))
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"gs://{BUCKET}", faults
        httpd.shutdown()
        httpd.server_close()
