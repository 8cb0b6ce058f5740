"""What follows the mixer in a layer, as data: feed-forward blocks, mixtures, inputs of a layer's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MlpConfig:
    """The feed-forward block."""

    width: int
    activation: Literal["silu", "gelu", "gelu_tanh", "relu2", "xielu", "swigluoai"] = "silu"
    """relu2: the square of what is above 0. xielu (Apertus) has learnt numbers, and is of blocks that are
    not gated. swigluoai (gpt-oss) is an expert's: of gate g and up u, clamped, `(u + 1) g sigmoid(1.702 g)`.
    """
    gated: bool = True
    """Whether there is a product beside the one that is activated, by which this is multiplied."""
    bias: bool = False
    limit: float = 7.0
    """Of swigluoai: g is at most that, u within it on both sides."""
    gate_multiplier: float = 1.0
    """Of what is activated, before it is."""
    output_multiplier: float = 1.0
    """Of the block's output, in blocks that are gated."""

    def weight_rows(self, tokens: int) -> float:
        """Rows of hidden_size elements that a step of so many tokens reads."""
        return (3.0 if self.gated else 2.0) * self.width

    def activations(self, hidden: int) -> int:
        """Elements that a token takes on its way through, at most."""
        return 4 * self.width


@dataclass(frozen=True)
class RouterConfig:
    """How tokens choose their experts, and what each one's output is multiplied by."""

    experts: int
    per_token: int
    scores: Literal["softmax", "sigmoid", "chosen", "sparsemixer"] = "softmax"
    """What the logits become before the choice. chosen: nothing; the weights are a softmax over the chosen
    ones. sparsemixer: Phi-3.5's, of the best two; see `models.routing`.
    """
    normalise: bool = False
    """Whether a token's weights are divided by their sum."""
    scale: float = 1.0
    """Multiplies the weights."""
    bias: bool = False
    """Whether the logits have one."""
    correction: bool = False
    """Whether a bias is added to the scores for the choice alone; weights are the scores without it."""
    groups: int = 1
    top_groups: int = 1
    """Of equal groups of neighbouring experts, the best ones, from which alone is chosen."""
    group_score: Literal["max", "top2"] = "top2"
    """What makes a group good: its best score, or the sum of its best two."""
    float32: bool = False
    """Whether logits are computed in float32 of float32 weights, whatever the model's dtype."""
    jitter: float = 0.0
    """Half the distance from the best within which sparsemixer's softmax sees a logit."""
    expert_scale: bool = False
    """Whether each expert's weights are multiplied by a learnt number of its own (Gemma 4)."""


@dataclass(frozen=True)
class MixtureConfig:
    """A mixture of experts: feed-forward blocks of which each token has a few."""

    router: RouterConfig
    expert: MlpConfig
    shared: MlpConfig | None = None
    """A block that every token has besides."""
    shared_gate: bool = False
    """Whether its output is multiplied by the sigmoid of a number of each token's own."""
    shared_scale: float = 1.0
    """Multiplies its output."""
    latent_size: int | None = None
    """Experts read and write a space of that many dimensions; None: the residual stream's."""
    weigh_inputs: bool = False
    """Whether what enters a token's one expert is multiplied by its weight, not what leaves it (Llama 4)."""
    beside: bool = False
    """Whether experts and shared block stand side by side with norms of their own (Gemma 4): see
    `models.mixture.MixtureBesideMLP`.
    """

    def experts_touched(self, tokens: int) -> float:
        """Experts that so many tokens choose together, where every choice is as likely."""
        share = self.router.per_token / self.router.experts
        return self.router.experts * (1 - (1 - share) ** tokens)

    def weight_rows(self, tokens: int) -> float:
        """As `MlpConfig.weight_rows`, where every choice of experts is as likely."""
        touched = self.experts_touched(tokens)
        shared = 0.0 if self.shared is None else self.shared.weight_rows(tokens)
        return touched * self.expert.weight_rows(tokens) + shared + self.router.experts + self.shared_gate

    def activations(self, hidden: int) -> int:
        """As `MlpConfig.activations`."""
        shared = 0 if self.shared is None else self.shared.activations(hidden)
        return self.router.per_token * (self.expert.activations(hidden) + 4 * hidden) + shared


@dataclass(frozen=True)
class PerLayerInputConfig:
    """What each layer is given of each token besides the residual stream (Gemma 4)."""

    width: int
    vocab_size: int
    """Rows of its embedding table."""
    pad_id: int
    """The token whose row an image's tokens have."""
    activation: Literal["silu", "gelu", "gelu_tanh"]
