"""Key tables: names of a checkpoint's tensors -> weights of `lmdeploy_jax.models.Decoder`."""

from __future__ import annotations

from collections.abc import Mapping

from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.converters.layouts import GroupedQKV, Layout, RepeatedHeads, Rows, Stack
from lmdeploy_jax.models.config import AttentionConfig, DecoderConfig

FLAT_COLUMNS = Rows(1, flat_columns=True)
LAYER = r"model\.layers\.(\d+)\."
LAYER_TARGET = r"layers.\1."
PRE_NORMS: Mapping[str, str] = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}


def hf_rules(
    config: DecoderConfig,
    tp: int,
    *,
    norms: Mapping[str, str] = PRE_NORMS,
    qk_norms: tuple[str, str] = ("q_norm", "k_norm"),
    fused: bool = False,
    fused_mlp: bool = False,
    mlp: str = "mlp",
    plain_mlp: tuple[str, str] | None = None,
    interleaved: bool = False,
    attention: tuple[Rule, ...] | None = None,
) -> tuple[Rule, ...]:
    """The names that most HF models use.

    `fused`: qkv and gate and up are one tensor each, as in Phi-3; `fused_mlp`: gate and up alone. `mlp`:
    where in a layer those of an MLP go.
    `plain_mlp`: the two weights of an MLP that is not gated. `interleaved`: q and k rotate in pairs of
    neighbours. `attention`: what fills its weights but for `o`, where that is not q, k and v.
    On `tp` devices the model may hold more KV heads than the checkpoint (see `AttentionConfig`).
    """
    prefix = LAYER + r"self_attn\."
    if attention is None:
        replicas = kv_replicas(config, tp)
        packing = GroupedQKV(replicas, "rows" if fused else "split", _rotating(config) if interleaved else 0)
        attention = (_qkv_rule(prefix, packing), *_qk_norm_rules(config, replicas, qk_norms))
    return (
        *outer_rules(config, "model.embed_tokens", "lm_head"),
        Rule(r"model\.norm\.(weight|bias)", r"norm.\1"),
        *(
            Rule(LAYER + name + r"\.(weight|bias)", LAYER_TARGET + target + r".\2")
            for name, target in norms.items()
        ),
        *attention,
        Rule(prefix + r"o_proj\.weight", LAYER_TARGET + "attention.o.weight", "", FLAT_COLUMNS),
        Rule(prefix + r"o_proj\.bias", LAYER_TARGET + "attention.o.bias"),
        Rule(prefix + r"sinks", LAYER_TARGET + "attention.sinks", "", Rows(2)),
        *(_plain_mlp_rules(*plain_mlp) if plain_mlp else _mlp_rules(mlp, fused or fused_mlp)),
    )


def _qkv_rule(attention: str, packing: GroupedQKV) -> Rule:
    if packing.packing == "rows":
        return Rule(attention + r"qkv_proj\.(weight|bias)", LAYER_TARGET + r"attention.qkv.\2", "", packing)
    return Rule(
        attention + r"(q|k|v)_proj\.(weight|bias)", LAYER_TARGET + r"attention.qkv.\3", r"\2", packing
    )


def _mlp_rules(target: str, fused: bool) -> tuple[Rule, ...]:
    mlp, gate_up = LAYER + r"mlp\.", LAYER_TARGET + f"{target}.gate_up."
    down = Rule(mlp + r"down_proj\.(weight|bias)", LAYER_TARGET + target + r".down.\2")
    if fused:
        return Rule(mlp + r"gate_up_proj\.(weight|bias)", gate_up + r"\2", "", Rows(2)), down
    both = Stack(("gate", "up"))
    return Rule(mlp + r"(gate|up)_proj\.(weight|bias)", gate_up + r"\3", r"\2", both), down


def _plain_mlp_rules(up: str, down: str) -> tuple[Rule, ...]:
    return tuple(
        Rule(LAYER + rf"mlp\.{name}\.(weight|bias)", LAYER_TARGET + rf"mlp.{target}.\2")
        for name, target in ((up, "up"), (down, "down"))
    )


def _qk_norm_rules(config: DecoderConfig, replicas: int, names: tuple[str, str]) -> tuple[Rule, ...]:
    mixers = [mixer for mixer in config.mixers if isinstance(mixer, AttentionConfig)]
    layouts: tuple[Layout, Layout] = (Rows(), Rows())
    if any(mixer.qk_norm_width for mixer in mixers):
        layouts = (Rows(3), RepeatedHeads(replicas))
    elif any(mixer.qk_layer_norm for mixer in mixers):
        layouts = (Rows(2), RepeatedHeads(replicas, flat=False))
    return tuple(
        Rule(LAYER + rf"self_attn\.{name}\.weight", LAYER_TARGET + f"attention.{target}.weight", "", layout)
        for name, target, layout in zip(names, ("q_norm", "k_norm"), layouts, strict=True)
    )


def _rotating(config: DecoderConfig) -> int:
    """Leading elements of a head that rotate, in the layers that do."""
    (count,) = {rope.dim for rope in config.ropes if rope.dim}
    return count


def kv_replicas(config: DecoderConfig, tp: int) -> int:
    """How often each KV head is held, which so far is the same in all layers of every family."""
    mixers = (mixer for mixer in config.mixers if isinstance(mixer, AttentionConfig))
    (replicas,) = {mixer.held_kv_heads(tp) // mixer.kv_heads for mixer in mixers}
    return replicas


def outer_rules(config: DecoderConfig, embedding: str, head: str) -> tuple[Rule, ...]:
    """Embedding and output head (see `settle_head` for tied ones), and what is left unread.

    Old checkpoints hold RoPE's tables, which the model computes itself.
    """
    rows = Rows(valid=config.vocab_size)
    biases = (Rule(head + r"\.bias", "lm_head.bias", "", rows),) if config.head_bias else ()
    return (
        *biases,
        Rule(embedding.replace(".", r"\.") + r"\.weight", "embedding.weight", "", rows),
        Rule(head + r"\.weight", "lm_head.weight", "", rows),
        Rule(r"(?:.*\.)?rotary_emb\.(?:inv_freq|cos_cached|sin_cached)", None),
    )


def internlm2_rules(config: DecoderConfig, tp: int) -> tuple[Rule, ...]:
    """InternLM2's own names. `wqkv` holds, for each KV head, its query heads, its k head and its v head."""
    attention, mlp = LAYER + r"attention\.", LAYER + r"feed_forward\."
    qkv = GroupedQKV(kv_replicas(config, tp), "grouped")
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
