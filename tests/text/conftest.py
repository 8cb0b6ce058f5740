"""Small tokenizers of every kind, made here and saved by their own libraries."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello, hello world! It's 2024: 1+1=2, 3*7=21.",
    "def f(x):\n    return x  # indented\n\n\ttabs and   spaces",
    "Grüße aus Köln, où ça va? Москва слезам не верит. 今天天气很好,我们去公园吧。日本語も少し。",
    "naïve café résumé — “quotes” … and emoji 😀 👍🏽 too",
] * 20

BYTES = [f"<0x{b:02X}>" for b in range(256)]


def save(backend: tokenizers.Tokenizer, folder: Path, **settings: object) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=backend, **settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Llama-3 and Qwen have it: byte-level BPE, BOS put in front."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<｜tool▁calls｜>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([tokenizers.AddedToken("<think>", normalized=False, special=False)])
    bos = backend.token_to_id(special[0])
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    folder = tmp_path_factory.mktemp("byte_level")
    return save(backend, folder, bos_token="<|begin_of_text|>", eos_token="<|im_end|>")


@pytest.fixture(scope="session")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Llama-2's tokenizer.json has it: ▁ for spaces, byte fallback, one leading space stripped."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    plain = [text.encode("ascii", "ignore").decode() for text in CORPUS]
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=["<unk>", "<s>", "</s>", *BYTES])
    backend.train_from_iterator(plain, trainer)
    backend = unspecial_bytes(backend)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    folder = tmp_path_factory.mktemp("metaspace")
    return save(backend, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unspecial_bytes(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Byte pieces are ordinary vocabulary: the trainer can only make them as special tokens."""
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in BYTES]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


@pytest.fixture(scope="session")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder that works on text, not on bytes."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]"])
    backend.train_from_iterator(CORPUS, trainer)
    backend.decoder = decoders.WordPiece(cleanup=False)
    return save(backend, tmp_path_factory.mktemp("wordpiece"), unk_token="[UNK]", eos_token="[SEP]")


def train_sentencepiece(folder: Path, **options: object) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.splitlines()), model_writer=model,
        model_type="bpe", vocab_size=500, byte_fallback=True, character_coverage=0.98, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, **options,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="session")
def sp_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare tokenizer.model, as Llama-2 and InternLM2 ship it."""
    return train_sentencepiece(tmp_path_factory.mktemp("sp"))


@pytest.fixture(scope="session")
def internlm2(sp_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chat tokens as InternLM2 has them: some beyond the model's vocabulary, one in place of a piece."""
    folder = tmp_path_factory.mktemp("internlm2")
    (folder / "tokenizer.model").write_bytes((sp_model / "tokenizer.model").read_bytes())
    names = {499: "<|plugin|>", 500: "<|im_start|>", 501: "<|im_end|>"}
    added = {str(i): {"content": name, "special": True} for i, name in names.items()}
    added["502"] = {"content": "<tool>", "special": False}
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 501]}))
    return folder
