"""Key tables: names of a checkpoint's tensors -> weights of `lmdeploy_jax.models.Decoder`."""

from __future__ import annotations

from collections.abc import Mapping

from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.converters.layouts import GroupedQKV, Rows, Stack
from lmdeploy_jax.models.config import DecoderConfig

LAYER = r"model\.layers\.(\d+)\."
LAYER_TARGET = r"layers.\1."
PRE_NORMS: Mapping[str, str] = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}


def hf_rules(
    config: DecoderConfig,
    tp: int,
    *,
    norms: Mapping[str, str] = PRE_NORMS,
    fused: bool = False,
) -> tuple[Rule, ...]:
    """The names that most HF models use; `fused`: qkv and gate and up are one tensor each, as in Phi-3.

    On `tp` devices the model may hold more KV heads than the checkpoint (see `AttentionConfig`).
    """
    attention = LAYER + r"self_attn\."
    mlp = LAYER + r"mlp\."
    replicas = _replicas(config, tp)
    if fused:
        qkv = Rule(
            attention + r"qkv_proj\.(weight|bias)",
            LAYER_TARGET + r"attention.qkv.\2",
            "",
            GroupedQKV(replicas, "rows"),
        )
        gate_up = Rule(mlp + r"gate_up_proj\.(weight|bias)", LAYER_TARGET + r"mlp.gate_up.\2", "", Rows(2))
    else:
        qkv = Rule(
            attention + r"(q|k|v)_proj\.(weight|bias)",
            LAYER_TARGET + r"attention.qkv.\3",
            r"\2",
            GroupedQKV(replicas),
        )
        gate_up = Rule(
            mlp + r"(gate|up)_proj\.(weight|bias)",
            LAYER_TARGET + r"mlp.gate_up.\3",
            r"\2",
            Stack(("gate", "up")),
        )
    return (
        *outer_rules(config, "model.embed_tokens", "lm_head"),
        Rule(r"model\.norm\.weight", "norm.weight"),
        *(
            Rule(LAYER + name + r"\.weight", LAYER_TARGET + target + ".weight")
            for name, target in norms.items()
        ),
        qkv,
        Rule(
            attention + r"o_proj\.weight", LAYER_TARGET + "attention.o.weight", "", Rows(1, flat_columns=True)
        ),
        Rule(attention + r"o_proj\.bias", LAYER_TARGET + "attention.o.bias"),
        Rule(attention + r"(q|k)_norm\.weight", LAYER_TARGET + r"attention.\2_norm.weight"),
        gate_up,
        Rule(mlp + r"down_proj\.(weight|bias)", LAYER_TARGET + r"mlp.down.\2"),
    )


def _replicas(config: DecoderConfig, tp: int) -> int:
    """How often each KV head is held, which so far is the same in all layers of every family."""
    (replicas,) = {layer.mixer.held_kv_heads(tp) // layer.mixer.kv_heads for layer in config.layers}
    return replicas


def outer_rules(config: DecoderConfig, embedding: str, head: str) -> tuple[Rule, ...]:
    """Embedding and output head (see `settle_head` for tied ones), and what is left unread.

    Old checkpoints hold RoPE's tables, which the model computes itself.
    """
    rows = Rows(valid=config.vocab_size)
    return (
        Rule(embedding.replace(".", r"\.") + r"\.weight", "embedding.weight", "", rows),
        Rule(head + r"\.weight", "lm_head.weight", "", rows),
        Rule(r"(?:.*\.)?rotary_emb\.(?:inv_freq|cos_cached|sin_cached)", None),
    )


def internlm2_rules(config: DecoderConfig, tp: int) -> tuple[Rule, ...]:
    """InternLM2's own names. `wqkv` holds, for each KV head, its query heads, its k head and its v head."""
    attention, mlp = LAYER + r"attention\.", LAYER + r"feed_forward\."
    qkv = GroupedQKV(_replicas(config, tp), "grouped")
    gate_up = Stack(("1", "3"))
    return (
        *outer_rules(config, "model.tok_embeddings", "output"),
        Rule(r"model\.norm\.weight", "norm.weight"),
        Rule(LAYER + r"attention_norm\.weight", LAYER_TARGET + "attention_norm.weight"),
        Rule(LAYER + r"ffn_norm\.weight", LAYER_TARGET + "mlp_norm.weight"),
        Rule(attention + r"wqkv\.(weight|bias)", LAYER_TARGET + r"attention.qkv.\2", "", qkv),
        Rule(attention + r"wo\.weight", LAYER_TARGET + "attention.o.weight", "", Rows(1, flat_columns=True)),
        Rule(attention + r"wo\.bias", LAYER_TARGET + "attention.o.bias"),
        Rule(mlp + r"w(1|3)\.weight", LAYER_TARGET + "mlp.gate_up.weight", r"\2", gate_up),
        Rule(mlp + r"w2\.weight", LAYER_TARGET + "mlp.down.weight"),
    )
