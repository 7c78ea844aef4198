"""The address of the server and the keys of its clients, checked before anything slow."""

import errno
import ipaddress
import pathlib
import socket

from solar_jax.errors import UserError


def bind_address(host: str, port: int, *, has_keys: bool) -> socket.socket:
    """Takes an address, so that no other program can while the model is loaded.

    Raises:
      UserError: it is in use, not this machine's, or open to other machines without a key.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as e:
        raise UserError(f"--host={host}: no such address on this machine.") from e
    if not ipaddress.ip_address(str(address[0]).split("%")[0]).is_loopback and not has_keys:
        raise UserError(
            f"--host={host} lets other machines ask without a key; give --api_key_file FILE, or --host 127.0.0.1."
        )
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as e:
        sock.close()
        if e.errno == errno.EADDRINUSE:
            raise UserError(f"--port={port}: another program is listening on {host}:{port}.") from e
        raise UserError(f"--host={host} --port={port}: {e.strerror}.") from e
    return sock


def open_to_clients(sock: socket.socket, backlog: int = 2048) -> None:
    """Opens a bound socket to clients.

    Raises:
      UserError: another program came first.
    """
    try:
        sock.listen(backlog)
    except OSError as e:
        host, port = sock.getsockname()[:2]
        raise UserError(f"--port={port}: another program is listening on {host}:{port}.") from e


def url_of(sock: socket.socket) -> str:
    """Returns the base URL that clients use."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def read_keys(file: str | None) -> list[bytes]:
    """Reads the keys of a file, one a line.

    Raises:
      UserError: it cannot be read, or has none.
    """
    if file is None:
        return []
    try:
        lines = pathlib.Path(file).read_bytes().splitlines()
    except OSError as e:
        raise UserError(f"--api_key_file={file}: {e.strerror}.") from e
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise UserError(f"--api_key_file={file}: expected a key on a line, found none.")
    return keys
