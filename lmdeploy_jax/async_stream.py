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
    submitted: list[int] = []
    reading, left = True, request.config.n

    def post(piece: Response) -> None:
        if reading:  # else the loop may be closed already
            loop.call_soon_threadsafe(inbox.put_nowait, piece)

    def submit() -> None:
        if isinstance(request.prompt, RequestError):
            raise request.prompt
        encoded = frontend.encode(request.prompt, options)
        submitted.append(frontend.submit(encoded, request.config, post, stream=stream))
        if not reading:  # who asked has left meanwhile
            frontend.abort(submitted[0])

    try:
        try:
            await asyncio.to_thread(submit)  # which tries a form's grammar, and so may take seconds
        except RequestError as error:
            answer = error_response(error, 0)
            log_failure(answer, error)
            yield answer
            return
        while left:
            piece = await inbox.get()
            left -= piece.finish_reason is not None
            if piece.finish_reason == "error":
                log_failure(piece)
            yield piece
    finally:
        reading = False
        if left:
            for request_id in submitted:
                frontend.abort(request_id)
