"""The engine's configuration: LMDeploy's field names, checked when they are set."""

from __future__ import annotations

import enum
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Annotated, Any, Literal

from lmdeploy_jax.checked import Checked, Rule, at_least
from lmdeploy_jax.errors import ConfigError

PAGE_SIZE = 64  # tokens a page; the kernels are written for it
_SHARE = Rule("> 0: a share of the free memory below 1, else bytes", lambda value: 0 < value < inf)
_NO_TURBO_QUANT = "42, TurboQuant, is not implemented, since 4 is as small and costs less arithmetic"
_KNOWN_POLICY = Rule(
    f"0 (not at all), 4 (int4), 8 (int8), 16 (FP8, E4M3) or 17 (FP8, E5M2); {_NO_TURBO_QUANT}",
    (0, 4, 8, 16, 17).__contains__,
)
_Positive = Annotated[int, at_least(1)]
_Path = str | os.PathLike[str]
ModelFormat = Literal["hf", "awq", "gptq", "compressed-tensors", "fp8", "smooth_quant", "mxfp4", "modelopt"]

logger = logging.getLogger("lmdeploy_jax")


class QuantPolicy(enum.IntEnum):
    """How a KV cache is quantised, in LMDeploy's numbers."""

    NONE = 0
    INT4 = 4
    INT8 = 8
    FP8 = 16
    FP8_E5M2 = 17
    TURBO_QUANT = 42


@dataclass
class JaxEngineConfig(Checked):
    """How a model is loaded and run.

    Raises `ConfigError` for a value that cannot work, here and where a field is set later.

    tp, dp: the model is cut over `tp` devices, and there are `dp` copies of it, each in a process of its own
        on devices of its own; a program that has several must guard its own start with
        `if __name__ == "__main__"`.
    ep: parts that the experts of a mixture are dealt out in over the tp devices: tp, or what divides it. Then
        tp / ep devices share each part's experts as all devices share other layers.
    nnodes, node_rank, dist_init_addr: the tp devices lie on `nnodes` hosts, tp / nnodes on each, of which
        this is number `node_rank`; the address, HOST:PORT, is one of node 0, which takes the requests.
    cache_max_entry_count: share of the free memory given to the KV cache if < 1, else an absolute number of
        bytes.
    max_batch_size, max_prefill_token_num, session_len: None lets the engine choose by device and model.
    model_format: how the checkpoint is quantised, where neither its config.json nor a file beside it says so;
        "hf": not at all. "fp8" quantises a 16-bit checkpoint as it is read.
    hf_overrides: nested dict merged over the checkpoint's config.json.
    eager_mode: compile each program when it is first needed, not all ahead: quick to start, slow at first.
    language_model_only: leave out what encodes images of a model that takes any; it takes none then.
    vision_max_batch_size: images whose views are encoded in one run at most; None: as many as fit.
    trust_remote_code: whether a tokenizer that only the checkpoint's own Python code can read may run it,
        where transformers is installed; no other code of a checkpoint ever runs.
    quant_policy: how the KV cache is quantised, a `QuantPolicy`, each token and head with a scale of its own.
    enable_return_routed_experts: requests may ask which experts each token had (`return_routed_experts`).
    decode_steps: decode steps dispatched at once while no request waits. More than 1 spares the host, which
        limits small models, and brings tokens in bursts of that size. None: 4 for models below 4 GB a GPU,
        else 1.
    compile_cache_dir: where compiled programs are kept between runs; None is the user's cache folder, "" is
        off.
    """

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    tp: _Positive = 1
    dp: _Positive = 1
    ep: _Positive = 1
    nnodes: _Positive = 1
    node_rank: Annotated[int, at_least(0)] = 0
    dist_init_addr: str | None = None
    session_len: _Positive | None = None
    max_batch_size: _Positive | None = None
    cache_max_entry_count: Annotated[float, _SHARE] = 0.8
    enable_prefix_caching: bool = True
    max_prefill_token_num: _Positive | None = None
    quant_policy: Annotated[int, _KNOWN_POLICY] = 0
    decode_steps: _Positive | None = None
    backend: Literal["auto", "pallas", "xla"] = "auto"
    model_format: ModelFormat | None = None
    revision: str | None = None
    download_dir: _Path | None = None
    hf_overrides: dict[str, Any] | None = None
    compile_cache_dir: _Path | None = None
    eager_mode: bool = False
    language_model_only: bool = False
    vision_max_batch_size: _Positive | None = None
    trust_remote_code: bool = False
    enable_return_routed_experts: bool = False


