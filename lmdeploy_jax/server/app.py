"""The web application: routes, errors, middleware."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI
from starlette.routing import Route

from lmdeploy_jax import __version__
from lmdeploy_jax.server.anthropic import route as anthropic
from lmdeploy_jax.server.completions import route as completions
from lmdeploy_jax.server.embeddings import route as embeddings
from lmdeploy_jax.server.errors import install_handlers
from lmdeploy_jax.server.http.cors import add_cors
from lmdeploy_jax.server.http.middleware import Authentication, BodyLimit, ConcurrencyLimit, ServerErrors
from lmdeploy_jax.server.http.paths import TolerantPaths
from lmdeploy_jax.server.http.request_ids import RequestIds
from lmdeploy_jax.server.native import route as native
from lmdeploy_jax.server.openai_chat import route as openai_chat
from lmdeploy_jax.server.options import ServerOptions
from lmdeploy_jax.server.page import route as page
from lmdeploy_jax.server.responses import route as responses
from lmdeploy_jax.server.responses.store import ResponseStore
from lmdeploy_jax.server.routes import admin, audio, health, metrics, models
from lmdeploy_jax.server.scores import route as scores
from lmdeploy_jax.server.service import Service
from lmdeploy_jax.server.tokens import route as tokens

MAX_BODY_SIZE, MAX_BODY_SIZE_WITH_IMAGES = 16 << 20, 64 << 20  # bytes, unless the options say otherwise

ROUTERS: tuple[APIRouter, ...] = (
    models.router,
    openai_chat.router,
    completions.router,
    responses.router,
    anthropic.router,
    embeddings.router,
    scores.router,
    native.router,
    tokens.router,
    health.router,
    metrics.router,
    admin.router,
    page.router,
    audio.router,
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
    default = MAX_BODY_SIZE_WITH_IMAGES if service.frontend.takes_images else MAX_BODY_SIZE
    _install_middleware(app, options, options.max_body_size or default)
    return app


def _paths() -> list[str]:
    return [route.path for router in ROUTERS for route in router.routes if isinstance(route, Route)]


def _install_middleware(app: FastAPI, options: ServerOptions, max_body_size: int) -> None:
    """The last one added is the outermost."""
    if options.max_concurrent_requests is not None:
        app.add_middleware(ConcurrencyLimit, most=options.max_concurrent_requests)
    app.add_middleware(BodyLimit, most=max_body_size, seconds=options.body_timeout)
    if options.api_keys:
        app.add_middleware(Authentication, keys=options.api_keys)
    app.add_middleware(ServerErrors)
    add_cors(app, options)
    app.add_middleware(TolerantPaths, routes=_paths())
    app.add_middleware(RequestIds)
