"""Where the server listens, and whether it can: looked at before a model is loaded."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol


class Address(Protocol):
    """Options that say where to listen, and with which certificate."""

    server_name: str
    server_port: int
    ssl_keyfile: str | None
    ssl_certfile: str | None


ANY = ("0.0.0.0", "::", "")
"""Names of all of a machine's addresses, at which no client should look for it."""


def url_of(options: Address, port: int, *, local: bool = False) -> str:
    """The URL of a server at `port`; `local`: as clients on the same machine reach it."""
    name = "localhost" if local and options.server_name in ANY else options.server_name
    scheme = "https" if options.ssl_certfile else "http"
    return f"{scheme}://[{name}]:{port}" if ":" in name else f"{scheme}://{name}:{port}"


def bind(options: Address) -> list[socket.socket]:
    """Sockets that hold the address, one for each of the host's; connections are refused until something
    listens at them.

    Raises OSError with a text for a user where the address cannot be had.
    """
    host, port = options.server_name, options.server_port
    try:
        return _all_bound(host, port)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            f"server_name={host!r}, server_port={port}: cannot listen there: {reason}. Give another "
            "--server-port, 0 for any that is free, or a --server-name of this machine."
        ) from error


def _all_bound(host: str, port: int) -> list[socket.socket]:
    """One port at every address of the host; families that this machine lacks are left out."""
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    bound: list[socket.socket] = []
    lacking: OSError | None = None
    try:
        for family, _, _, _, (name, _, *rest) in dict.fromkeys(found):
            at = bound[0].getsockname()[1] if bound else port
            try:
                bound.append(_bound(family, (name, at, *rest)))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                lacking = error
        if lacking is not None and not bound:
            raise lacking
    except BaseException:
        for taken in bound:
            taken.close()
        raise
    return bound


def _bound(family: int, address: tuple[Any, ...]) -> socket.socket:
    """Alone, so that no other server binds it while the model is loaded; where connections of an earlier
    server linger, that cannot be had.
    """
    try:
        return _bind(family, address, reuse=False)
    except OSError as error:
        if error.errno != errno.EADDRINUSE or os.name != "posix":
            raise
        return _bind(family, address, reuse=True)


def _bind(family: int, address: tuple[Any, ...], *, reuse: bool) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        if reuse:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # the other family has its own
        made.bind(address)
    except BaseException:
        made.close()
        raise
    return made


def release(sockets: Iterable[socket.socket]) -> None:
    """Before they listen: let a later server bind the address while connections of this one linger."""
    for taken in sockets if os.name == "posix" else ():
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def check_certificate(options: Address) -> None:
    """Raises OSError, naming the file, where certificate and key cannot be used."""
    if options.ssl_certfile is None or options.ssl_keyfile is None:
        return
    for name in ("ssl_certfile", "ssl_keyfile"):
        path = getattr(options, name)
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise OSError(f"{name}={path!r} cannot be read: {error.strerror}.") from error
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(options.ssl_certfile, options.ssl_keyfile)
    except OSError as error:  # ssl's own errors too
        raise OSError(
            f"ssl_certfile={options.ssl_certfile!r}, ssl_keyfile={options.ssl_keyfile!r} are no certificate "
            f"in PEM with its unencrypted key: {error}."
        ) from error
