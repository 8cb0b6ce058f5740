"""Where the server listens, and whether it can: looked at before a model is loaded."""

from __future__ import annotations

import os
import socket
import ssl
from pathlib import Path

from lmdeploy_jax.server.options import ServerOptions


def bind(options: ServerOptions) -> list[socket.socket]:
    """Sockets that hold the address, one for each of the host's; connections are refused until something
    listens at them.

    Raises OSError with a text for a user where the address cannot be had.
    """
    host, port = options.server_name, options.server_port
    bound: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(found):
            bound.append(_bound(family, address))
    except OSError as error:
        for taken in bound:
            taken.close()
        reason = error.strerror or str(error)
        raise OSError(
            f"server_name={host!r}, server_port={port}: cannot listen there: {reason}. Give another "
            "--server-port, 0 for any that is free, or a --server-name of this machine."
        ) from error
    return bound


def _bound(family: int, address: tuple[object, ...]) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere the option would let two servers share a port
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # the other family has its own
        made.bind(address)
    except BaseException:
        made.close()
        raise
    return made


def check_certificate(options: ServerOptions) -> None:
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
