"""Texts judged by a model's score head, for the protocols that tell of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from lmdeploy_jax.engine.io.scores import Judge
from lmdeploy_jax.prompt import EncodedPrompt
from lmdeploy_jax.server.errors import ApiError, failed_answer
from lmdeploy_jax.server.generation import Generation, Job
from lmdeploy_jax.server.service import Service

Encode = Callable[[], EncodedPrompt | list[int]]


@dataclass(frozen=True)
class Judged:
    """The head's numbers for each text (see `Judge.logits`), and how many tokens were read."""

    judge: Judge
    logits: list[np.ndarray]
    tokens: int

    @property
    def usage(self) -> dict[str, int]:
        """As OpenAI's embeddings have it."""
        return {"prompt_tokens": self.tokens, "total_tokens": self.tokens}


def judge_of(service: Service) -> Judge:
    """Raises `ApiError` for a model without a score head."""
    judge = service.frontend.judge
    if judge is None:
        message = (
            "This model has no head that judges texts. Serve a reranker, a classifier or a reward model; "
            "docs/server.md says how a language model that answers yes or no becomes one."
        )
        raise ApiError(400, message, code="unsupported_model")
    return judge


async def judged(service: Service, judge: Judge, texts: Sequence[Encode]) -> Judged:
    """Encodes the texts on a worker thread and asks the model. Raises `ApiError` and what encoding raises."""
    generation = service.admit(len(texts))
    await generation.start(partial(_submit, generation, judge, texts))
    answers = {answer.index: answer for answer in await generation.complete()}
    found = []
    for i, job in enumerate(generation.jobs):
        if answers[i].finish_reason in ("error", "abort"):
            raise failed_answer(answers[i].error_code, answers[i].error_message or "The request was aborted.")
        found.append(judge.logits(job.prompt.ids, answers[i]))
    return Judged(judge, found, sum(len(job.prompt) for job in generation.jobs))


def _submit(generation: Generation, judge: Judge, texts: Sequence[Encode]) -> None:
    prompts = (encode() for encode in texts)
    jobs = [Job(p if isinstance(p, EncodedPrompt) else EncodedPrompt(p), judge.config) for p in prompts]
    generation.submit(jobs, stream=False)
