"""What distinguishes one vision model from another, as data: a tower, and a projector as a list of steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from lmdeploy_jax.vision.interpolate import Interpolation
from lmdeploy_jax.vision.processor import ImageProcessor
from lmdeploy_jax.vision.video import VideoRule

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]
NormKind = Literal["layer", "rms"]


@dataclass(frozen=True)
class NormConfig:
    """LayerNorm (weight and bias) or RMSNorm (weight) over a width; `offset` is added to the weight
    (Gemma).
    """

    width: int
    kind: NormKind = "layer"
    eps: float = 1e-6
    offset: float = 0.0
    weighted: bool = True


@dataclass(frozen=True)
class PositionTable:
    """Learned positions of `side` x `side` patches, and how they are spread over other grids.

    shape: as checkpoints hold the table; its entries go row by row, after the class token's where there is
        one, or before it with `class_last`.
    by_axis: it has an entry for each of `side` columns, then one for each row; a patch has both together.
    """

    side: int
    shape: tuple[int, ...]
    interpolation: Interpolation = "bicubic"
    align_corners: bool = False
    class_last: bool = False
    by_axis: bool = False

    @property
    def taps(self) -> int:
        """Most entries that a patch's position is made of."""
        return 2 if self.by_axis else 4 if self.interpolation == "bilinear" else 16


@dataclass(frozen=True)
class RotaryConfig:
    """Rotation of queries and keys by a patch's row in one half of the frequencies, its column in the other.

    Frequencies are theta ** -(2i / dim). "axial": of dim = head size / 2, the same for both; "alternating":
    of dim = head size, even i for rows and odd i for columns (Pixtral). "halves": as
    axial, but columns turn a head's first half, and rows its second, each by itself (Gemma 4). A class token
    is at row -1, column -1.
    """

    kind: Literal["axial", "alternating", "halves"] = "axial"
    theta: float = 10000.0


@dataclass(frozen=True)
class TowerConfig:
    """A vision transformer. `layers` are those that run: where a checkpoint's features are those of an
    earlier layer than its last, the rest is not loaded.

    patch_shape: of the pixels of a patch, [C, P, P] or [C, frames, P, P].
    grid: patches along a view's edge where all views are squares of one size; None: views of any size.
    class_token: stands before the patches, and is dropped after the last layer.
    patch_norm: on patches before positions are added; pre_norm: after that; post_norm: after the last layer.
    layer_scale: a learned factor for each channel of what attention and MLP add, which is multiplied into
        their last products as they are loaded.
    qk_norm: over all heads together. head_norms: over each head of q and k, and of v without a weight; scores
        are then not scaled.
    post_norms: on what attention and MLP add.
    clipped: what enters and leaves the layers' products is kept within learned bounds (Gemma 4's small ones).
    channels_last: a patch's pixels reach its weight [E, P, P, C].
    fused: the layers' norms and residual sums are part of their products (see `fusable`): the norms' weights
        and biases are multiplied into the products behind them as they are loaded.
    window: patches that attend to each other, but for `full_layers`; None: whole views in every layer.
    deepstack: layers after which features are taken besides those of the last.
    """

    layers: int
    width: int
    heads: int
    mlp_width: int
    patch_shape: tuple[int, ...]
    activation: Activation
    norm: NormKind
    norm_eps: float
    grid: int | None = None
    gated: bool = False
    patch_bias: bool = True
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    class_token: bool = False
    positions: PositionTable | None = None
    rotary: RotaryConfig | None = None
    patch_norm: bool = False
    pre_norm: bool = False
    post_norm: bool = False
    layer_scale: bool = False
    qk_norm: bool = False
    head_norms: bool = False
    post_norms: bool = False
    clipped: bool = False
    channels_last: bool = False
    fused: bool = False
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    deepstack: tuple[int, ...] = ()

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def fusable(self) -> bool:
        """Whether its layers are those whose products can have norms and sums within."""
        biased = self.qkv_bias and self.out_bias and self.mlp_bias
        plain = not (self.gated or self.clipped or self.post_norms)
        return plain and biased and self.activation == "gelu"

    def norm_config(self) -> NormConfig:
        """Every norm of the tower."""
        return NormConfig(self.width, self.norm, self.norm_eps)

    def layer_norm_config(self) -> NormConfig:
        """Those before attention and MLP."""
        return replace(self.norm_config(), weighted=not self.fused)


@dataclass(frozen=True)
class MergeConfig:
    """The features of `count` neighbouring patches side by side.

    channels_first: the patches' numbers of one channel stand together, as convolutions have them.
    """

    count: int
    channels_first: bool = False


@dataclass(frozen=True)
class PoolConfig:
    """The mean of `count` neighbouring patches."""

    count: int


@dataclass(frozen=True)
class StandardConfig:
    """`(factor * x - bias) * scale`, with both learned for each channel."""

    width: int
    factor: float


@dataclass(frozen=True)
class LinearConfig:
    """A product with a weight [out, *inner]; `transposed`: [inner, out]."""

    inner: tuple[int, ...]
    out: int
    bias: bool = True
    transposed: bool = False


@dataclass(frozen=True)
class ActivationConfig:
    """An activation function."""

    name: Activation = "gelu"


@dataclass(frozen=True)
class GatedConfig:
    """`down(activation(gate(x)) * up(x))` without biases."""

    inner: int
    width: int
    out: int
    activation: Activation = "silu"


@dataclass(frozen=True)
class LearnedRows:
    """Learned rows after those of the patches, for the ends of lines and the places between views.

    shape: as checkpoints hold them, [..., width].
    """

    shape: tuple[int, ...]


Step = (
    MergeConfig
    | PoolConfig
    | StandardConfig
    | NormConfig
    | LinearConfig
    | ActivationConfig
    | GatedConfig
    | LearnedRows
)


@dataclass(frozen=True)
class VisionModelConfig:
    """How images are prepared, the tower and the projector.

    deepstack: the projector of the features that `TowerConfig.deepstack` takes, one set of weights a layer.
    video: how videos are prepared; None: the family takes none.
    """

    processor: ImageProcessor
    tower: TowerConfig
    projector: tuple[Step, ...]
    deepstack: tuple[Step, ...] = ()
    video: VideoRule | None = None

    @property
    def learned(self) -> int:
        """Learned rows that the projector puts after those of the patches."""
        return sum(prod(step.shape[:-1]) for step in self.projector if isinstance(step, LearnedRows))
