"""Mixtures of experts: the fields of a config that say what they are, and the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmdeploy_jax.converters.families.common import ACTIVATION_NAMES, MOST_ELEMENTS, count_layers
from lmdeploy_jax.converters.families.tables import LAYER, LAYER_TARGET, hf_rules
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.converters.layouts import Rows, Stack
from lmdeploy_jax.errors import CheckpointError
from lmdeploy_jax.models.config import DecoderConfig
from lmdeploy_jax.models.mlp_config import MixtureConfig, MlpConfig, RouterConfig

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOICES = ("num_experts_per_tok", "moe_topk", "moe_k")
MOST_EXPERTS = 4096
DENSE, SPARSE = "dense", "sparse"


def read_mixture(
    fields: Fields,
    *,
    width: int,
    shared: int = 0,
    experts: int | None = None,
    per_token: int | None = None,
    expert: Mapping[str, Any] | None = None,
    shared_gate: bool = False,
    **router: Any,
) -> MixtureConfig:
    """The mixture of a config. width, shared: inner sizes of an expert and of the shared block, 0: none.

    experts, per_token: the family's defaults of how many there are, and how many a token has. expert: fields
    of the `MlpConfig` of an expert and of the shared block; router: of `RouterConfig`.
    """
    count = _first(fields, COUNTS, experts, MOST_EXPERTS)
    chosen = _first(fields, CHOICES, per_token, count)
    groups, top_groups = router.get("groups", 1), router.get("top_groups", 1)
    if count % groups or top_groups > groups or chosen > count // groups * top_groups:
        raise fields.unsupported("n_group", groups, f"groups of {count} experts that hold {chosen} to choose")
    hidden = fields.size("hidden_size")
    if hidden * width * count > MOST_ELEMENTS:
        raise CheckpointError(
            f"{fields.where}: {count} experts of {width} by hidden_size={hidden} ask for a weight of "
            f"{hidden * width * count} numbers; at most {MOST_ELEMENTS} can be read"
        )
    block: dict[str, Any] = dict(expert or {})
    if "activation" not in block:
        block["activation"] = fields.require("hidden_act", ACTIVATION_NAMES, "silu")
    return MixtureConfig(
        RouterConfig(count, chosen, **router),
        MlpConfig(width, **block),
        MlpConfig(shared, **block) if shared else None,
        shared_gate,
    )


def _first(fields: Fields, names: Sequence[str], default: int | None, most: int) -> int:
    """The first of the names that a config has, which say the same."""
    found = [name for name in names if fields.get(name) is not None]
    if not found and default is not None:
        return min(default, most)
    return fields.size(found[0] if found else names[0], most=most)


def sparse_layers(fields: Fields, default: Sequence[bool]) -> tuple[bool, ...]:
    """Which layers are mixtures: as `mlp_layer_types` says, or else `default`."""
    names = {DENSE: False, SPARSE: True}
    types = fields.items("mlp_layer_types", [SPARSE if sparse else DENSE for sparse in default])
    layers = count_layers(fields)
    if len(types) != layers or not all(isinstance(kind, str) and kind in names for kind in types):
        raise fields.unsupported("mlp_layer_types", types, f"{layers} entries, each {DENSE!r} or {SPARSE!r}")
    return tuple(names[kind] for kind in types)


def after_dense(fields: Fields, default: int) -> tuple[bool, ...]:
    """The first `first_k_dense_replace` layers have an MLP, the others a mixture."""
    first = fields.size("first_k_dense_replace", default, least=0)
    if fields.size("moe_layer_freq", 1) != 1:
        raise fields.unsupported("moe_layer_freq", fields.get("moe_layer_freq"), "1")
    return sparse_layers(fields, [i >= first for i in range(count_layers(fields))])


@dataclass(frozen=True)
class MixtureNames:
    """What a family calls the tensors of a mixture, within `block` of a layer; empty: in the layer itself."""

    block: str = "mlp"
    router: str = "gate"
    correction: str = "gate.e_score_correction_bias"
    correction_row_axes: int = 1
    """0 where it is [1, X]."""
    experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "shared_experts"
    shared_gate: str = "shared_expert_gate"

    def rules(self, config: DecoderConfig) -> tuple[Rule, ...]:
        """The rules for them."""
        mixtures = (layer.mlp for layer in config.layers if isinstance(layer.mlp, MixtureConfig))
        (count,) = {mixture.router.experts for mixture in mixtures} or {0}
        block, target = LAYER + (re.escape(self.block) + r"\." if self.block else ""), LAYER_TARGET + "mlp."
        gate, up, down = self.experts
        both = Stack(tuple(f"{i}.{part}" for i in range(count) for part in (gate, up)), axes=2)
        all_down = Stack(tuple(str(i) for i in range(count)))
        experts, shared = block + r"experts\.(\d+)\.", block + self.shared + r"\."
        return (
            Rule(block + re.escape(self.router) + r"\.(weight|bias)", target + r"router.\2"),
            Rule(
                block + re.escape(self.correction),
                target + "router.correction",
                "",
                Rows(self.correction_row_axes),
            ),
            Rule(experts + rf"({gate}|{up})\.(weight|bias)", target + r"experts.gate_up.\4", r"\2.\3", both),
            Rule(experts + rf"{down}\.(weight|bias)", target + r"experts.down.\3", r"\2", all_down),
            Rule(
                shared + r"(gate|up)_proj\.weight",
                target + "shared.gate_up.weight",
                r"\2",
                Stack(("gate", "up")),
            ),
            Rule(shared + r"down_proj\.weight", target + "shared.down.weight"),
            Rule(block + self.shared_gate + r"\.weight", target + "shared_gate.weight"),
        )


USUAL = MixtureNames()


def mixture_rules(
    config: DecoderConfig, tp: int, *, names: MixtureNames = USUAL, **usual: Any
) -> tuple[Rule, ...]:
    """`hf_rules`, and those for mixtures."""
    return (*hf_rules(config, tp, **usual), *names.rules(config))
