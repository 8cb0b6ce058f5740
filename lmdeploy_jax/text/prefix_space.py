"""`add_prefix_space` of tokenizer_config.json, where tokenizer.json says otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import tokenizers

# With these, transformers goes by tokenizer.json alone; other classes set it up anew, by the config.
_GENERIC = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
_PARTS = ("normalizer", "pre_tokenizer", "decoder")
_STEPS = ("normalizers", "pretokenizers", "decoders")  # of a part that is a sequence

Step = dict[str, Any]


def with_prefix_space(tokenizer: tokenizers.Tokenizer, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer, putting a space before its text, or not, as the config says."""
    add_space = config.get("add_prefix_space")
    if not isinstance(add_space, bool) or config.get("tokenizer_class") in _GENERIC:
        return tokenizer
    parts = {name: _state(getattr(tokenizer, name)) for name in _PARTS}
    changed = {name: _rewritten(part, lambda step: _step(step, add_space)) for name, part in parts.items()}
    if changed == parts:
        return tokenizer
    return tokenizers.Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | changed))


def _state(part: Any) -> Step | None:
    return json.loads(part.__getstate__()) if part else None


def _rewritten(part: Step | None, rewrite: Callable[[Step], Step | None]) -> Step | None:
    if part is None:
        return None
    key = next((key for key in _STEPS if key in part), None)
    if key is None:
        return rewrite(part)
    return part | {key: [new for step in part[key] if (new := rewrite(step)) is not None]}


def _step(step: Step, add_space: bool) -> Step | None:
    """A step of a part; None where it is to go."""
    match step["type"]:
        case "ByteLevel" if "use_regex" in step and step.get("add_prefix_space") is not add_space:
            return step | {"add_prefix_space": add_space}
        case "Metaspace" if not add_space:
            return step | {"prepend_scheme": "never"}
        case "Prepend" if not add_space:
            return None
        case "Strip" if not add_space and step.get("content") == " ":
            return None
    return step
