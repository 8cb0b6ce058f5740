"""The engine's own programs compiled for an H200 without one: `python -m tests.engine.h200`.

Prints a JSON line a program; see `tests.pallas_kernels.h200` for what it needs.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from lmdeploy_jax.bench import quantised, shapes, tune
from lmdeploy_jax.cache.kv import CacheSpec
from lmdeploy_jax.converters.families import build_config
from lmdeploy_jax.converters.load import LoadedModel, build_skeleton
from lmdeploy_jax.engine.core import buckets
from lmdeploy_jax.engine.core.batch import Slots
from lmdeploy_jax.engine.core.compile import compiler_options
from lmdeploy_jax.engine.core.page_tables import PageTables
from lmdeploy_jax.engine.core.program import Program, Programs
from lmdeploy_jax.engine.core.state import DeviceState
from lmdeploy_jax.engine.core.steps_gpu import GpuSteps
from lmdeploy_jax.models import tuning
from lmdeploy_jax.models.config import DecoderConfig
from lmdeploy_jax.models.formats import WeightFormat
from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.models.tuning import Measurement, Tuning
from lmdeploy_jax.pallas_kernels.prefill_attention import tile_rows
from lmdeploy_jax.pallas_kernels.skinny_gemm import StreamTiling
from lmdeploy_jax.parallel.mesh import AXES
from tests.pallas_kernels.h200 import TARGET, cache_copies, outside_command_buffer
from tests.pallas_kernels.programs import as_on_h200

LAYERS, PAGES, BATCH = 2, 513, 64
WANTED = (
    ("decode", 64),
    ("decode_greedy", 64),
    ("ragged", 1024),
    ("greedy", 64),
    ("sample", 64),
    ("steps_greedy", 64),
)


DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 0,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
QWEN3_NEXT = {
    "architectures": ["Qwen3NextForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "full_attention_interval": 2,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "max_position_embeddings": 4096,
}
NEMOTRON_3_NANO = {
    "architectures": ["NemotronHForCausalLM"],
    "hidden_size": 2688,
    "hybrid_override_pattern": "M*",
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 1856,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "max_position_embeddings": 4096,
}
MIXTURES = {
    "deepseek-v2-lite": (("decode_greedy", 1), ("decode_greedy", 64), ("ragged", 1024)),
    "qwen3-30b-a3b-half": (("decode_greedy", 1), ("decode_greedy", 64), ("ragged", 1024)),
}
FUSED = {"latent_queries": "pallas", "routing": "pallas"}
"""Fields that make launches of deepseek-v2-lite's decode steps fewer."""
RECURRENT = {
    "qwen3-next": (("decode_greedy", 1), ("decode_greedy", 64)),
    "nemotron-3-nano": (("decode_greedy", 64),),
}
"""Shapes whose programs are named after them, and which. Prompts of recurrent layers are loops of XLA's."""


QUANTISED = ("fp8", "awq", "smooth_quant")  # formats of the weights of llama3-8b


def programs_on(
    mesh: Mesh,
    shape: str,
    model_format: str | None = None,
    all_reduce: str | None = None,
    *,
    streams: bool = False,
    **ops: str,
) -> Programs:
    """The programs of a shape, cut to two layers and a small vocabulary.

    streams: as if Mosaic's products, and one kernel that gates and rounds, were the fastest for `BATCH` rows.
    ops: fields of the table.
    """
    known = {
        "deepseek-v2-lite": DEEPSEEK_V2_LITE,
        "qwen3-next": QWEN3_NEXT,
        "nemotron-3-nano": NEMOTRON_3_NANO,
    }
    raw = (known.get(shape) or shapes.read(shape)) | {"num_hidden_layers": LAYERS, "vocab_size": 4096}
    config, dtype = build_config(raw, shape), jnp.dtype("bfloat16")
    table = replace(tuning.load("NVIDIA H200"), all_reduce=all_reduce, **ops)
    if streams:
        table = table.merged(streamed(config, model_format))
    kernels = Kernels("pallas", mesh, table)
    formats = formats_of(config, model_format)
    skeleton = build_skeleton(config, dtype, kernels, formats)
    model = LoadedModel(skeleton, tuple(skeleton.specs.values()), dtype)
    sizes = buckets.plan("gpu", BATCH, 1024, steps=4)
    layout = config.cache_layout(mesh.devices.size, session_len=2048, step_tokens=1024)
    cache = CacheSpec(layout, PAGES, dtype, mesh, 2 * BATCH + 1)
    options = compiler_options("gpu", formats.values())
    programs = Programs(
        DeviceState(model, cache, BATCH),
        find=lambda program: program.lower().compile(),
        compiler_options=options,
    )
    slots = Slots(PageTables(2048, layout.groups, sizes), config.vocab_size)
    GpuSteps(programs, slots, sizes, tile_rows("pallas"))
    return programs


