"""The HTTP server: OpenAI's protocols, and others, over one engine.

    app = create_app(Service(pipe.frontend, ServerOptions()))

One folder a protocol: `bodies` (the requests), `prompt` (a request as the engine's call), `answer` (what
comes back, rendered) and `route`. Chat protocols say a request as a `chat.call.ChatCall` and render the
`chat.deltas.Delta`s that come.
"""