@dataclass
class SpeculativeConfig(Checked):
    """A draft model, in LMDeploy's terms, which `pipeline` refuses: there is no speculative decoding yet."""

    method: str
    model: str = ""
    num_speculative_tokens: _Positive = 1


class _LmdeployConfig(Checked):
    """What LMDeploy's two engine configs share: which fields carry over, are refused or are ignored.

    A field is carried over to `JaxEngineConfig`, or refused when its value would change the results or the
    use of the hardware and cannot be honoured, or ignored with a warning when it only tunes LMDeploy's own
    engines.
    """

    _carried: dict[str, str]  # our field -> theirs
    _refused: dict[str, tuple[tuple[object, ...], str]]  # field -> (values that are fine, what to do instead)

    def __post_init__(self) -> None:
        self._refuse()
        self._carry_over()

    @classmethod
    def refused(cls, name: str) -> tuple[tuple[object, ...], str | None]:
        """A field's values that can be honoured, and what to do instead of others; None: all can."""
        return cls._refused.get(name, ((), None))

    def _refuse(self) -> None:
        """Raises ConfigError for what cannot be honoured."""
        for name, (fine, remedy) in self._refused.items():
            value = getattr(self, name)
            if value not in fine:
                raise ConfigError(f"{type(self).__name__}.{name}={value!r} is not supported: {remedy}")
        for name in _ALL_DEVICES:
            value = getattr(self, name, None)
            if value not in (None, self.tp):  # type: ignore[attr-defined]
                raise ConfigError(
                    f"{type(self).__name__}.{name}={value!r} is not supported: every layer is shared "
                    "out among the tp devices. Leave it out."
                )
        share = self.cache_max_entry_count  # type: ignore[attr-defined]
        if share >= 1:
            raise ConfigError(
                f"cache_max_entry_count={share!r} is a number of blocks in LMDeploy, which is not supported: "
                "give a share of the free memory in (0, 1), or a number of bytes in a JaxEngineConfig."
            )

    def _carry_over(self) -> JaxEngineConfig:
        return JaxEngineConfig(**{ours: getattr(self, theirs) for ours, theirs in self._carried.items()})

    def to_jax(self) -> JaxEngineConfig:
        """The same instructions for this engine. Warns of each field that has no meaning here.

        Raises ConfigError for fields that were set to what cannot be honoured.
        """
        self._refuse()
        known = {*self._carried.values(), *self._refused, *_ALL_DEVICES} - {"device_type"}  # JAX picks it
        for f in fields(self):  # type: ignore[arg-type]
            if f.name not in known and getattr(self, f.name) != f.default:
                logger.warning(
                    "%s.%s=%r has no meaning here and is ignored.",
                    type(self).__name__,
                    f.name,
                    getattr(self, f.name),
                )
        return self._carry_over()


_CARRIED = {
    name: name
    for name in (
        "dtype",
        "tp",
        "dp",
        "ep",
        "session_len",
        "max_batch_size",
        "cache_max_entry_count",
        "enable_prefix_caching",
        "max_prefill_token_num",
        "revision",
        "download_dir",
        "hf_overrides",
        "model_format",
        "quant_policy",
        "language_model_only",
    )
}
_ALL_DEVICES = ("attn_tp_size", "mlp_tp_size", "moe_tp_size", "device_num")  # so, whether given or not
_ONE_DEVICE_GROUP = ((None, 1), "tp cuts every layer, and dp copies the whole model; leave it out.")
_ONE_PAGE_SIZE = ((PAGE_SIZE,), f"pages hold {PAGE_SIZE} tokens; leave the field out.")
_REFUSED = {
    "empty_init": ((False,), "an engine without weights has no use here."),
}


