"""From a model's name and a config to the engine's parts: load, plan the memory, compile."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lmdeploy_jax.cache.encoder_cache import EncoderCacheManager
from lmdeploy_jax.cache.kv import CacheSpec, MemoryPlan, free_bytes
from lmdeploy_jax.cache.layout import CacheLayout
from lmdeploy_jax.cache.manager import CacheManager
from lmdeploy_jax.cache.states import StateIndex
from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.converters.load import LoadedModel, load_model
from lmdeploy_jax.converters.vision_config import servable_vision
from lmdeploy_jax.engine.core import buckets as bucket_plan
from lmdeploy_jax.engine.core.batch import Slots
from lmdeploy_jax.engine.core.buckets import Buckets
from lmdeploy_jax.engine.core.compile import (
    compile_all,
    compiler_options,
    read_or_compile,
    tuning_of,
    use_cache,
)
from lmdeploy_jax.engine.core.memory import kept_states, plan
from lmdeploy_jax.engine.core.page_tables import PageTables
from lmdeploy_jax.engine.core.program import Programs
from lmdeploy_jax.engine.core.program_cache import ProgramCache
from lmdeploy_jax.engine.core.published import PublishedPrograms
from lmdeploy_jax.engine.core.runner import Runner
from lmdeploy_jax.engine.core.scheduler import Scheduler
from lmdeploy_jax.engine.core.state import DeviceState, Leaves
from lmdeploy_jax.engine.core.steps import Steps
from lmdeploy_jax.engine.core.steps_cpu import CpuSteps
from lmdeploy_jax.engine.core.steps_gpu import GpuSteps
from lmdeploy_jax.engine.decoder_config import changed_config, decoder_config
from lmdeploy_jax.engine.facts import Startup
from lmdeploy_jax.engine.nodes.cluster import OneNode, check_programs, join
from lmdeploy_jax.engine.progress import announce, loading_bar
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.hub import resolve_model
from lmdeploy_jax.models.config import DecoderConfig
from lmdeploy_jax.models.tuning import UNTUNED
from lmdeploy_jax.pallas_kernels.prefill_attention import tile_rows
from lmdeploy_jax.pallas_kernels.registry import why_not
from lmdeploy_jax.parallel.mesh import make_mesh

if TYPE_CHECKING:
    from lmdeploy_jax.converters.vision import LoadedVisionModel

log = logging.getLogger("lmdeploy_jax")
HOST_BOUND = 4e9  # bytes of weights a device below which a GPU's step ends before the host has the next
ANY_LENGTH = 1 << 30  # of a prompt in tokens
DEFAULTS = {"cpu": (32, 256), "gpu": (256, 8192)}  # sequences, tokens a step


@dataclass(frozen=True)
class Parts:
    """What an engine is made of."""

    nodes: OneNode
    folder: Path
    model_config: DecoderConfig
    session_len: int
    memory: MemoryPlan
    cache_layout: CacheLayout
    buckets: Buckets
    scheduler: Scheduler
    programs: Programs
    runner: Runner
    startup: Startup
    reload: Callable[[], tuple[Leaves, Leaves]]  # the same weights, read again, as `DeviceState.weights`
    on_cpu: bool


def set_up(model: str | Path, config: JaxEngineConfig, *, progress: bool) -> Parts:
    """Everything up to the first request. Raises ConfigError, CheckpointError, UnsupportedModelError."""
    started = time.perf_counter()
    cache_folder = use_cache(config.compile_cache_dir)
    folder = resolve_model(str(model), revision=config.revision, download_dir=config.download_dir)
    nodes = join(config, folder, progress=progress)
    mesh = make_mesh(tp=config.tp, ep=config.ep)
    platform = mesh.devices.flat[0].platform
    model_config = decoder_config(folder, config)
    session_len = _session_len(config, model_config)
    backend = choose_backend(config.backend, mesh.devices.flat[0], model_config)
    begun = time.perf_counter()
    reload = partial(_reload, folder, config, mesh, backend)
    loaded = _load(folder, config, mesh, backend, progress)
    vision = _load_vision(folder, config, mesh, backend)
    loading = time.perf_counter() - begun
    steps = _decode_steps(config, loaded, mesh)
    buckets, encoder_cache = _buckets(config, platform, steps, vision), None
    if vision is not None:
        buckets = _encoder_buckets(buckets, loaded, vision, platform, session_len)
        encoder_cache = _encoder_cache(config, vision, buckets)
    layout = model_config.cache_layout(config.tp, session_len=session_len, step_tokens=buckets.max_tokens)
    free = min(nodes.exchange(free_bytes(mesh)))
    kept = kept_states(config, loaded, buckets, layout, free)
    memory = plan(config, loaded, vision, mesh, buckets, session_len, layout, len(kept), free)
    log.info("%s", memory)
    session_len = _fitting(session_len, layout.longest(memory.num_pages - 1))
    spec = CacheSpec(layout, memory.num_pages, loaded.dtype, mesh, buckets.max_batch_size + len(kept) + 1)
    begun = time.perf_counter()
    tables = PageTables(session_len, layout.groups, buckets)
    slots = Slots(tables, model_config.vocab_size, mrope=model_config.mrope)
    programs, runner = _runner(
        nodes,
        loaded,
        vision,
        spec,
        slots,
        buckets,
        cache_folder,
        ahead=not config.eager_mode,
        progress=progress,
    )
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(runner.state.weights))
    startup = Startup(backend, weight_bytes, loading, time.perf_counter() - begun)
    scheduler = Scheduler(
        _cache_manager(config, model_config, memory, layout, kept),
        max_batch_size=buckets.max_batch_size,
        max_tokens=buckets.max_tokens,
        session_len=session_len,
        rope_switch=model_config.rope_switch,
        decode_steps=steps,
        encoder_cache=encoder_cache,
    )
    on_cpu, seconds = platform == "cpu", time.perf_counter() - started
    announce(progress, f"ready in {seconds:.1f} s, room for {memory.room:,} tokens of context")
    return Parts(
        nodes,
        folder,
        model_config,
        session_len,
        memory,
        layout,
        buckets,
        scheduler,
        programs,
        runner,
        startup,
        reload,
        on_cpu,
    )


def _runner(
    nodes: OneNode,
    model: LoadedModel,
    vision: LoadedVisionModel | None,
    spec: CacheSpec,
    slots: Slots,
    buckets: Buckets,
    folder: Path | None,
    *,
    ahead: bool,
    progress: bool,
) -> tuple[Programs, Runner]:
    """A runner ready for its first step. Compiled programs are kept in `folder`; `ahead`: all of them are
    read or compiled now.
    """
    devices, kernels = list(spec.mesh.devices.flat), model.skeleton.kernels
    state = DeviceState(model, spec, slots.max_batch_size, vision, buckets.image_rows)
    family = steps_for(devices[0].platform)
    rows = tile_rows(kernels.backend)
    shapes = (state.specs, slots.tables.session_len, rows, buckets, spec)
    formats = tuple(model.skeleton.formats.items())  # arrays alike are multiplied otherwise
    configs = (model.config, None if vision is None else vision.config)
    cache = ProgramCache(folder, devices, kernels, configs, formats, family, *shapes)
    check_programs(nodes, cache.fingerprint)
    options = compiler_options(devices[0].platform, model.skeleton.formats.values(), nodes=nodes.count)
    how = (state, partial(read_or_compile, cache=cache), options)
    programs = PublishedPrograms(nodes, *how) if nodes.leads_others else Programs(*how)
    runner = Runner(programs, slots, family(programs, slots, buckets, rows))
    if ahead:
        programs.use(compile_all(programs, cache, progress=progress))
    runner.allocate_caches()
    if ahead and nodes.leads:
        runner.warm_up()
    return programs, runner


def steps_for(platform: str) -> type[Steps]:
    """How a device kind runs its steps."""
    return CpuSteps if platform == "cpu" else GpuSteps


def choose_backend(backend: str, device: jax.Device, model: DecoderConfig) -> str:
    """`auto` is `pallas` where the device and at least one kind of layer allow it, else `xla`. Raises
    ConfigError for a `pallas` that no layer can have.

    Layers that cannot have it attend through XLA (`Kernels.mixer_backend`).
    """
    reasons = _why_not_pallas(device, model)
    reason = None if None in reasons.values() else next(iter(reasons.values()))
    if backend == "auto" and reason:
        if device.platform != "cpu":
            log.warning("backend xla instead of pallas: %s", reason)
        return "xla"
    if backend == "pallas" and reason:
        raise ConfigError(f"backend='pallas' cannot be used: {reason}. Use backend='auto' or 'xla'.")
    for kind, why in reasons.items() if backend != "xla" else ():
        if why:
            log.warning("%s uses xla: %s", kind, why)
    return "pallas" if backend == "auto" else backend


def _why_not_pallas(device: jax.Device, model: DecoderConfig) -> dict[str, str | None]:
    """What speaks against it for each kind of attention."""
    general = why_not(device.platform, compute_capability=_compute_capability(device))
    return {str(mixer): general or mixer.why_not_kernels() for mixer in model.mixers}


def _compute_capability(device: jax.Device) -> float | None:
    capability = getattr(device, "compute_capability", None)
    return float(capability) if capability else None


def _load(folder: Path, config: JaxEngineConfig, mesh: Mesh, backend: str, progress: bool) -> LoadedModel:
    start = time.perf_counter()
    with loading_bar(progress) as on_progress:
        loaded = load_model(
            folder,
            dtype=config.dtype,
            mesh=mesh,
            backend=backend,
            tuning=tuning_of(mesh, backend),
            hf_overrides=config.hf_overrides,
            model_format=config.model_format,
            config=changed_config(folder, config),
            on_progress=on_progress,
        )
        jax.block_until_ready(loaded.leaves)
    loaded.config.check_routes(str(loaded.dtype))
    if mesh.devices.flat[0].platform == "cpu" and loaded.dtype != jnp.float32:
        log.warning("dtype %s on a CPU is far slower than float32, which dtype='auto' takes", loaded.dtype)
    log.info("loaded %s in %.1f s, backend %s", folder, time.perf_counter() - start, backend)
    return loaded


def _reload(folder: Path, config: JaxEngineConfig, mesh: Mesh, backend: str) -> tuple[Leaves, Leaves]:
    vision = _load_vision(folder, config, mesh, backend)
    loaded = _load(folder, config, mesh, backend, False)
    return loaded.leaves, () if vision is None else vision.leaves


def _load_vision(folder: Path, config: JaxEngineConfig, mesh: Mesh, backend: str) -> LoadedVisionModel | None:
    if config.language_model_only or servable_vision(folder, config.hf_overrides) is None:
        return None
    from lmdeploy_jax.converters.vision import load_vision

    table = tuning_of(mesh, backend) if mesh.size == 1 else UNTUNED  # Mosaic's calls know one device
    how: dict[str, Any] = {"dtype": config.dtype, "mesh": mesh, "hf_overrides": config.hf_overrides}
    fused = table.encoder_sums == "mosaic"
    loaded = load_vision(folder, backend=table.encoder or backend, fused=fused, **how)
    jax.block_until_ready(loaded.leaves)
    return loaded


def _decode_steps(config: JaxEngineConfig, model: LoadedModel, mesh: Mesh) -> int:
    if config.decode_steps is not None:
        return config.decode_steps
    weights = sum(leaf.nbytes for leaf in model.leaves) / mesh.devices.size
    return 4 if mesh.devices.flat[0].platform != "cpu" and weights < HOST_BOUND else 1


def _buckets(config: JaxEngineConfig, platform: str, steps: int, vision: LoadedVisionModel | None) -> Buckets:
    batch, tokens = DEFAULTS["cpu" if platform == "cpu" else "gpu"]
    batch, most = config.max_batch_size or batch, config.max_prefill_token_num or tokens
    if vision is not None and vision.family.bidirectional:
        most = _for_whole_views(most, vision, batch)
    return bucket_plan.plan(platform, batch, most, steps)


def _for_whole_views(tokens: int, vision: LoadedVisionModel, batch: int) -> int:
    """Tokens of a step that can hold all of a view's, beside sequences that decode."""
    from lmdeploy_jax.vision.packing import most_places, output_of

    largest = most_places(vision.config, ANY_LENGTH)
    least = output_of(vision.config, 1 if largest is None else largest) + batch
    if tokens < least:
        log.warning("max_prefill_token_num is %d instead of %d: no step cuts an image", least, tokens)
    return max(tokens, least)


