"""The error types of the public API. Each message names the thing, its value and the remedy."""

from __future__ import annotations


class LmdeployError(Exception):
    """Base of every error this project raises on purpose.

    `code` is the machine-readable name that a `Response` and an HTTP error body carry.
    """

    code = "internal_error"


class ConfigError(LmdeployError, ValueError):
    """A configuration field or command-line flag has a value that cannot work."""

    code = "invalid_config"


class CheckpointError(LmdeployError, ValueError):
    """A checkpoint is damaged, incomplete, unsafe, or does not fit its own config."""

    code = "invalid_checkpoint"


class UnsupportedModelError(CheckpointError):
    """The checkpoint is sound, but its architecture or one of its features is not supported."""

    code = "unsupported_model"


class RequestError(LmdeployError, ValueError):
    """A request cannot be served as it was asked. param: which part of it, as OpenAI's error objects say."""

    code = "invalid_request"

    def __init__(self, message: str = "", *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    """A prompt leaves no room for an answer. length: its tokens, as far as they were counted; limit: those of
    the context. The words are OpenAI's: gateways and agents know by them that they must shorten it.
    """

    code = "context_length_exceeded"

    def __init__(self, message: str = "", *, length: str = "", limit: int = 0) -> None:
        super().__init__(message)
        self.length = length
        self.limit = limit

    @classmethod
    def of(cls, length: str, limit: int) -> ContextLengthError:
        """The error for a prompt of so many tokens, `length`, in words."""
        message = (
            f"This model's maximum context length is {limit} tokens. However, your input resulted in "
            f"{length}, which leaves no room for an answer. Please shorten it."
        )
        return cls(message, length=length, limit=limit)


class RequestConflictError(RequestError):
    """A session has an answer under way and cannot start another."""

    code = "request_conflict"


class EngineError(LmdeployError, RuntimeError):
    """The engine cannot go on, or has been closed."""

    code = "engine_unavailable"


class LogitsError(LmdeployError, ArithmeticError):
    """There is no distribution to draw a token from: a logit is NaN, or every token is ruled out."""

    code = "invalid_logits"
