"""tiktoken's vocabularies (`tiktoken.model`, `*.tiktoken`) as tokenizers of the `tokenizers` library.

Such a file holds tokens and their ranks and nothing else: how texts are cut before merging, and what ids
special tokens have, is in the Python code beside it, which is not run. So a file is read where its pattern is
known here.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lmdeploy_jax.errors import CheckpointError
from lmdeploy_jax.text.pieces import byte_level_token
from lmdeploy_jax.text.settings import AddedToken, TokenizerSettings

_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = (r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _cased(upper: str, lower: str) -> tuple[str, str]:
    """Words that end in small letters, and others."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{upper}*{lower}+{_SUFFIX}?", f"{start}{upper}+{lower}*{_SUFFIX}?"


@dataclass(frozen=True)
class Encoding:
    """A family of such vocabularies: how texts are cut, and the special tokens that no file names.

    reserved: how many ids behind the last rank are special; those without a name get one made of
        `reserved_name` and their id.
    """

    patterns: tuple[str, ...]
    reserved: int = 0
    reserved_name: str = ""
    special: Mapping[int, str] | None = None


KIMI = Encoding(
    (
        r"[\p{Han}]+",
        *_cased(rf"[{_UPPER}&&[^\p{{Han}}]]", rf"[{_LOWER}&&[^\p{{Han}}]]"),
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        *_REST,
    ),
    reserved=256,
    reserved_name="<|reserved_token_{}|>",
)
O200K = Encoding(
    (*_cased(f"[{_UPPER}]", f"[{_LOWER}]"), r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", *_REST),
    special={199999: "<|endoftext|>", 200018: "<|endofprompt|>"},
)
HARMONY = replace(
    O200K,
    reserved=1090,
    reserved_name="<|reserved_{}|>",
    special={
        199998: "<|startoftext|>",
        199999: "<|endoftext|>",
        200002: "<|return|>",
        200003: "<|constrain|>",
        200005: "<|channel|>",
        200006: "<|start|>",
        200007: "<|end|>",
        200008: "<|message|>",
        200012: "<|call|>",
        200018: "<|endofprompt|>",
    },
)
_BY_CLASS = {"TikTokenTokenizer": KIMI}
_BY_NAME = {"o200k_harmony": HARMONY, "o200k_base": O200K}


def find_tiktoken(folder: Path, settings: TokenizerSettings) -> tuple[Path, Encoding] | None:
    """The vocabulary of a folder, and how it is used; None where there is none that is known here."""
    known = _BY_CLASS.get(settings.config.get("tokenizer_class", ""))
    if known is not None and (folder / "tiktoken.model").is_file():
        return folder / "tiktoken.model", known
    named = ((folder / f"{name}.tiktoken", encoding) for name, encoding in _BY_NAME.items())
    return next(((path, encoding) for path, encoding in named if path.is_file()), None)


def read_tiktoken(
    path: Path, encoding: Encoding, settings: TokenizerSettings
) -> tuple[tokenizers.Tokenizer, TokenizerSettings]:
    """The tokenizer, and the settings with every special token's id. Raises CheckpointError."""
    ranks = _ranks(path)
    spelled = {token: byte_level_token(token) for token in ranks}
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    merges = [(spelled[left], spelled[right]) for left, right in _merges(ranks)]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    pattern = tokenizers.Regex("|".join(encoding.patterns))
    cut = pre_tokenizers.Split(pattern, behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, replace(settings, added=_added(max(ranks.values()) + 1, encoding, settings))


def _ranks(path: Path) -> dict[bytes, int]:
    """Lines of a token in base64 and its rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(
                f"{path}: line {number} is no token in base64 and a rank ({error}). Download the file again."
            ) from error
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise CheckpointError(f"{path} lacks tokens of single bytes. Download the file again.")
    return ranks


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Pairs that make a token, in the order of its rank: tiktoken merges whatever has the lowest one."""
    found = []
    for token, rank in ranks.items():
        pairs = ((token[:at], token[at:]) for at in range(1, len(token)))
        known = [(ranks[a], ranks[b], a, b) for a, b in pairs if a in ranks and b in ranks]
        found += [(rank, *pair) for pair in known]
    return [(left, right) for _, _, _, left, right in sorted(found)]


def _added(first: int, encoding: Encoding, settings: TokenizerSettings) -> dict[int, AddedToken]:
    """Special tokens by id without a gap, since `tokenizers` counts them through."""
    known = {i: AddedToken(text) for i, text in (encoding.special or {}).items()} | settings.added
    end = max([first + encoding.reserved, *(i + 1 for i in known)])
    filler = encoding.reserved_name or "<|reserved_{}|>"
    return {i: known.get(i) or AddedToken(filler.format(i)) for i in range(first, end)}
