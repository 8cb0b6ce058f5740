"""What distinguishes one decoder-only family from another, as data: a list of layers, each made of parts.

Parts are frozen and shared between layers alike, so that each kind of layer is traced once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lmdeploy_jax.cache.kinds import LatentCache, PagedCache, SharedCache
from lmdeploy_jax.cache.layout import CacheLayout, plan_layout
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.models.mlp_config import MixtureConfig, MlpConfig, PerLayerInputConfig
from lmdeploy_jax.models.recurrent_config import RecurrentConfig
from lmdeploy_jax.models.score_config import ScoreConfig
from lmdeploy_jax.pallas_kernels.kv_formats import KVFormat
from lmdeploy_jax.pallas_kernels.options import PAGE_SIZE, AttentionOptions
from lmdeploy_jax.pallas_kernels.registry import why_not_heads, why_not_latents

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]
ROPE_KINDS: Mapping[str, RopeKind] = {kind: kind for kind in get_args(RopeKind)}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. The kinds and their fields are those of HF's `modeling_rope_utils.py`."""

    dim: int
    """Leading elements of each head that rotate; 0: none, where only queries grow with their position."""
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
    """b of the queries' factor, `1 + b * ln(1 + (position + offset) // original_max_position)`; 0: none."""
    llama_4_scaling_offset: int = 0
    turning_share: float = 1.0
    """Of the frequencies of kind proportional, the share that turns at all: the first ones."""
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
    qk_norm_weight: bool = True
    """Whether these norms have weights."""
    qk_norm_width: bool = False
    """It goes over all heads of q, and over all of k, as one (OLMo 2)."""
    qk_layer_norm: bool = False
    """It is a LayerNorm; each head has weights of its own, in the order of pairs that rotate (Command R+)."""
    qk_norm_after_rope: bool = False
    """It comes behind the rotation (Hunyuan)."""
    v_norm: bool = False
    """RMSNorm without weight over each head of v (Gemma 4)."""
    k_eq_v: bool = False
    """Values are what keys are before their norm and rotation (Gemma 4)."""
    causal: bool = False
    """Whether tokens of an image see none behind them here, even where a model lets them (Gemma 4)."""
    shared_layer: int | None = None
    """The earlier layer whose keys and values it reads instead of any of its own (Gemma 4)."""
    gated: bool = False
    """Each query head's output is multiplied by the sigmoid of as many elements, a head of their own of the
    qkv product, behind the query's.
    """
    sinks: bool = False
    """Each query head has a learnt logit that joins its softmax's denominator (gpt-oss)."""
    output_multiplier: float = 1.0
    """Of the heads' outputs."""
    kv_format: KVFormat | None = None
    """How the cache holds keys and values; None: in the model's dtype."""

    @property
    def is_plain(self) -> bool:
        """Whether the kernels do all that happens between the qkv product and the cache."""
        tempered = self.rope is not None and self.rope.llama_4_scaling_beta != 0
        norms = self.qk_norm_width or self.qk_layer_norm or self.qk_norm_after_rope or self.v_norm
        return not (norms or self.k_eq_v or tempered)

    @property
    def is_read_by_kernels(self) -> bool:
        """Whether they read the qkv product as it is."""
        return self.is_plain and not self.gated and self.shared_layer is None

    @property
    def own_rows(self) -> int:
        """Of the heads that come of a KV head's product, those that are no query's: its key, its value."""
        return 0 if self.shared_layer is not None else 1 if self.k_eq_v else 2

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

    def cache(self, tp: int) -> PagedCache | SharedCache:
        """What the layer keeps of each token. Raises ConfigError as `held_kv_heads` does."""
        if self.shared_layer is not None:
            return SharedCache(self.shared_layer)
        heads, chunk = self.held_kv_heads(tp), self.options.chunk
        if chunk is not None and chunk % PAGE_SIZE == 0:
            return PagedCache(heads, self.head_dim, chunk, chunked=True, format=self.kv_format)
        return PagedCache(heads, self.head_dim, self.options.window, format=self.kv_format)

    def why_not_kernels(self) -> str | None:
        """Why the hand-written kernels cannot do it, or None if they can."""
        held = None if self.kv_format is None else self.kv_format.why_not_heads(self.head_dim)
        return why_not_heads(self.head_dim, self.group) or held

    def weights(self, hidden: int) -> int:
        """Elements of its matrices."""
        queries = (3 if self.gated else 2) * self.heads
        return hidden * self.head_dim * (queries + self.own_rows * self.kv_heads)

    def read_bytes(self, context: float, itemsize: int, tp: int) -> float:
        """Bytes that `tp` devices read of a sequence of `context` tokens in the cache, for its next one, at
        `itemsize` bytes an element.
        """
        reached = min(context, float(self.options.window or self.options.chunk or context))
        form, size = self.kv_format, self.head_dim
        head = itemsize * size if form is None else form.head_bytes(size)
        return head * reached * 2 * self.held_kv_heads(tp)

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
    per_layer_input: PerLayerInputConfig | None = None
    layer_scalar: bool = False
    """Whether what leaves the layer is multiplied by a learnt number (Gemma 4)."""

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
    reports_routes: bool = False
    """Whether each token's hidden state has behind it the numbers of its experts, `choices` a layer."""
    score: ScoreConfig | None = None
    """A head that judges texts. Where it has weights it stands in the output head's place, which is the
    embedding then and only draws a token that ends a request.
    """

    @property
    def judges_only(self) -> bool:
        """Whether the model gives scores and no text."""
        return self.score is not None and self.score.has_weights

    @property
    def choices(self) -> int:
        """Most experts that a layer gives a token."""
        mixtures = (layer.mlp for layer in self.layers if isinstance(layer.mlp, MixtureConfig))
        return max((mixture.router.per_token for mixture in mixtures), default=0)

    @property
    def row_width(self) -> int:
        """Elements of a token's row as a forward pass gives it."""
        return self.hidden_size + (len(self.layers) * self.choices if self.reports_routes else 0)

    def with_routes(self) -> DecoderConfig:
        """The same, reporting routes. Raises ConfigError where there are none."""
        if not self.choices:
            raise ConfigError(
                "enable_return_routed_experts=True: this model has no mixtures of experts; leave it out"
            )
        return replace(self, reports_routes=True)

    def check_routes(self, dtype: str) -> None:
        """Raises ConfigError where routes are reported and `dtype` cannot tell all experts apart."""
        mixtures = [layer.mlp for layer in self.layers if isinstance(layer.mlp, MixtureConfig)]
        most = {"bfloat16": 2**8, "float16": 2**11}.get(dtype, 2**24)
        experts = max((mixture.router.experts for mixture in mixtures), default=0)
        if self.reports_routes and experts > most:
            raise ConfigError(
                f"enable_return_routed_experts=True: {dtype} tells at most {most} experts apart, and there "
                f"are {experts}; take dtype='float32'"
            )

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
    def per_layer_input(self) -> PerLayerInputConfig | None:
        """That of its layers, which all have one, or none."""
        return self.layers[0].per_layer_input

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