def _encoder_buckets(
    buckets: Buckets, model: LoadedModel, vision: LoadedVisionModel, platform: str, session_len: int
) -> Buckets:
    """With runs for the largest image that a prompt can hold, and room for the rows of it and of others."""
    from lmdeploy_jax.vision.packing import most_places, output_of

    tower, longest = vision.config.tower, most_places(vision.config, session_len)
    if longest is not None:
        unit = lcm(tower.window or 1, vision.config.processor.merge**2)
        buckets = buckets.for_patches("cpu" if platform == "cpu" else "gpu", longest, unit)
    row_bytes = (1 + len(tower.deepstack)) * model.config.hidden_size * jnp.dtype(model.dtype).itemsize
    least = output_of(vision.config, 1 if longest is None else buckets.encoder[-1]) + vision.config.learned
    return replace(buckets, image_rows=bucket_plan.image_rows(platform, row_bytes, least))


def _encoder_cache(
    config: JaxEngineConfig, vision: LoadedVisionModel, buckets: Buckets
) -> EncoderCacheManager:
    return EncoderCacheManager(
        buckets.image_rows,
        run_size=buckets.shared,
        joining_size=buckets.joining,
        max_batch_size=config.vision_max_batch_size,
        learned=vision.config.learned,
        bidirectional=vision.family.bidirectional,
    )