def streamed(config: DecoderConfig, model_format: str) -> Tuning:
    """A table in which every product of `BATCH` rows streams."""
    held, found = quantised.FORMATS[model_format].held, []
    for name, shape in tune.products(config).items():
        if name in ("qkv", "o", "gate_up", "down"):
            form, splits = held(shape.inner), 1 if shape.kind == "gated" else 4
            way = StreamTiling(128, 132, 4, splits, overlaps=form.groups > 1)
            row = Measurement(form.name, shape.kind, shape.out, shape.inner, BATCH, way, 1.0, 2.0)
            found.append(row)
    return Tuning(tuple(found), activation="pallas")


def formats_of(config: DecoderConfig, model_format: str | None) -> dict[str, WeightFormat]:
    """Those of a random checkpoint's weights."""
    if model_format is None:
        return {}
    held, inner = quantised.FORMATS[model_format].held, tune.products(config)
    names = {"attention.qkv": "qkv", "attention.o": "o", "mlp.gate_up": "gate_up", "mlp.down": "down"}
    return {
        f"layers.{layer}.{module}.weight": held(inner[name].inner)
        for layer in range(LAYERS)
        for module, name in names.items()
    }


def report(name: str, program: Program, cache: CacheSpec) -> dict[str, object]:
    """Compiles a program and returns its facts."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} | program.compiler_options
        compiled = program.lower().compile(compiler_options=options)
        (thunks,) = Path(folder).glob("*thunk_sequence_after_thunk_passes.txt")
        cache_bytes = sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(cache.specs))
        return {
            "program": name,
            "caches_aliased": compiled.memory_analysis().alias_size_in_bytes >= cache_bytes,
            "cache_copies": sum(cache_copies(compiled.as_text(), shape) for shape in _shapes(cache)),
            "outside_command_buffer": outside_command_buffer(Path(folder)),
            "launches": len(re.findall(r"^\s+\d+: k", thunks.read_text(), re.MULTILINE)),
        }


def _shapes(cache: CacheSpec) -> set[tuple[int, ...]]:
    return {spec.shape for spec in jax.tree.leaves(cache.specs)}


def main() -> None:
    jax.devices()  # loads the plugins
    topology = topologies.get_topology_desc(
        "", platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
    )
    mesh = topologies.make_mesh(topology, (1, 1, 1), AXES)
    with as_on_h200():
        programs = programs_on(mesh, "llama3-8b")
        for name, size in WANTED:
            print(json.dumps(report(name, programs[name, size], programs.state.cache)), flush=True)
        for model_format in QUANTISED:
            programs = programs_on(mesh, "llama3-8b", model_format)
            found = report(f"{model_format} decode", programs["decode", 1], programs.state.cache)
            print(json.dumps(found), flush=True)
            programs = programs_on(mesh, "llama3-8b", model_format, streams=True)
            found = report(f"{model_format} streams", programs["decode", BATCH], programs.state.cache)
            print(json.dumps(found), flush=True)
        programs = programs_on(mesh, "deepseek-v2-lite", **FUSED)
        found = report("fused decode", programs["decode_greedy", 1], programs.state.cache)
        print(json.dumps(found), flush=True)
        for shape, wanted in (MIXTURES | RECURRENT).items():
            programs = programs_on(mesh, shape)
            for name, size in wanted:
                full_name = f"{shape} {name} {size}"
                print(json.dumps(report(full_name, programs[name, size], programs.state.cache)), flush=True)


if __name__ == "__main__":
    main()
