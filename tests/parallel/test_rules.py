"""Logical axes to mesh axes, and the errors where a mesh does not fit."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.models.config import AttentionConfig, RopeConfig
from lmdeploy_jax.pallas_kernels.options import AttentionOptions
from lmdeploy_jax.parallel.mesh import AXES, axis_size, make_mesh
from lmdeploy_jax.parallel.rules import partition_spec

MESH = AbstractMesh((1, 4, 1), AXES)


def test_axes_follow_their_rules():
    spec = partition_spec("qkv", (4, 3, 16, 64), ("kv_heads", None, None, "embed"), MESH)
    assert spec == PartitionSpec("tp", None, None, None)
    assert partition_spec("down", (64, 96), ("embed", "mlp"), MESH) == PartitionSpec(None, "tp")


def test_experts_are_dealt_out_and_cut_over_the_devices_that_share_them():
    mesh = AbstractMesh((1, 2, 4), AXES)
    weight = ("experts", None, "expert_mlp", "embed")
    assert partition_spec("gate_up", (8, 2, 6, 16), weight, mesh) == PartitionSpec("ep", None, "tp", None)
    assert partition_spec("gate_up", (8, 2, 8, 16), weight, MESH) == PartitionSpec(None, None, "tp", None)
    assert partition_spec("down", (64, 96), ("embed", "mlp"), mesh) == PartitionSpec(None, ("tp", "ep"))
    with pytest.raises(ConfigError, match=r"experts axis of 6 cannot be cut in 4 equal parts; choose a ep"):
        partition_spec("gate_up", (6, 2, 8, 16), weight, mesh)


def test_an_uneven_cut_is_a_config_error_that_names_the_weight():
    with pytest.raises(ConfigError, match=r"down: its mlp axis of 98 cannot be cut in 4"):
        partition_spec("down", (64, 98), ("embed", "mlp"), MESH)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (("vocab", "mlp"), "use a mesh axis twice"),
        (("vocab", "colour"), "logical axis 'colour' has no rule"),
        (("vocab",), "1 axis names"),
    ],
)
def test_wrong_axes_are_found(axes, message):
    with pytest.raises(ValueError, match=message):
        partition_spec("head", (8, 8), axes, MESH)


def test_mesh_takes_the_first_devices_and_refuses_too_few():
    mesh = make_mesh(1)
    assert (axis_size(mesh, "dp"), axis_size(mesh, "tp"), axis_size(None, "tp")) == (1, 1, 1)
    count = len(jax.devices()) + 1
    with pytest.raises(ConfigError, match=rf"tp={count} needs as many devices"):
        make_mesh(count)


def attention(heads: int, kv_heads: int) -> AttentionConfig:
    return AttentionConfig(heads, kv_heads, 16, AttentionOptions(0.25), RopeConfig(16))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "expected"), [(8, 8, 4, 8), (8, 2, 2, 2), (8, 2, 4, 4), (8, 1, 8, 8)]
)
def test_kv_heads_are_repeated_up_to_tp(heads, kv_heads, tp, expected):
    assert attention(heads, kv_heads).held_kv_heads(tp) == expected


@pytest.mark.parametrize(("heads", "kv_heads", "tp"), [(14, 2, 4), (6, 3, 2), (12, 3, 4)])
def test_heads_that_cannot_be_shared_out_are_a_config_error(heads, kv_heads, tp):
    with pytest.raises(ConfigError, match=f"tp={tp} cannot share out {heads} attention heads"):
        attention(heads, kv_heads).held_kv_heads(tp)
