"""What `train` makes: each embedded chat model as a record. Needs torch and transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from . import TINY_CHAT
from .tokenizer import train_tokenizer

Model = Any  # a transformers model, whose own annotations no type checker follows


@dataclass(frozen=True)
class Shape:
    """`kind` is transformers' class of the model, `fields` what its config has of its own.

    tokenizer: the folder whose tokenizer it shares; None: its own, learned from its tasks.
    """

    kind: Model
    config: Any
    fields: Mapping[str, Any]
    tokenizer: Path | None = None


# 3.0M parameters; and 3.4M, of which a token meets 1.7M. Widths that are multiples of 64 can be quantised in
# groups of any usual size, and cut over up to eight devices.
SHAPES: Mapping[str, Shape] = MappingProxyType({
    "tiny-chat": Shape(
        Qwen3ForCausalLM, Qwen3Config, {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    ),
    "tiny-moe": Shape(
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            "hidden_size": 192, "num_hidden_layers": 4, "moe_intermediate_size": 128, "num_experts": 8,
            "num_experts_per_tok": 2, "norm_topk_prob": True, "router_aux_loss_coef": 0.01,
        },
        TINY_CHAT,
    ),
})  # fmt: skip


def tokenizer_of(shape: Shape, seed: int) -> PreTrainedTokenizerFast:
    if shape.tokenizer is None:
        return train_tokenizer(seed)
    return PreTrainedTokenizerFast.from_pretrained(shape.tokenizer)


def new_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> Model:
    """Freshly initialised, in float32."""
    torch.manual_seed(seed)
    config = shape.config(
        vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        max_position_embeddings=2048, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **shape.fields,
    )  # fmt: skip
    return trainable(shape.kind(config))


def trainable(model: Model) -> Model:
    """The model, whose mixtures give every expert all tokens: so small ones learn several times faster than
    with a product an expert, since nothing waits for what was chosen.
    """
    for module in model.modules():
        if hasattr(module, "gate_up_proj"):
            module.forward = partial(_all_experts, module)
    return model


def _all_experts(
    experts: Model, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """[T, E]: as transformers' experts have it, for `chosen` and `weights` [T, k]."""
    shares = torch.zeros(len(x), len(experts.gate_up_proj), dtype=weights.dtype, device=x.device)
    shares = shares.scatter(1, chosen, weights)
    gate, up = torch.einsum("te,xie->xti", x, experts.gate_up_proj).chunk(2, dim=-1)
    out = torch.einsum("xti,xei->xte", experts.act_fn(gate) * up, experts.down_proj)
    return torch.einsum("xte,tx->te", out, shares.to(out.dtype))


def hidden_states(model: Model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
    """What the last norm gives [B, T, E]; and the loss by which a mixture's experts get equal work, or 0."""
    weight = getattr(model.config, "router_aux_loss_coef", None)
    if weight is None:
        return model.model(input_ids=ids, use_cache=False).last_hidden_state, 0.0
    output = model.model(input_ids=ids, use_cache=False, output_router_logits=True)
    mask = (ids != model.config.pad_token_id).int()
    sizes = model.config.num_experts, model.config.num_experts_per_tok
    # Layer by layer: over all of them together, each could favour experts of its own.
    losses = [load_balancing_loss_func((layer,), *sizes, mask) for layer in output.router_logits]
    return output.last_hidden_state, weight * sum(losses) / len(losses)
