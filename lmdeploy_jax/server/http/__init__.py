"""What knows of HTTP and nothing of models: sockets, limits, middleware, streams of events."""
