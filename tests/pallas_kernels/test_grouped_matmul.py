"""Grouped products: rows in any order, groups without rows, all rows in one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax.pallas_kernels.grouped_matmul import group_rows, grouped_matmul, tile_rows

COLUMNS, OUT = 24, 40


@pytest.mark.parametrize(("rows", "experts"), [(1, 4), (517, 3), (40, 128)])
@pytest.mark.parametrize("spread", ["drawn", "one", "last", "in turn"])
def test_each_row_meets_its_own_weight(rows, experts, spread):
    rng = np.random.default_rng(rows)
    chosen = {
        "drawn": rng.integers(0, experts, rows),
        "one": np.full(rows, experts // 2),
        "last": np.full(rows, experts - 1),
        "in turn": np.arange(rows) % experts,
    }[spread].astype(np.int32)
    x, weight = rng.normal(size=(rows, COLUMNS)), rng.normal(size=(experts, OUT, COLUMNS))

    @jax.jit
    def multiply(x, weight, chosen):
        groups = group_rows(chosen, experts)
        product = grouped_matmul(x[groups.source], weight, groups, out_dtype=jnp.float32)
        return groups, product[groups.place]

    groups, product = multiply(x.astype(np.float32), weight.astype(np.float32), chosen)
    np.testing.assert_allclose(product, np.einsum("mk,mnk->mn", x, weight[chosen]), rtol=1e-4, atol=1e-4)
    used = groups.tiles[groups.tiles[:, 2] > 0]
    np.testing.assert_array_equal(np.unique(used[:, 0]), np.unique(chosen))  # no other weight is read
    assert used[:, 2].sum() == rows
    assert used[:, 2].max() <= tile_rows(rows, experts)
    np.testing.assert_array_equal(groups.group, np.sort(chosen))


def test_weights_that_do_not_fit_are_named():
    groups = group_rows(jnp.zeros(4, jnp.int32), 2)
    with pytest.raises(ValueError, match=r"rows \(3, 8\) fit neither the weights \(2, 5, 8\)"):
        grouped_matmul(jnp.zeros((3, 8)), jnp.zeros((2, 5, 8)), groups, out_dtype=jnp.float32)
