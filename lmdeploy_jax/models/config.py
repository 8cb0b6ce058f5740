"""What distinguishes one decoder-only family from another, as data: a list of layers, each made of parts.

Parts are frozen and shared between layers alike, so that each kind of layer is traced once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from lmdeploy_jax.cache.kinds import LatentCache, PagedCache
from lmdeploy_jax.cache.layout import CacheLayout, plan_layout
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.models.recurrent_config import RecurrentConfig
from lmdeploy_jax.pallas_kernels.options import AttentionOptions
from lmdeploy_jax.pallas_kernels.registry import why_not_heads, why_not_latents

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
ROPE_KINDS: Mapping[str, RopeKind] = {kind: kind for kind in get_args(RopeKind)}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. The kinds and their fields are those of HF's `modeling_rope_utils.py`."""

    dim: int
    """Leading elements of each head that rotate."""
    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    attention_factor: float = 1.0
    """Multiplies cos and sin."""
    original_max_position: int = 0
    """Context length before scaling; what dynamic NTK and longrope compare a sequence's length with."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    llama_4_scaling_beta: float = 0.0
    """b of the factor of rotated queries, `1 + b * ln(1 + position // original_max_position)`; 0: none."""
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    mrope_section: tuple[int, ...] = ()
    """How many frequencies turn by time, by row and by column (M-RoPE); empty: there is one position."""
    mrope_interleaved: bool = False
    """Whether time, row and column take turns among the frequencies, instead of one block each."""

    @property
    def depends_on_length(self) -> bool:
        """Whether frequencies change with the sequence's length (`Batch.rope_lens`)."""
        return self.kind in ("dynamic", "longrope")

    @property
    def switch_length(self) -> int | None:
        """Length beyond which a sequence's keys are all rotated anew (longrope's other set of factors)."""
        return self.original_max_position if self.kind == "longrope" else None


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention over a paged KV cache."""

    heads: int
    kv_heads: int
    head_dim: int
    options: AttentionOptions
    """Scale, window and soft cap, as the kernels take them."""
    rope: RopeConfig | None
    """None: queries and keys are not rotated."""
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of q and k, before the rotation."""
    qk_norm_width: bool = False
    """It goes over all heads of q, and over all of k, as one (OLMo 2)."""
    qk_norm_after_rope: bool = False
    """It comes behind the rotation (Hunyuan)."""
    gated: bool = False
    """Each query head's output is multiplied by the sigmoid of as many elements, a head of their own of the
    qkv product, behind the query's.
    """
    sinks: bool = False
    """Each query head has a learnt logit that joins its softmax's denominator (gpt-oss)."""
    output_multiplier: float = 1.0
    """Of the heads' outputs."""

    @property
    def is_plain(self) -> bool:
        """Whether the kernels do all that happens between the qkv product and the cache."""
        tempered = self.rope is not None and self.rope.llama_4_scaling_beta != 0
        return not (self.qk_norm_width or self.qk_norm_after_rope or tempered)

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.heads // self.kv_heads

    def held_kv_heads(self, tp: int) -> int:
        """KV heads that caches and weights hold on `tp` devices: at least one a device, by repeating them.

        Raises ConfigError where the heads cannot be dealt out evenly.
        """
        if self.kv_heads % tp == 0:
            return self.kv_heads
        repeats = tp // self.kv_heads
        if tp % self.kv_heads == 0 and self.group % repeats == 0:
            return tp
        raise ConfigError(
            f"tp={tp} cannot share out {self.heads} attention heads in {self.kv_heads} KV heads "
            f"evenly; choose a tp that divides {self.kv_heads}, or a multiple of it that divides "
            f"{self.heads}"
        )

    def cache(self, tp: int) -> PagedCache:
        """What the layer keeps of each token. Raises ConfigError as `held_kv_heads` does."""
        return PagedCache(self.held_kv_heads(tp), self.head_dim, self.options.window)

    def why_not_kernels(self) -> str | None:
        """Why the hand-written kernels cannot do it, or None if they can."""
        return why_not_heads(self.head_dim, self.group)

    def weights(self, hidden: int) -> int:
        """Elements of its matrices."""
        return hidden * self.head_dim * ((3 if self.gated else 2) * self.heads + 2 * self.kv_heads)

    def read_bytes(self, context: float, itemsize: int, tp: int) -> float:
        """Bytes that `tp` devices read of a sequence of `context` tokens in the cache, for its next one, at
        `itemsize` bytes an element.
        """
        reached = min(context, float(self.options.window or context))
        return itemsize * reached * 2 * self.held_kv_heads(tp) * self.head_dim

    def __str__(self) -> str:
        return f"attention with {self.heads} heads in {self.kv_heads} KV heads of {self.head_dim}"


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention over a cache of one latent a token."""

    heads: int
    latent_rank: int
    nope_dim: int
    """Elements of a head's query and key that do not rotate, and that the latent holds."""
    rope_dim: int
    """Those that rotate; all heads share their key."""
    value_dim: int
    options: AttentionOptions
    rope: RopeConfig | None
    query_rank: int | None = None
    """Queries come by way of a space of that many dimensions; None: straight."""
    bias: bool = False
    norm_eps: float = 1e-6
    """Of the norms of both latents."""

    def cache(self, tp: int) -> LatentCache:
        """What the layer keeps of each token."""
        return LatentCache(self.latent_rank + self.rope_dim)

    def why_not_kernels(self) -> str | None:
        """As `AttentionConfig.why_not_kernels`."""
        return why_not_latents(self.latent_rank, self.rope_dim)

    def weights(self, hidden: int) -> int:
        """As `AttentionConfig.weights`."""
        query = self.heads * (self.nope_dim + self.rope_dim)
        rank = self.query_rank
        queries = hidden * query if rank is None else rank * (hidden + query)
        both = self.latent_rank * self.heads * (self.nope_dim + self.value_dim)
        latents = hidden * (self.latent_rank + self.rope_dim)
        return queries + latents + both + hidden * self.heads * self.value_dim

    def read_bytes(self, context: float, itemsize: int, tp: int) -> float:
        """As `AttentionConfig.read_bytes`."""
        return itemsize * context * tp * (self.latent_rank + self.rope_dim)

    def __str__(self) -> str:
        return f"latent attention with {self.heads} heads"


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


