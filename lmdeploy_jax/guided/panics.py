"""Panics of llguidance, which Python sees as a `BaseException` that no `except Exception` catches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lmdeploy_jax.errors import RequestError


def as_request_error(error: BaseException) -> BaseException:
    """A panic as an error of the request whose grammar caused it; anything else as it is."""
    if type(error).__name__ != "PanicException":  # the type is pyo3's, and nowhere to be imported from
        return error
    return RequestError(f"llguidance cannot handle the answer's grammar and this tokenizer: {error}")


@contextmanager
def panics_are_errors() -> Iterator[None]:
    """Raises `RequestError` where llguidance panics."""
    try:
        yield
    except BaseException as error:
        if as_request_error(error) is error:
            raise
        raise as_request_error(error) from error
