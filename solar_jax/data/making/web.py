"""HTTP requests of which each has one deadline for all of it, through the proxy that the environment names."""

import contextlib
import dataclasses
import email.utils
import http.client
import re
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping

from solar_jax.errors import UserError

_MOST_BYTES = 1 << 26  # of a response
_HERE = ("localhost", "127.0.0.1", "::1")
# What a request fails with when the other side, or the way to it, does not work.
WEB_FAILURES = (OSError, http.client.HTTPException)


@dataclasses.dataclass(frozen=True)
class Response:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def header(self, name: str) -> str:
        return next((v.strip() for k, v in self.headers.items() if k.lower() == name.lower()), "")

    @property
    def retry_after(self) -> float | None:
        """Seconds that the server asks to wait; it gives them as a number or as a date."""
        text = self.header("Retry-After")
        if re.fullmatch(r"\d+(\.\d+)?", text):
            return float(text)
        with contextlib.suppress(ValueError):
            return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
        return None


class Web:
    """Requests below one URL, from any number of threads."""

    def __init__(self, url: str, timeout: float):
        self._url, self._timeout = urllib.parse.urlsplit(url), timeout
        self._open: set[socket.socket] = set()
        self._lock, self._closed = threading.Lock(), False

    def request(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None) -> Response:
        """Sends a request and returns the response, whatever its status; redirections are not followed.

        Raises:
          OSError, http.client.HTTPException: there was no complete response before the deadline.
        """
        begin = time.monotonic()
        connection, prefix = self._connection()
        with contextlib.closing(connection):
            connection.connect()
            left = max(0.001, self._timeout - (time.monotonic() - begin))
            with self._deadline(connection.sock, left) as over:
                try:
                    connection.request(method, prefix + path, body, dict(headers))
                    response = connection.getresponse()
                    content = response.read(_MOST_BYTES + 1)
                except WEB_FAILURES as e:
                    if over.is_set():
                        raise TimeoutError(f"no answer within {self._timeout:g} s") from e
                    raise
                if over.is_set():  # a body without a length ends like any other when it is cut
                    raise TimeoutError(f"no complete answer within {self._timeout:g} s")
        if len(content) > _MOST_BYTES:
            raise OSError(f"an answer of more than {_MOST_BYTES:,} bytes")
        return Response(response.status, dict(response.headers), content)

    def close(self) -> None:
        """Ends the requests that are under way, and those that may yet begin."""
        with self._lock:
            self._closed = True
            for sock in self._open:
                _cut(sock)

    @contextlib.contextmanager
    def _deadline(self, sock: socket.socket, seconds: float) -> Iterator[threading.Event]:
        """Cuts a connection after so many seconds; a socket's own timeout starts anew with every byte."""
        over = threading.Event()

        def end() -> None:
            over.set()
            _cut(sock)

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        with self._lock:
            self._open.add(sock)
            if self._closed:
                _cut(sock)
        timer.start()
        try:
            yield over
        finally:
            timer.cancel()
            with self._lock:
                self._open.discard(sock)

    def _connection(self) -> tuple[http.client.HTTPConnection, str]:
        """Returns a new connection, and what stands before the path in its requests."""
        host, port, scheme = self._url.hostname or "", self._url.port, self._url.scheme
        kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        proxy = urllib.request.getproxies().get(scheme)
        if not proxy or host in _HERE or urllib.request.proxy_bypass(host):
            return kind(host, port, timeout=self._timeout), ""
        by = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        connection = kind(by.hostname or "", by.port, timeout=self._timeout)
        if scheme == "https":
            connection.set_tunnel(host, port)
            return connection, ""
        return connection, f"{scheme}://{self._url.netloc}"


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        # That of SSLSocket would drop the state that another thread reads with.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def check_endpoint_url(url: str) -> None:
    """Raises a UserError for a URL that cannot be an endpoint's."""
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        parts, usable = None, False
    if parts is not None and (parts.username or parts.password or parts.query or parts.fragment):
        shown = f"{parts.scheme}://{parts.hostname}{parts.path}"  # what else it has may be a key
        raise UserError(f"--endpoint: {shown}: has a user, a query or a fragment; give a key by --api_key_file.")
    if not usable or re.search(r"[\s\x00-\x1f\x7f]", url) or not url.isascii():
        raise UserError(f"--endpoint: {url!r}: must be a URL that begins with http:// or https:// and names a host.")


def api_base(url: str) -> str:
    """Returns the URL below which an endpoint has /models and /chat/completions."""
    url = url.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    return url if re.search(r"/v\d+\w*(/|$)", urllib.parse.urlsplit(url).path) else f"{url}/v1"
