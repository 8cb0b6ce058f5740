"""Training of the tiny models' tokenizers: byte-level BPE with Qwen's special tokens. Needs transformers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics  # plain English that comes with every Python
from typing import TYPE_CHECKING, Any

from . import vision_tasks
from .tasks import answer_text, training_conversation, words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 2560
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# Words with a sign or space before them, single digits, runs of signs, line breaks, spaces (as Qwen splits).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEMPLATE = Path(__file__).parent / "chat_template.jinja"

VISION_VOCAB_SIZE = 512
VISION_ADDED = ("<img>", "</img>", "<IMG_CONTEXT>")
VISION_TEMPLATE = Path(__file__).parent / "vision_chat_template.jinja"


def corpus(seed: int, conversations: int = 20_000) -> list[str]:
    """What the merges are learned from: conversations of the tasks, and some plain English."""
    rng = random.Random(seed)
    texts: list[str] = list(topics.values())
    for _ in range(conversations):
        conversation = training_conversation(rng)
        texts += [answer_text(message) for message in conversation.messages]
        texts += [str(tool["function"]).replace("'", '"') for tool in conversation.tools or ()]
    texts += [f" {word}" for word in (*words.WORDS, *words.NAMES, *words.CITIES)] * 100
    texts += [
        '"parameters": {"type": "object", "properties": {',
        '"function", "arguments", "description"',
    ] * 1000
    return texts + ["system\n", "user\n", "assistant\n", "</tools>\nCall a tool like this:\n"] * 500


def vision_corpus(seed: int, scenes: int = 10_000) -> list[str]:
    """Questions and answers of tiny-vision's tasks, in lower case alone: so every capital letter stays a
    token of its own, and words on signs are read letter by letter.
    """
    rng = random.Random(seed)
    found = (question for _ in range(scenes) for question in vision_tasks.training_scene(rng)[1])
    texts = [text.lower() for question in found for text in (question.text, question.answer)]
    return [*texts, *["system\n", "user\n", "assistant\n"] * 1000]


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """tiny-chat's, with the chat template in it; the same seed gives the same vocabulary."""
    return bpe(corpus(seed), VOCAB_SIZE, ADDED, TEMPLATE)


def train_vision_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """tiny-vision's, likewise."""
    return bpe(vision_corpus(seed), VISION_VOCAB_SIZE, VISION_ADDED, VISION_TEMPLATE)


def bpe(texts: Sequence[str], size: int, added: Sequence[str], template: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `size` tokens: merges learned from `texts`, then `SPECIAL` and `added`."""
    import tokenizers as tk
    from transformers import PreTrainedTokenizerFast

    model = tk.Tokenizer(tk.models.BPE())
    split = tk.pre_tokenizers.Split(tk.Regex(PATTERN), behavior="isolated")
    level: Any = tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = tk.pre_tokenizers.Sequence([split, level])
    model.decoder = tk.decoders.ByteLevel()
    alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
    trainer = tk.trainers.BpeTrainer(vocab_size=size - len((*SPECIAL, *added)), initial_alphabet=alphabet,
                                     show_progress=False)  # fmt: skip
    model.train_from_iterator(texts, trainer)
    model.add_special_tokens(list(SPECIAL))
    model.add_tokens([tk.AddedToken(token, normalized=False) for token in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=2048,
        clean_up_tokenization_spaces=False, chat_template=template.read_text(),
    )  # fmt: skip
