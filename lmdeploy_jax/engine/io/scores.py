"""What a model that judges texts says of them: a request for it, and numbers of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lmdeploy_jax.errors import ContextLengthError, EngineError, LogitsError, RequestError
from lmdeploy_jax.messages import GenerationConfig, Response
from lmdeploy_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lmdeploy_jax.models.score_config import ScoreConfig

# Judged is the last token of the prompt, or every one. An end of sequence would take its row with it.
LAST = GenerationConfig(max_new_tokens=1, ignore_eos=True, output_logits="generation")
EVERY = GenerationConfig(max_new_tokens=1, ignore_eos=True, output_logits="all")

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
    'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
BEHIND = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


class Judge:
    """A model's score head, whose words and steps are tokens of its tokenizer.

    session_len: most tokens of a text. Raises `RequestError` where words or steps are no tokens: then the
    head cannot be asked.
    """

    def __init__(self, head: ScoreConfig, tokenizer: Tokenizer, session_len: int) -> None:
        self.head = head
        self._tokenizer, self._most = tokenizer, session_len
        self._words = [self._only_id(word) for word in head.labels] if head.words else None
        self._step = self._only_id(head.step) if head.step else None
        self.config = LAST if self._step is None else EVERY

    def _only_id(self, word: str) -> int:
        ids = self._tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1:
            raise RequestError(
                f"The model cannot judge: {word!r} is {len(ids)} tokens of its tokenizer, not one."
            )
        return ids[0]

    @property
    def scores_pairs(self) -> bool:
        """Whether how well a document answers a query can be one number."""
        return self.head.purpose == "classes" and (self.head.words or len(self.head.labels) == 1)

    @property
    def rewards(self) -> bool:
        """Whether what it says of a text can be one number, or one a step."""
        return self.head.purpose != "classes" or len(self.head.labels) == 1

    def logits(self, prompt: Sequence[int], answer: Response) -> np.ndarray:
        """f32 [labels], or [steps, labels]: what the head gives for a prompt, see `config`.

        Raises `EngineError` for an answer that failed, `LogitsError` where a number is not finite.
        """
        if answer.logits is None:
            raise EngineError(
                f"No score: the request ended with {answer.finish_reason}, {answer.error_message}."
            )
        rows = answer.logits[: len(prompt)]
        found = rows[-1] if self._step is None else rows[[i for i, t in enumerate(prompt) if t == self._step]]
        found = found if self._words is None else found[self._words]
        if not np.isfinite(found).all():
            raise LogitsError("The model's scores are not finite. Try dtype 'float32'.")
        return np.asarray(found, np.float32)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """The same shape; numbers that are none stay as they are."""
        if self.head.activation == "none":
            return logits
        if self.head.activation == "sigmoid":
            return (0.5 * (1 + np.tanh(0.5 * logits))).astype(np.float32)
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        return (powers / powers.sum(-1, keepdims=True)).astype(np.float32)

    def reward(self, logits: np.ndarray) -> float | list[float]:
        """How good the text is, or the probability that each of its steps is right."""
        return float(logits[0]) if self._step is None else self.probabilities(logits)[:, -1].tolist()

    def score(self, logits: np.ndarray) -> float:
        """How well a document answers a query: the last label's probability, or the number itself."""
        return float(self.probabilities(logits)[-1])

    def pair(self, query: str, document: str, instruction: str | None) -> list[int]:
        """Both as one prompt: the model's own, or one after the other. Raises `ContextLengthError` for texts
        that are far too long, without tokenising them whole.
        """
        own = self.head.qwen3_prompt
        body = f"<Instruct>: {instruction or INSTRUCTION}\n<Query>: {query}\n<Document>: {document}"
        texts = (BEFORE, body, BEHIND) if own else (query, document)
        return [token for text in texts for token in self._encoded(text, add_special_tokens=not own)]

    def _encoded(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self._tokenizer.exceeds(text, self._most):
            told = f"more than {self._most} tokens (a text of {len(text)} characters)"
            raise ContextLengthError.of(told, self._most)
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
