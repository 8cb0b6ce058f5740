"""The address is taken before a model is loaded, and given back where it cannot be had as a whole."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest

from lmdeploy_jax.server.http.sockets import bind, release, url_of
from lmdeploy_jax.server.options import ServerOptions


def ports(sockets: list[socket.socket]) -> set[int]:
    return {taken.getsockname()[1] for taken in sockets}


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "0.0.0.0", ""])
def test_one_port_for_all_addresses_of_a_host(name):
    with ExitStack() as stack:
        sockets = [stack.enter_context(s) for s in bind(ServerOptions(server_name=name, server_port=0))]
        (port,) = ports(sockets)
        with pytest.raises(OSError, match=f"server_port={port}: cannot listen there: Address already in use"):
            bind(ServerOptions(server_name=name, server_port=port))
        with socket.socket() as caller:
            assert caller.connect_ex(("127.0.0.1", port)) != 0, "nothing listens yet"
    for again in bind(ServerOptions(server_name=name, server_port=port)):
        again.close()


def test_connections_that_linger_do_not_hold_the_address():
    """As after every server that closed a connection itself."""
    options = ServerOptions(server_name="127.0.0.1", server_port=0)
    (first,) = bind(options)
    release([first])
    first.listen()
    with first, socket.create_connection(first.getsockname()) as caller:
        address = first.getsockname()
        first.accept()[0].close()
        assert caller.recv(1) == b""
    (second,) = bind(ServerOptions(server_name="127.0.0.1", server_port=address[1]))
    with second:
        assert second.getsockname() == address


def test_an_address_of_another_machine():
    with pytest.raises(OSError, match=r"server_name='192\.0\.2\.1', server_port=0: cannot listen there"):
        bind(ServerOptions(server_name="192.0.2.1", server_port=0))


def test_clients_of_this_machine_are_told_an_address_that_they_can_open():
    shown = {
        name: url_of(ServerOptions(server_name=name), 80, local=True) for name in ("0.0.0.0", "::", "", "::1")
    }
    assert set(shown.values()) == {"http://localhost:80", "http://[::1]:80"}
    assert shown["::1"] == "http://[::1]:80"
    assert url_of(ServerOptions(server_name="0.0.0.0"), 80) == "http://0.0.0.0:80"
