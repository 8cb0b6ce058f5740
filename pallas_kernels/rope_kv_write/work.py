"""The arrays of the op besides qkv and cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
from jaxtyping import Array, Float, Float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeadWork:
    """What is done to q, k and v on their way; None: not in this model.

    bias is added to all three; q_norm and k_norm are weights of an RMSNorm over each head
    of q and k; cos and sin then rotate the first R elements of each head of q and k, the
    first half of them paired with the second (Su et al., 2021, as GPT-NeoX lays it out). `eps` and `offset`
    are those of the norms, see `rms_norm`. mean_squares: qkv is the parts of an `Unscaled` product of one
    token, which is scaled first of all.
    """

    bias: Float[Array, "KH G+2 D"] | None = None
    q_norm: Float[Array, "D"] | None = None
    k_norm: Float[Array, "D"] | None = None
    cos: Float32[Array, "T R/2"] | None = None
    sin: Float32[Array, "T R/2"] | None = None
    eps: float = field(default=1e-6, metadata={"static": True})
    offset: float = field(default=0.0, metadata={"static": True})
    mean_squares: Float32[Array, "S"] | None = None

    def arrays(self) -> tuple[Float[Array, "..."] | None, ...]:
        """The arrays in the order of the fields, as kernels take them."""
        return self.bias, self.q_norm, self.k_norm, self.cos, self.sin, self.mean_squares