@dataclass
class TurbomindEngineConfig(_LmdeployConfig):
    """LMDeploy's TurboMind options, translated by `to_jax`. An unknown field is a TypeError.

    Two defaults differ: prefix caching is on, and `max_prefill_token_num` is left to the engine.
    """

    _carried = _CARRIED | {name: name for name in ("nnodes", "node_rank", "dist_init_addr")}
    _refused = _REFUSED | {
        "cache_block_seq_len": _ONE_PAGE_SIZE,
        "cp": _ONE_DEVICE_GROUP,
        "attn_cp_size": _ONE_DEVICE_GROUP,
        "attn_dp_size": _ONE_DEVICE_GROUP,
        "mlp_dp_size": _ONE_DEVICE_GROUP,
        "outer_dp_size": _ONE_DEVICE_GROUP,
        "devices": ((None,), "choose GPUs before the process starts, with CUDA_VISIBLE_DEVICES."),
        "rope_scaling_factor": (
            (0.0,),
            'give hf_overrides={"rope_scaling": {...}} as in the model\'s config.json.',
        ),
        "use_logn_attn": ((False,), "logn attention is not implemented."),
    }

    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    model_format: ModelFormat | None = None
    tp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    device_num: int | None = None
    attn_tp_size: int | None = None
    attn_cp_size: int | None = None
    attn_dp_size: int | None = None
    mlp_tp_size: int | None = None
    mlp_dp_size: int | None = None
    outer_dp_size: int | None = None
    nnodes: int = 1
    node_rank: int = 0
    dist_init_addr: str | None = None
    devices: Sequence[int] | None = None
    session_len: int | None = None
    max_batch_size: int | None = None
    cache_max_entry_count: float = 0.8
    cache_chunk_size: int = -1
    cache_block_seq_len: int = PAGE_SIZE
    enable_prefix_caching: bool = True
    cache_checkpoint_interval: int = 4096
    cache_prompt: str = "auto"
    cache_prompt_boundary_skip: int = 1
    cache_generation: str = "auto"
    quant_policy: int = 0
    rope_scaling_factor: float = 0.0
    use_logn_attn: bool = False
    download_dir: _Path | None = None
    revision: str | None = None
    max_prefill_token_num: int | None = None
    num_tokens_per_iter: int = 0
    max_prefill_iters: int = 1
    async_: bool | int = 1
    empty_init: bool = False
    language_model_only: bool = False
    communicator: str = "nccl"
    hf_overrides: dict[str, Any] | None = None
    enable_metrics: bool = True


