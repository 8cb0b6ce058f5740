"""The HTTP server: OpenAI's protocol, and others, over one engine.

    app = create_app(Service(pipe.frontend, ServerOptions()))

A route reads its protocol's request, says it as a `chat.ChatCall`, and renders the
`answers.Delta`s that come.
"""
