"""One sequence's tokens become text: detokenisation, stop strings, pieces of a Response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmdeploy_jax.engine.io.params import Stops
from lmdeploy_jax.engine.request import StepOutput, TokenLogprobs
from lmdeploy_jax.errors import LmdeployError
from lmdeploy_jax.messages import GenerationConfig, Response
from lmdeploy_jax.text.detokenize import IncrementalDetokenizer
from lmdeploy_jax.text.stop import StopMatcher
from lmdeploy_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class OutputOptions:
    """How a request's tokens are told. `stream=False` gives one complete Response an answer."""

    config: GenerationConfig
    stops: Stops
    stream: bool = True
    index: int = 0  # Response.index


class Answer:
    """One sequence's text so far. A token is counted once it has been looked at for stop strings."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], options: OutputOptions, choice: int
    ) -> None:
        config = options.config
        self.done = False
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._options = options
        self._config = config
        self._choice = choice
        self._generated = 0
        self._text = IncrementalDetokenizer(tokenizer, prompt, config.skip_special_tokens)
        strings = options.stops.strings
        self._matcher = StopMatcher(strings, config.include_stop_str_in_output) if strings else None

    def feed(self, out: StepOutput) -> Response:
        """The piece that `out` adds. Sets `done` with the last one."""
        hidden_stop = out.stop_token is not None and not self._includes(out.stop_token)
        ids = out.token_ids[:-1] if out.stop_token is not None else out.token_ids
        text, count, match = self._take(ids)
        if match is None and out.finish_reason is not None:
            held, match = self._flush(out.stop_token)
            text += held
            count = len(out.token_ids) - hidden_stop
            self._generated += count - len(ids)
        self.done = match is not None or out.finish_reason is not None
        return self._piece(out, text, count, match)

    def failed(self, error: BaseException) -> Response:
        self.done = True
        return replace(
            error_response(error, self._options.index),
            choice=self._choice,
            input_token_len=len(self._prompt),
            generate_token_len=self._generated,
        )

    def _take(self, ids: Sequence[int]) -> tuple[str, int, str | None]:
        """Text of new tokens, how many of them belong to the answer, the stop string that ended it."""
        if self._matcher is None:
            self._generated += len(ids)
            return self._text.feed(ids), len(ids), None
        text = ""
        for count, token in enumerate(ids, 1):
            self._generated += 1
            shown, match = self._match(self._text.feed([token]))
            text += shown
            if match is not None:
                return text, count, match
        return text, len(ids), None

    def _match(self, text: str) -> tuple[str, str | None]:
        """Stop strings are not looked for before `min_new_tokens`, as stop ids are not."""
        if self._matcher is None or self._generated <= (self._config.min_new_tokens or 0):
            return text, None
        return self._matcher.feed(text)

    def _flush(self, stop_token: int | None) -> tuple[str, str | None]:
        """What was held back, and the stop token's own text where it is asked for."""
        include = stop_token is not None and self._includes(stop_token)
        text = self._text.feed([stop_token]) if include and stop_token is not None else ""
        shown, match = self._match(text + self._text.finish())
        held = self._matcher.finish() if self._matcher is not None else ""
        if include and match is None and stop_token is not None and self._unseen(stop_token):
            held += self._tokenizer.token_text(stop_token)
        return shown + held, match

    def _includes(self, stop_token: int) -> bool:
        """Whether the stop token is part of the answer. What ends a form is not, unless it was named."""
        form, named = self._config.response_format, self._config.stop_token_ids or ()
        has_form = form is not None and form.get("type") != "text"
        free = not has_form or stop_token in named or stop_token in self._options.stops.words
        return self._config.include_stop_str_in_output and free

    def _unseen(self, token: int) -> bool:
        return self._config.skip_special_tokens and self._tokenizer.is_special(token)

    def _piece(self, out: StepOutput, text: str, count: int, match: str | None) -> Response:
        """`count`: how many of the output's tokens belong to the answer."""
        cut = len(out.token_ids) - count
        ids = out.token_ids[:count]
        error_code, error_message = described(out.error) if out.error is not None else (None, None)
        return Response(
            text=text,
            generate_token_len=self._generated,
            input_token_len=len(self._prompt),
            finish_reason="stop" if match is not None else out.finish_reason,
            token_ids=ids,
            logprobs=None if self._config.logprobs is None else _by_id(ids, out.logprobs),
            prompt_logprobs=_prompt_by_id(self._prompt, out.prompt_logprobs),
            logits=_without_last(out.logits, cut),
            last_hidden_state=_without_last(out.hidden, cut),
            routed_experts=_without_last(out.routes, cut),
            index=self._options.index,
            choice=self._choice,
            cached_tokens=out.cached_tokens,
            queue_seconds=out.queue_seconds,
            stop_match=match if match is not None else self._named(out.stop_token),
            error_code=error_code,
            error_message=error_message,
        )

    def _named(self, stop_token: int | None) -> str | int | None:
        """The stop word that an id stands for, else the id."""
        return None if stop_token is None else self._options.stops.words.get(stop_token, stop_token)


def error_response(error: BaseException, index: int) -> Response:
    """What a prompt that failed answers with; its siblings go on."""
    code, message = described(error)
    return Response(
        text="",
        generate_token_len=0,
        input_token_len=0,
        finish_reason="error",
        index=index,
        error_code=code,
        error_message=message,
    )


def described(error: BaseException) -> tuple[str, str]:
    """An error's code and message, as a `Response` carries them."""
    if isinstance(error, LmdeployError):
        return error.code, str(error)
    return LmdeployError.code, f"{type(error).__name__}: {error}"


def _without_last(rows: Any, cut: int) -> Any:
    return rows if rows is None or not cut else rows[: len(rows) - cut]


def _by_id(ids: Sequence[int], entries: Sequence[TokenLogprobs]) -> list[dict[int, float]]:
    return [_entry(token, entry) for token, entry in zip(ids, entries, strict=False)]


def _prompt_by_id(
    ids: Sequence[int], entries: Sequence[TokenLogprobs | None] | None
) -> list[dict[int, float] | None] | None:
    if entries is None:
        return None
    return [None if e is None else _entry(token, e) for token, e in zip(ids, entries, strict=True)]


def _entry(token: int, entry: TokenLogprobs) -> dict[int, float]:
    """The best tokens first, in their order, then the one that was taken if it is not among them."""
    return {**entry.top, token: entry.logprob}
