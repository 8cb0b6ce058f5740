"""One prompt's pieces for an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from lmdeploy_jax.arguments import PromptRequest
from lmdeploy_jax.engine.io.answer import error_response
from lmdeploy_jax.engine.io.frontend import Frontend, PromptOptions
from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.messages import Response
from lmdeploy_jax.stream import log_failure


async def pieces(
    frontend: Frontend, request: PromptRequest, options: PromptOptions, *, stream: bool = True
) -> AsyncIterator[Response]:
    """The pieces of a prompt's answers. Leaving early, by cancellation too, aborts the request."""
    inbox: asyncio.Queue[Response] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    reading = True

    def post(piece: Response) -> None:
        if reading:  # else the loop may be closed already
            loop.call_soon_threadsafe(inbox.put_nowait, piece)

    try:
        if isinstance(request.prompt, RequestError):
            raise request.prompt
        encoded = await asyncio.to_thread(frontend.encode, request.prompt, options)
        request_id = frontend.submit(encoded, request.config, post, stream=stream)
    except RequestError as error:
        answer = error_response(error, 0)
        log_failure(answer, error)
        yield answer
        return
    left = request.config.n
    try:
        while left:
            piece = await inbox.get()
            left -= piece.finish_reason is not None
            if piece.finish_reason == "error":
                log_failure(piece)
            yield piece
    finally:
        reading = False
        if left:
            frontend.abort(request_id)
