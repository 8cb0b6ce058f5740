"""Bytes from URLs that somebody else may have written, within bounds of place, size and time."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import ResolveResult
from aiohttp.resolver import ThreadedResolver

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.logs import shortened
from lmdeploy_jax.vision.access import MediaAccess

MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_SHOWN = 200  # characters of a URL in an error
_CHUNK = 1 << 16
_AT_ONCE = 8  # URLs of one call
_LOOK_UP = 1.0  # seconds more, after which nobody waits for the look-up of a name
# Anything else might be one host here and another one where it is connected to.
_PLAIN_HOST = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?")
_NUMERIC = re.compile(r":|(?:^|\.)(?:\d+|0x[0-9a-f]*)\.?$")  # an address, however it is written
# Addresses that stand for IPv4 ones, which the checks of IPv6 know nothing about: translated and tunnelled.
_TRANSLATED = [
    ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")
]


Fetched = dict[str, bytes | RequestError]  # by URL: the body, or why it cannot be had


def fetch(urls: Iterable[str], access: MediaAccess) -> Fetched:
    """The bodies at http and https URLs, on whichever thread this is called.

    They come side by side, and the bounds of time and size that `access` has are those of all together. What
    cannot be had: from a host that `access` does not allow, at any redirect too, and what does not come,
    comes too slowly or is too large.
    """
    wanted = list(dict.fromkeys(urls))
    if not wanted:
        return {}
    outcome: Future[Fetched] = Future()
    # The caller's thread may run an event loop, as a notebook's does. Nobody joins this one: the look-up of a
    # name cannot be cancelled, and may take longer than anybody waits here.
    threading.Thread(target=_run, args=(outcome, wanted, access), daemon=True).start()
    try:
        return outcome.result(access.fetch_timeout + _LOOK_UP)
    except TimeoutError:
        return {url: _too_slow(url, access) for url in wanted}


def _too_slow(url: str, access: MediaAccess) -> RequestError:
    return RequestError(
        f"{shortened(url, _SHOWN)}: it has not come within {access.fetch_timeout:g} s. Send the file itself "
        "as a data URL."
    )


def _run(outcome: Future[Fetched], urls: list[str], access: MediaAccess) -> None:
    try:
        outcome.set_result(asyncio.run(_Fetcher(access).bodies(urls)))
    except BaseException as error:
        outcome.set_exception(error)


class _Fetcher:
    """Fetches what one call asks for."""

    def __init__(self, access: MediaAccess) -> None:
        self._access = access
        self._bytes = 0
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def bodies(self, urls: list[str]) -> Fetched:
        # Neither a proxy of the environment nor cookies; and what is compressed would be larger than it says.
        connector = aiohttp.TCPConnector(resolver=_Resolver(self._access), use_dns_cache=False)
        headers = {"accept": "image/*,*/*;q=0.5", "accept-encoding": "identity"}
        jar = aiohttp.DummyCookieJar()
        async with aiohttp.ClientSession(
            connector=connector, headers=headers, cookie_jar=jar, auto_decompress=False
        ) as session:
            found = await asyncio.gather(*(self._body_or_error(session, url) for url in urls))
        return dict(zip(urls, found, strict=True))

    async def _body_or_error(self, session: aiohttp.ClientSession, url: str) -> bytes | RequestError:
        try:
            async with asyncio.timeout(self._access.fetch_timeout), self._turns:  # redirects included
                return await self._followed(session, url)
        except RequestError as error:
            return error
        except TimeoutError:
            return _too_slow(url, self._access)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return RequestError(f"{shortened(url, _SHOWN)}: it cannot be fetched: {error}.")

    async def _followed(self, session: aiohttp.ClientSession, url: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            _check_url(url, self._access)
            async with session.get(url, allow_redirects=False) as answer:
                if answer.status not in _REDIRECTS:
                    return await self._body(answer, url)
                url = urljoin(url, answer.headers.get("location", ""))
        raise RequestError(
            f"{shortened(url, _SHOWN)}: more than {MAX_REDIRECTS} redirects. Give the last URL."
        )

    async def _body(self, answer: aiohttp.ClientResponse, url: str) -> bytes:
        shown = shortened(url, _SHOWN)
        if answer.status != 200:
            raise RequestError(f"{shown}: the server there answered {answer.status}. Check the URL.")
        body = bytearray()
        async for chunk in answer.content.iter_chunked(_CHUNK):
            body += chunk
            self._bytes += len(chunk)
            self._access.check_size(self._bytes, shown)
        return bytes(body)


def _check_url(url: str, access: MediaAccess) -> None:
    """Raises RequestError where the URL names what may not be fetched. Names are looked up later."""
    parts, shown = urlsplit(url), shortened(url, _SHOWN)
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not _PLAIN_HOST.fullmatch(parts.netloc):
        raise RequestError(
            f"{shown}: a URL must begin with http:// or https:// and name a host, in ASCII letters and "
            "without a user."
        )
    if not access.names(host):
        allowed = ", ".join(access.allowed_media_domains or ())
        raise RequestError(
            f"{shown}: the host {host!r} is not among those that are allowed ({allowed}). Send the file "
            "itself as a data URL, or add the host to --allowed-media-domains."
        )
    if _NUMERIC.search(host) and not access.may_be_private(host) and not _is_public_literal(host):
        raise _private(host)


def _is_public_literal(host: str) -> bool:
    """Of a host that no resolver is asked about. Short and hexadecimal forms, which hide much, are none."""
    try:
        return is_public(ipaddress.ip_address(host))
    except ValueError:
        return False


def _private(host: str) -> RequestError:
    return RequestError(
        f"the host {host!r} has no public address. Send the file itself as a data URL, or name the host in "
        "--allowed-media-domains."
    )


class _Resolver(ThreadedResolver):
    """Gives aiohttp only addresses that may be connected to, so that no second look-up gives another one."""

    def __init__(self, access: MediaAccess) -> None:
        super().__init__()
        self._access = access

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await super().resolve(host, port, family)
        if self._access.may_be_private(host):
            return found
        public = [one for one in found if is_public(ipaddress.ip_address(one["host"]))]
        if not public:
            raise _private(host)
        return public


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether the address belongs to the internet, and to nothing behind a router or a tunnel."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if any(address in net for net in _TRANSLATED):
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)
