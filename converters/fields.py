"""Reading a HuggingFace `config.json`: typed, and strict about what changes the maths."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

from lmdeploy_jax.errors import CheckpointError, UnsupportedModelError

log = logging.getLogger("lmdeploy_jax")
T = TypeVar("T")
REQUIRED: Any = object()
MOST = 2**31 - 1  # sizes are 32-bit integers on the devices, numbers 32-bit floats
LARGEST = 3.4e38
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


HARMLESS = _words("""
    architectures model_type auto_map torch_dtype dtype transformers_version use_cache initializer_range
    pad_token_id bos_token_id eos_token_id sep_token_id decoder_start_token_id attention_dropout
    residual_dropout resid_pdrop embd_pdrop hidden_dropout attn_implementation pretraining_tp
    tie_encoder_decoder is_decoder is_encoder_decoder return_dict output_attentions output_hidden_states
    cache_implementation task_specific_params problem_type id2label label2id finetuning_task
    keys_to_ignore_at_inference gradient_checkpointing use_bfloat16 unsloth_version unsloth_fixed
    num_nextn_predict_layers
    output_router_logits router_aux_loss_coef router_z_loss_coef aux_loss_alpha seq_aux input_jitter_noise
    rope_theta rope_scaling rope_parameters original_max_position_embeddings partial_rotary_factor
""")
"""Fields that do not change a forward pass, and those of RoPE, of which `rope.py` takes care."""

LENGTHS = _words("""
    max_position_embeddings n_positions max_seq_len seq_length model_max_length max_sequence_length
    max_seq_length seq_len
""")
"""Names under which a config may give its longest sequence."""

QUANTISATION = _words("quantization_config compression_config")
"""Fields that `formats` reads."""

MATHS = _words("""
    tie_word_embeddings sliding_window use_sliding_window
    max_window_layers layer_types sliding_window_pattern attention_bias qkv_bias bias use_bias use_qkv_bias
    mlp_bias attention_out_bias qk_norm use_qk_norm qk_layernorm clip_qkv rotary_pct rotary_percent
    no_rope_layers no_rope_layer_interval rope_local_base_freq rope_interleaved use_mrope mrope_section
    embedding_multiplier residual_multiplier logits_scaling attention_multiplier logit_scale scale_emb
    scale_depth dim_model_base mup_width_scale attn_logit_softcapping final_logit_softcapping
    query_pre_attn_scalar use_bidirectional_attention attn_temperature_tuning attention_chunk_size
    parallel_attn use_parallel_residual alibi use_alibi attention_sink num_meta_tokens layernorm_type
    norm_type use_gated_attention attention_gate layer_scale use_layer_scale num_experts num_local_experts
    n_routed_experts moe_intermediate_size kv_lora_rank q_lora_rank
""")
"""Fields known to change a forward pass in some family: one that does not read them refuses them."""


class Fields:
    """The fields of one config, marked as they are read; `finish` judges the rest."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it stands; `default` where it is absent."""
        self._read.add(name)
        return self.raw.get(name, default)

    def size(self, name: str, default: Any = REQUIRED, *, least: int = 1, most: int = MOST) -> int:
        """An integer from `least` to `most`; `default` where it is absent or null."""
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
            raise self.damaged(name, value, expected)
        if value > most:
            raise self.damaged(name, value, f"at most {most}")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> float:
        """A finite number; `default` where it is absent or null."""
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.damaged(name, value, "a number")
        if not abs(value) <= LARGEST:  # NaN too
            raise self.damaged(name, value, "a finite number of 32 bits")
        return float(value)

    def positive(self, name: str, default: Any = REQUIRED) -> float:
        """A number above 0; `default` where it is absent or null."""
        value = self.number(name, default)
        if value <= 0:
            raise self.damaged(name, value, "a number above 0")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """true or false; `default` where it is absent or null."""
        value = self._present(name, default)
        if not isinstance(value, bool):
            raise self.damaged(name, value, "true or false")
        return value

    def items(self, name: str, default: list[Any]) -> list[Any]:
        """A list, as it stands; `default` where it is absent, null or empty."""
        value = self.get(name) or default
        if not isinstance(value, list):
            raise self.damaged(name, value, "a list")
        return value

    def optional_number(self, name: str, default: float | None) -> float | None:
        """A number above 0 or null; `default` only where it is absent."""
        return None if self.get(name, default) is None else self.positive(name, default)

    def optional_size(self, name: str, default: int | None) -> int | None:
        """A positive integer or null; `default` only where it is absent."""
        return None if self.get(name, default) is None else self.size(name, default)

    def require(self, name: str, allowed: Mapping[str, T], default: str) -> T:
        """What `allowed` gives for the value; UnsupportedModelError for any other value."""
        value = self._present(name, default)
        if not isinstance(value, str) or value not in allowed:
            raise self.unsupported(name, value, f"one of {', '.join(allowed)}")
        return allowed[value]

    def table(self, name: str) -> Mapping[str, Any]:
        """A nested object, as it stands; empty where it is absent or null."""
        value = self.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.damaged(name, value, "an object")
        return value or {}

    def within(self, name: str) -> Fields:
        """The fields of a nested object; none where it is absent or null."""
        return Fields(self.table(name), f"{self.where}: {name}")

    def damaged(self, name: str, value: Any, expected: str) -> CheckpointError:
        """The error that says which field has a value that means nothing."""
        return CheckpointError(f"{self.where}: {name} is {shown(value)}; it must be {expected}")

    def unsupported(self, name: str, value: Any, supported: str) -> UnsupportedModelError:
        """The error that says which field has a value that this project does not implement."""
        return UnsupportedModelError(
            f"{self.where}: {name}={shown(value)} is not supported; supported: {supported}"
        )

    def finish(self) -> None:
        """Refuses unread fields that change the maths; logs those that nobody knows."""
        unread = self.raw.keys() - self._read - HARMLESS - LENGTHS - QUANTISATION
        rest = sorted(name for name in unread if not _is_neutral(self.raw[name]))
        for name in rest:
            if name in MATHS:
                raise self.unsupported(name, self.raw[name], "this architecture without that field")
        unknown = [name for name in rest if not name.startswith("_")]
        if unknown:
            log.warning("%s: fields without a meaning here are ignored: %s", self.where, ", ".join(unknown))

    def _present(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is None and default is REQUIRED:
            raise CheckpointError(f"{self.where}: {name} is missing")
        return default if value is None else value


def shown(value: Any) -> str:
    """A value of a JSON file for an error: short, whatever its size and nesting."""
    return _REPR.repr(value)


def _is_neutral(value: Any) -> bool:
    """Whether a value says that a feature is off: null, false, empty, or a multiplier of 1."""
    return not value or (value == 1 and not isinstance(value, bool))