@dataclass(frozen=True)
class MixtureConfig:
    """A mixture of experts: feed-forward blocks of which each token has a few."""

    router: RouterConfig
    expert: MlpConfig
    shared: MlpConfig | None = None
    """A block that every token has besides."""
    shared_gate: bool = False
    """Whether its output is multiplied by the sigmoid of a number of each token's own."""
    latent_size: int | None = None
    """Experts read and write a space of that many dimensions; None: the residual stream's."""

    def weight_rows(self, tokens: int) -> float:
        """As `MlpConfig.weight_rows`, where every choice of experts is as likely."""
        share = self.router.per_token / self.router.experts
        touched = self.router.experts * (1 - (1 - share) ** tokens)
        shared = 0.0 if self.shared is None else self.shared.weight_rows(tokens)
        return touched * self.expert.weight_rows(tokens) + shared + self.router.experts + self.shared_gate

    def activations(self, hidden: int) -> int:
        """As `MlpConfig.activations`."""
        shared = 0 if self.shared is None else self.shared.activations(hidden)
        return self.router.per_token * (self.expert.activations(hidden) + 4 * hidden) + shared


MixerConfig = AttentionConfig | LatentConfig | RecurrentConfig


@dataclass(frozen=True)
class LayerConfig:
    """A mixer of tokens and a feed-forward block, each with its norms, added to the residual stream. A layer
    may have one of them alone.
    """

    mixer: MixerConfig | None
    mlp: MlpConfig | MixtureConfig | None
    second_mixer: RecurrentConfig | None = None
    """It reads what `mixer` reads, and their sum is added (Falcon-H1)."""
    pre_norm: bool = True
    """A norm on what enters mixer and MLP."""
    post_norm: bool = False
    """A norm on what leaves mixer and MLP, before it is added to the residual."""
    parallel: bool = False
    """Mixer and MLP read the same, and one norm stands before both (Cohere)."""
    residual_multiplier: float = 1.0

    @property
    def added_plainly(self) -> bool:
        """Whether what mixer and MLP return is added to the residual stream as it is, each by itself."""
        alone = not self.parallel and self.second_mixer is None
        return alone and not self.post_norm and self.residual_multiplier == 1.0

    @property
    def mixers(self) -> tuple[MixerConfig, ...]:
        """The mixers that it has."""
        return tuple(mixer for mixer in (self.mixer, self.second_mixer) if mixer is not None)

    def activations(self, hidden: int) -> int:
        """Elements that a token takes at most in a part of the layer, besides a few of the hidden size."""
        mlp = 0 if self.mlp is None else self.mlp.activations(hidden)
        recurrent = (mixer for mixer in self.mixers if isinstance(mixer, RecurrentConfig))
        return max(mlp, *(mixer.activations(hidden) for mixer in recurrent), 0)


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and features of a decoder."""

    hidden_size: int
    vocab_size: int
    max_position: int
    """Longest sequence the checkpoint's config names; the default session length."""
    layers: tuple[LayerConfig, ...]
    exact_length: int | None = None
    """Longest sequence of which all tokens are attended to: of longer ones the model would choose some, by an
    index that does not exist here.
    """
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm or LayerNorm."""
    norm_bias: bool = False
    """Whether every LayerNorm has one."""
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    """Added to every norm's weight; 1 in Gemma."""
    tie_embeddings: bool = False
    head_bias: bool = False
    """Whether the output head has one; not with tied embeddings."""
    logit_soft_cap: float | None = None
    embedding_multiplier: float = 1.0
    logit_multiplier: float = 1.0

    def check_length(self, session_len: int | None) -> int:
        """What an engine's `session_len`, or None, comes to. Raises ConfigError for one that is too long."""
        limit = self.exact_length
        if limit is None:
            return session_len or self.max_position
        if session_len is not None and session_len > limit:
            raise ConfigError(
                f"session_len={session_len}: of more than {limit} tokens this model chooses some by an index "
                f"that is not implemented; choose a session_len of at most {limit}"
            )
        return session_len or min(self.max_position, limit)

    @property
    def mixers(self) -> tuple[MixerConfig, ...]:
        """Those of all layers, in order."""
        return tuple(mixer for layer in self.layers for mixer in layer.mixers)

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The rotations that occur, each once, in the order of the layers."""
        return tuple(dict.fromkeys(mixer.rope for mixer in self.mixers if mixer.rope is not None))

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's keys depend on the length of its sequence, so that prefixes cannot be shared."""
        return any(rope.depends_on_length for rope in self.ropes)

    @property
    def is_recurrent(self) -> bool:
        """Whether layers keep a state of a whole sequence, of which prefixes have none of their own."""
        return any(isinstance(mixer, RecurrentConfig) for mixer in self.mixers)

    @property
    def mrope(self) -> bool:
        """Whether tokens have positions of time, row and column."""
        return any(rope.mrope_section for rope in self.ropes)

    @property
    def rope_switch(self) -> int | None:
        """See `RopeConfig.switch_length`."""
        lengths = [rope.switch_length for rope in self.ropes if rope.switch_length is not None]
        return min(lengths, default=None)

    def cache_layout(self, tp: int, *, session_len: int, step_tokens: int) -> CacheLayout:
        """What the layers keep on `tp` devices of sequences of at most `session_len` tokens, computed at most
        `step_tokens` at a time. Raises ConfigError as `AttentionConfig.cache` does.
        """
        kinds = [mixer.cache(tp) for mixer in self.mixers]
        return plan_layout(kinds, session_len=session_len, step_tokens=step_tokens)
