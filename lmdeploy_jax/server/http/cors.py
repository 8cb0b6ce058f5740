"""Browsers of other origins (CORS): what servers and their proxy let them do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from lmdeploy_jax.server.http.request_ids import HEADERS


class CorsOptions(Protocol):
    """The options of whoever is called."""

    allow_origins: Sequence[str]
    allow_methods: Sequence[str]
    allow_headers: Sequence[str]
    allow_credentials: bool


def add_cors(app: FastAPI, options: CorsOptions) -> None:
    """Answers browsers' questions; every answer's request ids may be read."""
    app.add_middleware(
        CORSMiddleware,
        allow_origins=options.allow_origins,
        allow_methods=options.allow_methods,
        allow_headers=options.allow_headers,
        allow_credentials=options.allow_credentials,
        expose_headers=HEADERS,
    )
