"""Text on one side, the engine's token ids on the other. The pipeline and the server are built on it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from lmdeploy_jax.engine.base import EngineBase
from lmdeploy_jax.engine.facts import within
from lmdeploy_jax.engine.io.answer import OutputOptions
from lmdeploy_jax.engine.io.output import Flush, OutputProcessor, Sink
from lmdeploy_jax.engine.io.params import ModelLimits, sampling_params, stops
from lmdeploy_jax.engine.io.scores import Judge
from lmdeploy_jax.engine.prepare import PreparedModel, prepare
from lmdeploy_jax.engine.request import Request
from lmdeploy_jax.errors import ContextLengthError, EngineError
from lmdeploy_jax.logs import REQUEST, shortened
from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.prompt import EncodedPrompt
from lmdeploy_jax.text.chat_template import ChatTemplate
from lmdeploy_jax.text.conversation import Message
from lmdeploy_jax.text.jinja_template import HfChatTemplate
from lmdeploy_jax.text.prompts import Prompt
from lmdeploy_jax.text.template_arguments import SWITCHES, checked_tools, checked_variables, for_template
from lmdeploy_jax.text.tokenizer import Tokenizer
from lmdeploy_jax.vision.access import MediaAccess

if TYPE_CHECKING:
    from lmdeploy_jax.engine.io.images import PromptImages
    from lmdeploy_jax.engine.prepare import Vision
    from lmdeploy_jax.guided.grammars import Grammar, Grammars

logger = logging.getLogger("lmdeploy_jax")
_MOST_NAMES, _LONGEST_NAME = 256, 64  # of template variables that are told of, each once

MOST_COUNTED = 1 << 19  # tokens of a text that is to be counted, not continued


@dataclass(frozen=True)
class PromptOptions:
    """How a prompt is encoded. Without `chat` it is raw text, messages their contents joined.

    cache_salt: cached pages are shared only with prompts of the same salt. access: what images may be loaded
    from.
    Raises `RequestError` for tools and variables that no template can be given.
    """

    chat: bool = True
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    cache_salt: str = ""
    access: MediaAccess = field(default_factory=MediaAccess)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tools", checked_tools(self.tools) if self.tools else None)
        object.__setattr__(self, "template_kwargs", checked_variables(self.template_kwargs))


class Frontend:
    """An engine with its tokenizer and chat template. Every method may be called from any thread.

    The engine is closed with the last reference to its frontend, so that a notebook's cell that is run again
    leaves neither threads nor memory behind.
    """

    def __init__(
        self,
        engine: EngineBase,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        max_log_len: int | None = None,
        vision: Vision | None = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.template = template
        self.limits = ModelLimits(
            session_len=engine.session_len,
            vocab_size=engine.vocab_size,
            encode=partial(tokenizer.encode, add_bos=False, add_special_tokens=False),
            eos_ids=_within_vocabulary(tokenizer.eos_token_ids, engine.vocab_size),
            template_stops=tuple(template.stop_words),
            is_special=tokenizer.is_special,
            reports_routes=engine.config.enable_return_routed_experts,
        )
        self._images = None if vision is None else _prompt_images(vision, tokenizer, engine.session_len)
        self._max_log_len = max_log_len
        self._unread: set[str] = set()  # variables that have been warned of
        # Nothing of what these threads hold leads back here: else this would never be the last reference.
        self._outputs = OutputProcessor(tokenizer, partial(_abort, engine))
        self._finalizer = weakref.finalize(self, _close, engine, self._outputs)

    @classmethod
    def from_engine(
        cls,
        engine: EngineBase,
        model: PreparedModel | None = None,
        max_log_len: int | None = None,
    ) -> Frontend:
        """An engine with the tokenizer and template of the model that it was opened on; None is what its
        checkpoint says.

        Closes the engine where that fails. Raises `ConfigError` and `CheckpointError`.
        """
        try:
            model = model or prepare(engine.folder, engine.config)
            return cls(engine, model.tokenizer, model.template, max_log_len, model.vision)
        except BaseException:
            engine.close()
            raise

    def encode(self, prompt: Prompt, options: PromptOptions, *, to_count: bool = False) -> EncodedPrompt:
        """The prompt's tokens, through the chat template unless `options` say no.

        to_count: the ids are wanted for themselves, so that more than the context holds may be given, up to
            `MOST_COUNTED`.
        Raises `RequestError` for a conversation that the template refuses, `ContextLengthError` for a text
        that is far too long, without tokenising it whole.
        """
        salt = options.cache_salt.encode()
        if prompt.token_ids is not None:
            return EncodedPrompt(list(prompt.token_ids), salt=salt)
        messages = [dict(m) for m in prompt.messages or ()]
        parts = [] if self._images is None else self._images.parts(messages)
        if self._images is None or not parts:
            return EncodedPrompt(self._ids(prompt, messages, options, to_count), salt=salt)
        images = self._images.loaded(parts, options.access, self._most(to_count))
        written = self._images.written(messages)
        ids = self._ids(prompt, written, options, to_count, partial(self._images.expand, images=images))
        spans, given, rope = self._images.placed(ids, images)
        return EncodedPrompt(ids, spans, salt, given, rope)

    @cached_property
    def judge(self) -> Judge | None:
        """The model's score head; None: it has none. Raises `RequestError` for one that cannot be asked."""
        head = self.engine.model_config.score
        return None if head is None else Judge(head, self.tokenizer, self.limits.session_len)

    @property
    def takes_images(self) -> bool:
        """Whether messages may have images in them."""
        return self._images is not None

    def _ids(
        self,
        prompt: Prompt,
        messages: list[Message],
        options: PromptOptions,
        to_count: bool,
        expand: Callable[[str], str] = str,
    ) -> list[int]:
        """expand: what the rendered text goes through before it is tokenised."""
        if not options.chat:
            text = prompt.text if prompt.text is not None else "".join(m.get("content", "") for m in messages)
            return self.encode_text(expand(text), to_count=to_count)
        if prompt.text is not None:
            messages = [{"role": "user", "content": prompt.text}]
        variables = self.template_variables(options.template_kwargs)
        self._warn_of_unread(variables)
        text = self.template.render(messages, tools=options.tools, **variables)
        # A checkpoint's own template writes every special token itself, as transformers has it.
        complete = isinstance(self.template, HfChatTemplate)
        return self.encode_text(expand(text), add_special_tokens=not complete, to_count=to_count)

    def template_variables(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Checked variables by the chat template's own names, see `for_template`."""
        return for_template(given, self.template.reads) if given else {}

    def encode_raw(self, given: str | Sequence[int], cache_salt: str = "") -> EncodedPrompt:
        """A text as it is, without the chat template, or token ids. Raises as `encode` does."""
        ids = self.encode_text(given) if isinstance(given, str) else given
        return EncodedPrompt(ids, salt=cache_salt.encode())

    def encode_text(
        self, text: str, *, add_bos: bool = True, add_special_tokens: bool = True, to_count: bool = False
    ) -> list[int]:
        """`Tokenizer.encode` for a text of any length, see `encode`. Call it off the event loop."""
        most = self._most(to_count)
        if self.tokenizer.exceeds(text, most):
            if to_count:
                raise ContextLengthError(
                    f"The input (a text of {len(text)} characters) has more than the {most} tokens that are "
                    "counted in one request. Send it in parts."
                )
            raise ContextLengthError.of(f"more than {most} tokens (a text of {len(text)} characters)", most)
        return self.tokenizer.encode(text, add_bos=add_bos, add_special_tokens=add_special_tokens)

    def _most(self, to_count: bool) -> int:
        """Tokens that a prompt may have."""
        return max(self.limits.session_len, MOST_COUNTED) if to_count else self.limits.session_len

    def _warn_of_unread(self, variables: dict[str, Any]) -> None:
        """Who sends a variable that the template never reads should know it."""
        told = {*variables}.difference(SWITCHES)
        unread = {name[:_LONGEST_NAME] for name in told - self.template.reads} if told else set()
        new = unread - self._unread
        if new and len(self._unread) < _MOST_NAMES:
            self._unread |= new
            logger.warning(
                "the chat template does not read these variables, so the prompt is the same without them: %s",
                ", ".join(map(ascii, sorted(new))),
            )

    def submit(
        self,
        prompt: EncodedPrompt,
        config: GenerationConfig,
        sink: Sink,
        *,
        index: int = 0,
        stream: bool = True,
        flush: Flush | None = None,
    ) -> int:
        """Start `config.n` answers; returns the request's id.

        `sink` is called on a worker's thread: with pieces if `stream`, else with each complete answer, and
        then `flush`, once for all the pieces that came together. Each of the `n` answers ends with one
        finish_reason. Raises `RequestError` and `EngineError`, and then
        calls no sink. A `response_format` is tried and compiled here, while the caller's thread waits.
        """
        ends = stops(config, self.limits)
        grammar = None if config.response_format is None else self._grammar(config.response_format)
        params = sampling_params(config, prompt.ids, self.limits, ends.ids, grammar)
        options = OutputOptions(config, ends, stream, index)
        listener = self._outputs.listener(prompt.ids, options, sink, flush)
        request = Request(prompt, params, listener, stream)
        if logger.isEnabledFor(REQUEST):
            text = shortened(self.tokenizer.decode(prompt.ids, skip_special_tokens=False), self._max_log_len)
            ids = shortened(prompt.ids, self._max_log_len)
            logger.log(
                REQUEST, "request %d: prompt=%r ids=%s config=%s", request.request_id, text, ids, config
            )
        self.engine.submit(request)
        return request.request_id

    def _grammar(self, form: dict[str, Any]) -> Grammar | None:
        return self._grammars.compile(form, here=self.engine.in_process)

    @cached_property
    def _grammars(self) -> Grammars:
        from lmdeploy_jax.guided.grammars import Grammars  # llguidance is loaded with the first grammar

        return Grammars(self.tokenizer, self.engine.vocab_size)

    def abort(self, request_id: int, choice: int | None = None) -> None:
        """End a request, or one of its answers. What has ended already is left alone."""
        _abort(self.engine, request_id, choice)

    def close(self) -> None:
        """Close the engine; what still runs ends with finish_reason "abort"."""
        self._finalizer()


def _prompt_images(vision: Vision, tokenizer: Tokenizer, session_len: int) -> PromptImages:
    """Text models start without importing what images need."""
    from lmdeploy_jax.engine.io.images import PromptImages

    return PromptImages(*vision, tokenizer, session_len)


def _abort(engine: EngineBase, request_id: int, choice: int | None) -> None:
    try:
        engine.abort(request_id, choice)
    except EngineError:
        logger.debug("request %d has ended with the engine", request_id)


def _close(engine: EngineBase, outputs: OutputProcessor) -> None:
    engine.close()
    outputs.close()


def _within_vocabulary(eos_ids: tuple[int, ...], vocab_size: int) -> frozenset[int]:
    """The ids that the model can give at all."""
    known = frozenset(within(eos_ids, vocab_size))
    if strangers := [i for i in eos_ids if i not in known]:
        logger.warning(
            "ids of eos_token_id beyond the model's %d tokens end nothing: %s", vocab_size, strangers
        )
    return known
