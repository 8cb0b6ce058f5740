"""`pipeline()`: a model that takes prompts and gives answers, in batches, streams and conversations.

Importing this module imports neither jax nor a tokenizer; opening a model does.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lmdeploy_jax.arguments import (
    Configs,
    Sessions,
    check_switches,
    id_lists,
    media_access,
    parse,
    parse_single,
    parse_turn,
    refuse,
    refuse_unknown_fields,
)
from lmdeploy_jax.config import EngineConfig, VisionConfig, engine_config, with_vision
from lmdeploy_jax.errors import EngineError, RequestError
from lmdeploy_jax.logs import set_level
from lmdeploy_jax.messages import GenerationConfig, Response
from lmdeploy_jax.prompt import EncodedPrompt
from lmdeploy_jax.session import Session, Turn
from lmdeploy_jax.stream import ResponseStream, start, turn_pieces, with_progress_bar

if TYPE_CHECKING:
    from lmdeploy_jax.engine.base import EngineBase
    from lmdeploy_jax.engine.io.frontend import Frontend
    from lmdeploy_jax.engine.prepare import PreparedModel
    from lmdeploy_jax.text import ChatTemplateConfig, Tokenizer
    from lmdeploy_jax.vision.access import MediaAccess

Ids = Sequence[int]


def pipeline(
    model_path: str | Path = "tiny-chat",
    backend_config: EngineConfig | None = None,
    chat_template_config: ChatTemplateConfig | str | None = None,
    log_level: str = "WARNING",
    max_log_len: int | None = None,
    trust_remote_code: bool = False,
    speculative_config: object = None,
    allowed_media_domains: Sequence[str] | None = None,
    **kwargs: Any,
) -> Pipeline:
    """Open a model: load, plan the memory, compile. The arguments are those of `Pipeline`."""
    return Pipeline(
        model_path,
        backend_config,
        chat_template_config,
        log_level,
        max_log_len,
        trust_remote_code,
        speculative_config,
        allowed_media_domains,
        **kwargs,
    )


class Pipeline:
    """A model, ready to answer. Usable from several threads at once, in a notebook, and as a context manager.

    model_path: a checkpoint folder, a hub id, or an embedded model's name.
    backend_config: a `JaxEngineConfig`, or one of LMDeploy's two, which is translated.
    chat_template_config: a built-in name, a .json or .jinja file, a `ChatTemplateConfig`; None is the
        checkpoint's own.
    log_level, max_log_len: how much is logged; at level REQUEST each prompt, its first `max_log_len`
        characters.
    progress: whether loading and compiling are told on stderr: bars on a terminal, else a line for each.
    allowed_media_domains: the only hosts that images are fetched from; None is all of them.
    vision_config: how images are encoded; None leaves it to the engine.
    trust_remote_code: as the field of `JaxEngineConfig`, for LMDeploy's signature.
    speculative_config: not supported; refused when set.

    Raises ConfigError, CheckpointError or UnsupportedModelError; TypeError for an unknown argument.
    """

    def __init__(
        self,
        model_path: str | Path = "tiny-chat",
        backend_config: EngineConfig | None = None,
        chat_template_config: ChatTemplateConfig | str | None = None,
        log_level: str = "WARNING",
        max_log_len: int | None = None,
        trust_remote_code: bool = False,
        speculative_config: object = None,
        allowed_media_domains: Sequence[str] | None = None,
        *,
        vision_config: VisionConfig | None = None,
        progress: bool = True,
        **unknown: Any,
    ) -> None:
        set_level(log_level)
        check_switches(progress=progress, trust_remote_code=trust_remote_code)
        refuse_unknown_fields(unknown)
        refuse("speculative_config", speculative_config, "speculative decoding is not implemented")
        config = with_vision(engine_config(backend_config), vision_config)
        config = replace(config, trust_remote_code=config.trust_remote_code or trust_remote_code)
        self._access = media_access(allowed_media_domains)
        from lmdeploy_jax.engine.prepare import prepare

        model = prepare(model_path, config, chat_template_config)
        self._frontend = open_frontend(model, max_log_len, progress=progress)

    @classmethod
    def from_frontend(cls, frontend: Frontend) -> Pipeline:
        """A pipeline over an engine that is already open. Closing the pipeline closes the engine."""
        self = cls.__new__(cls)
        self._frontend = frontend
        self._access = media_access(None)
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("A pipeline cannot be handed to another process; call pipeline() there.")

    @property
    def frontend(self) -> Frontend:
        """Engine, tokenizer and chat template behind this pipeline."""
        return self._frontend

    @property
    def _images(self) -> MediaAccess | None:
        """What images may be loaded from; None where the model takes none."""
        return self._access if self._frontend.takes_images else None

    @property
    def tokenizer(self) -> Tokenizer:
        return self._frontend.tokenizer

    def infer(
        self,
        prompts: Any = None,
        gen_config: Configs = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
        use_tqdm: bool = False,
        **kwargs: Any,
    ) -> Response | list[Response]:
        """Answer one prompt, or several in their order.

        prompts: a text, a message, a conversation (list of messages), token ids, or a list of such; where the
            model takes images, a pair of a text and an image or a list of images too (a path, a URL, a PIL
            image or an array), which stand where the text has `vl.IMAGE_TOKEN`s, if it has any.
        gen_config: one for all prompts, or a list with one for each.
        do_preprocess: False passes texts on as they are, without the chat template.
        use_tqdm: show a progress bar.
        kwargs: `input_ids` in the place of prompts; `tools`, `enable_thinking`, `reasoning_effort` and
            `chat_template_kwargs` for the chat template; `mm_processor_kwargs` and `media_io_kwargs`,
            options of all images and videos.

        A prompt that cannot be served answers with finish_reason "error" and an error_message, which is
        logged too, and the others go on. Raises
        ValueError for a form that is no prompt and for lists of different lengths, TypeError for an unknown
        argument. An exception, Ctrl-C too, aborts what has been submitted.
        """
        call = parse(
            prompts,
            gen_config,
            None,
            kwargs,
            do_preprocess=do_preprocess,
            adapter_name=adapter_name,
            images=self._images,
            use_tqdm=use_tqdm,
        )
        answers: list[list[Response]] = [[] for _ in call.requests]
        with start(self._frontend, call, stream=False) as stream:
            for answer in with_progress_bar(stream) if use_tqdm else stream:
                answers[answer.index].append(answer)
        responses = [_with_choices(answer) for answer in answers]
        return responses[0] if call.single else responses

    def __call__(
        self, prompts: Any = None, gen_config: Configs = None, **kwargs: Any
    ) -> Response | list[Response]:
        """The same as `infer`."""
        return self.infer(prompts, gen_config, **kwargs)

    def batch_infer(self, *args: Any, **kwargs: Any) -> Response | list[Response]:
        """The same as `infer`, which LMDeploy prefers too."""
        return self.infer(*args, **kwargs)

    def generate(self, prompt: Any = None, *args: Any, **kwargs: Any) -> AsyncIterator[Response]:
        """The same as `async_stream`, under the name that LMDeploy has given up."""
        return self.async_stream(prompt, *args, **kwargs)

    def stream_infer(
        self,
        prompts: Any = None,
        sessions: Sessions = None,
        gen_config: Configs = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
        stream_response: bool = True,
        **kwargs: Any,
    ) -> ResponseStream:
        """Answer as `infer` does, in pieces as they come. Work starts with the call.

        A piece holds what is new; `.index` tells its prompt and `.choice` its answer, and the last piece of
        each answer carries the finish_reason. sessions: one for each prompt, through which it can be
        aborted.
        stream_response: False gives one piece, the complete answer, for each.
        """
        call = parse(
            prompts,
            gen_config,
            sessions,
            kwargs,
            do_preprocess=do_preprocess,
            adapter_name=adapter_name,
            images=self._images,
            stream_response=stream_response,
        )
        return start(self._frontend, call, stream=stream_response)

    async def async_stream(
        self,
        prompt: Any = None,
        gen_config: GenerationConfig | None = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
        stream_response: bool = True,
        **kwargs: Any,
    ) -> AsyncIterator[Response]:
        """The pieces of one prompt's answers, without blocking the event loop.

        Cancelling the task, or closing the iterator, aborts the request. A prompt that cannot be served
        gives one piece with finish_reason "error".
        """
        from lmdeploy_jax.async_stream import pieces

        call = parse_single(
            prompt,
            gen_config,
            kwargs,
            do_preprocess=do_preprocess,
            adapter_name=adapter_name,
            images=self._images,
            stream_response=stream_response,
        )
        async for piece in pieces(self._frontend, call.requests[0], call.options, stream=stream_response):
            yield piece

    def chat(
        self,
        prompt: Turn,
        session: Session | None = None,
        gen_config: GenerationConfig | None = None,
        stream_response: bool = False,
        adapter_name: str | None = None,
        **kwargs: Any,
    ) -> Session | Iterator[Response]:
        """The next turn of a conversation, whose history is sent again with every turn.

        prompt: the user's text, one with an image or images as a pair, a message, or several messages (a
            system prompt, a tool's results).
        session: as `session()` or an earlier `chat` gave it; None starts a new one.
        Returns the session with its `response` and `history` brought up to date, or when streaming an
        iterator of pieces; closing it, or an exception, aborts the answer. Only complete turns enter the
        history. Raises `RequestConflictError` if the session is still answering, ValueError for what is no
        turn, TypeError for what is no session or config.
        """
        session = self.session() if session is None else session
        call = parse_turn(
            prompt,
            session,
            gen_config,
            kwargs,
            adapter_name=adapter_name,
            images=self._images,
            stream_response=stream_response,
        )
        stream = start(self._frontend, call, stream=stream_response)
        session.prompt, session.response = prompt, None
        pieces = turn_pieces(session, prompt, stream)
        if stream_response:
            return pieces
        for _ in pieces:
            pass
        return session

    def session(self, gen_config: GenerationConfig | None = None) -> Session:
        """A new, empty conversation."""
        return Session(gen_config)

    def get_ppl(self, input_ids: Ids | Sequence[Ids]) -> list[float]:
        """The mean cross-entropy of each sequence's tokens after its first, in nats.

        input_ids: one sequence of at least two token ids, or several. Raises `RequestError` for one that is
            too short or too long.
        """
        sequences, _ = id_lists(input_ids)
        short = next((i for i, ids in enumerate(sequences) if len(ids) < 2), None)
        if short is not None:
            raise RequestError(
                f"input_ids[{short}] has {len(sequences[short])} tokens: get_ppl needs at least 2."
            )
        config = GenerationConfig(max_new_tokens=1, prompt_logprobs=0, ignore_eos=True)
        answers = self._answers(sequences, config)
        return [cross_entropy(ids, answer) for ids, answer in zip(sequences, answers, strict=True)]

    def get_reward_score(self, input_ids: Ids | Sequence[Ids]) -> list[float | list[float]]:
        """How good a reward model finds each sequence; of a process reward model, the probability that each
        step is right.

        input_ids: one sequence of token ids, or several. Raises ValueError for a model without such a head,
        `RequestError` for a sequence that is too long.
        """
        judge = self._frontend.judge
        if judge is None or not judge.rewards:
            raise ValueError(f"{self._architecture} is not in reward model list: its head gives no reward.")
        sequences, _ = id_lists(input_ids)
        answers = self._answers(sequences, judge.config)
        pairs = zip(sequences, answers, strict=True)
        return [judge.reward(judge.logits(ids, answer)) for ids, answer in pairs]

    @property
    def _architecture(self) -> str:
        from lmdeploy_jax.text.settings import read_object

        config = read_object(self._frontend.engine.folder / "config.json")
        return str((config.get("architectures") or ["This"])[0])

    def _answers(self, sequences: Sequence[list[int]], config: GenerationConfig) -> list[Response]:
        """The complete answer to each, in their order."""
        answers: dict[int, Response] = {}
        with ResponseStream(self._frontend, stream=False) as stream:
            for i, ids in enumerate(sequences):
                stream.expect(i, config)
                stream.submit(i, EncodedPrompt(ids), config)
            for answer in stream:
                answers[answer.index] = answer
        return [answers[i] for i in range(len(sequences))]

    def close(self) -> None:
        """Abort what runs and free the engine. May be called twice."""
        self._frontend.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_frontend(model: PreparedModel, max_log_len: int | None = None, *, progress: bool = True) -> Frontend:
    """A prepared model, loaded into an engine of this process; with `dp` or `nnodes` into processes of their
    own, of which one may be lost.
    """
    from lmdeploy_jax.engine.io.frontend import Frontend

    return Frontend.from_engine(_open_engine(model, progress), model, max_log_len)


def _open_engine(model: PreparedModel, progress: bool) -> EngineBase:
    if model.config.dp > 1 or model.config.nnodes > 1:
        from lmdeploy_jax.engine.process.replicas import open_remote

        return open_remote(model.folder, model.config, progress=progress)
    from lmdeploy_jax.engine.core.engine import Engine  # brings JAX

    return Engine(model.folder, model.config, progress=progress)


def _with_choices(answers: list[Response]) -> Response:
    """One prompt's complete answers as its first with the others in `choices`."""
    first, *others = sorted(answers, key=lambda answer: answer.choice)
    first.choices = others
    return first


def cross_entropy(ids: Sequence[int], answer: Response) -> float:
    """The mean over tokens after the first, in nats, from an answer that has `prompt_logprobs`.

    Raises `EngineError` for one that hasn't.
    """
    if answer.prompt_logprobs is None:
        raise EngineError(
            f"No perplexity: the request ended with {answer.finish_reason}, {answer.error_message}."
        )
    scores = [
        entry[token] for token, entry in zip(ids, answer.prompt_logprobs, strict=True) if entry is not None
    ]
    return -math.fsum(scores) / len(scores)