@dataclass
class PytorchEngineConfig(_LmdeployConfig):
    """LMDeploy's PyTorch-engine options, translated by `to_jax`.

    Two defaults differ: prefix caching is on, and `max_prefill_token_num` is left to the engine.
    `device_type` "cuda" means the device that JAX finds. `role` and `migration_backend` are the names of
    LMDeploy's enum members.
    """

    _carried = _CARRIED | {name: name for name in ("eager_mode", "enable_return_routed_experts")}
    _refused = _REFUSED | {
        "block_size": _ONE_PAGE_SIZE,
        "dp_rank": ((0,), "dp starts all copies of the model by itself; leave the field out."),
        "num_cpu_blocks": ((0,), "the KV cache is not moved to the host's memory; leave the field out."),
        "enable_eplb": ((False,), "ep deals every expert out once, however often it is chosen."),
        "num_gpu_blocks": ((0,), "give cache_max_entry_count, in bytes if need be, in a JaxEngineConfig."),
        "adapters": ((None, {}), "LoRA adapters cannot be loaded yet."),
        "device_type": (("cuda", "gpu", "cpu", "auto"), "JAX runs here on CUDA GPUs and on CPUs."),
        "custom_module_map": ((None, {}), "PyTorch modules cannot be used here."),
        "logprobs_mode": ((None, "raw_logprobs"), "log-probabilities are always those of the raw logits."),
        "dllm_block_length": ((None,), "diffusion language models are not implemented."),
        "dllm_denoising_steps": ((None,), "diffusion language models are not implemented."),
        "role": (("Hybrid",), "prefill and decode run in one engine."),
    }

    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    tp: int = 1
    dp: int = 1
    dp_rank: int = 0
    ep: int = 1
    session_len: int | None = None
    max_batch_size: int | None = None
    attn_tp_size: int | None = None
    mlp_tp_size: int | None = None
    moe_tp_size: int | None = None
    cache_max_entry_count: float = 0.8
    prefill_interval: int = 16
    block_size: int = PAGE_SIZE
    kernel_block_size: int = -1
    num_cpu_blocks: int = 0
    num_gpu_blocks: int = 0
    adapters: dict[str, str] | None = None
    max_prefill_token_num: int | None = None
    cudagraph_capture_batch_sizes: Sequence[int] | None = None
    thread_safe: bool = False
    enable_prefix_caching: bool = True
    prefix_cache_state_budget: int = 0
    prefix_cache_decode_state_interval: int = 0
    device_type: str = "cuda"
    eager_mode: bool = False
    custom_module_map: dict[str, str] | None = None
    download_dir: _Path | None = None
    revision: str | None = None
    quant_policy: int = 0
    distributed_executor_backend: str | None = None
    empty_init: bool = False
    enable_microbatch: bool = False
    enable_eplb: bool = False
    enable_mp_engine: bool = False
    mp_engine_backend: str = "mp"
    model_format: ModelFormat | None = None
    enable_metrics: bool = True
    hf_overrides: dict[str, Any] | None = None
    language_model_only: bool = False
    logprobs_mode: str | None = None
    enable_return_routed_experts: bool = False
    enable_transfer_obj_ref: bool = False
    dllm_block_length: int | None = None
    dllm_unmasking_strategy: str = "low_confidence_dynamic"
    dllm_denoising_steps: int | None = None
    dllm_confidence_threshold: float = 0.85
    role: str = "Hybrid"
    migration_backend: str = "DLSlime"


EngineConfig = JaxEngineConfig | TurbomindEngineConfig | PytorchEngineConfig


def engine_config(config: EngineConfig | None) -> JaxEngineConfig:
    """This engine's config from any of the accepted ones; None is the defaults. Raises `ConfigError`."""
    if config is None:
        return JaxEngineConfig()
    if isinstance(config, JaxEngineConfig):
        return config
    if isinstance(config, TurbomindEngineConfig | PytorchEngineConfig):
        return config.to_jax()
    raise ConfigError(
        f"backend_config is a {type(config).__name__}: give a JaxEngineConfig, TurbomindEngineConfig or "
        "PytorchEngineConfig."
    )


@dataclass
class VisionConfig(Checked):
    """How images are encoded, in LMDeploy's terms. Raises `ConfigError` for a value that cannot work.

    max_batch_size: images that are encoded together at most.
    thread_safe: says nothing here, since every pipeline is.
    """

    max_batch_size: _Positive = 1
    thread_safe: bool = False


def with_vision(config: JaxEngineConfig, vision: VisionConfig | None) -> JaxEngineConfig:
    """The config with what `vision` says. Raises `ConfigError` where both say how many images."""
    if vision is None:
        return config
    if not isinstance(vision, VisionConfig):
        raise ConfigError(f"vision_config is a {type(vision).__name__}: give a VisionConfig.")
    given = config.vision_max_batch_size
    if given not in (None, vision.max_batch_size):
        raise ConfigError(
            f"vision_config.max_batch_size={vision.max_batch_size} and vision_max_batch_size={given} differ: "
            "give one of them."
        )
    return replace(config, vision_max_batch_size=vision.max_batch_size)