def _session_len(config: JaxEngineConfig, model: DecoderConfig) -> int:
    limit = model.exact_length
    if limit is not None and config.session_len is None:
        log.warning("sequences have at most %d tokens: the index of longer ones is missing", limit)
    session_len = model.check_length(config.session_len)
    if session_len > model.max_position and {rope.kind for rope in model.ropes} == {"default"}:
        log.warning(
            "session_len=%d: this model was made for %d tokens, and what it says beyond may make no sense; "
            "rope_scaling in hf_overrides can stretch it", session_len, model.max_position,
        )  # fmt: skip
    return session_len


def _fitting(session_len: int, most: int) -> int:
    """`session_len`, or as much of it as the whole KV cache holds."""
    if session_len > most:
        log.warning("session_len is %d instead of %d: the KV cache holds no more tokens", most, session_len)
    return min(session_len, most)


def _caches_prefixes(config: JaxEngineConfig, model: DecoderConfig) -> bool:
    if config.enable_prefix_caching and model.depends_on_length:
        log.warning("prefix caching is off: this model's RoPE depends on the whole prompt's length")
        return False
    return config.enable_prefix_caching


def _cache_manager(
    config: JaxEngineConfig, model: DecoderConfig, memory: MemoryPlan, layout: CacheLayout, kept: range
) -> CacheManager:
    states = StateIndex(kept) if model.is_recurrent else None
    return CacheManager(
        memory.num_pages, layout.groups, enabled=_caches_prefixes(config, model), states=states
    )
