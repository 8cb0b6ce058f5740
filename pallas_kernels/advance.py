"""By which means prepared blocks of a recurrence go into its states."""

from __future__ import annotations

from functools import partial

from lmdeploy_jax.pallas_kernels.token_blocks import Advance, in_turn


def advance_by(backend: str) -> Advance:
    """How blocks that are prepared go into the states, one after another. What the kernel takes on a card is
    not known yet: there it is XLA's loop.
    """
    if backend != "pallas_interpret":
        return in_turn
    from lmdeploy_jax.pallas_kernels.recurrent_blocks import advance_blocks  # CPUs never need it

    return partial(advance_blocks, interpret=True)
