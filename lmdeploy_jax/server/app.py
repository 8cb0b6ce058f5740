"""The web application: routes, errors, middleware."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware

from lmdeploy_jax import __version__
from lmdeploy_jax.server.errors import install_handlers
from lmdeploy_jax.server.middleware import BodyLimit, ConcurrencyLimit, Guard, KeyCheck
from lmdeploy_jax.server.options import ServerOptions
from lmdeploy_jax.server.responses_prompt import ResponseStore
from lmdeploy_jax.server.routes import (
    admin,
    anthropic,
    completions,
    embeddings,
    health,
    metrics,
    models,
    native,
    openai_chat,
    page,
    responses,
    tokens,
)
from lmdeploy_jax.server.service import Service

ROUTERS: tuple[APIRouter, ...] = (
    models.router,
    openai_chat.router,
    completions.router,
    responses.router,
    anthropic.router,
    embeddings.router,
    native.router,
    tokens.router,
    health.router,
    metrics.router,
    admin.router,
    page.router,
)


def create_app(service: Service) -> FastAPI:
    """The application over a service, whose options it follows. Closing the engine is left to the caller."""
    options = service.options
    app = FastAPI(
        title="lmdeploy_jax",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None if options.disable_fastapi_docs else "/openapi.json",
    )
    app.state.service = service
    app.state.responses = ResponseStore()
    for router in ROUTERS:
        app.include_router(router)
    install_handlers(app)
    _install_middleware(app, options)
    return app


def _install_middleware(app: FastAPI, options: ServerOptions) -> None:
    """The last one added is the outermost."""
    if options.max_concurrent_requests is not None:
        app.add_middleware(ConcurrencyLimit, most=options.max_concurrent_requests)
    app.add_middleware(BodyLimit, most=options.max_body_size, seconds=options.body_timeout)
    if options.api_keys:
        app.add_middleware(KeyCheck, keys=options.api_keys)
    app.add_middleware(Guard)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=options.allow_origins,
        allow_methods=options.allow_methods,
        allow_headers=options.allow_headers,
        allow_credentials=options.allow_credentials,
    )
