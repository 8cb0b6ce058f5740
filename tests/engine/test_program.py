"""A program's arguments have names, and only those; what it writes is told, and stays with the state."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax.cache.kv import CacheSpec
from lmdeploy_jax.converters.load import load_model
from lmdeploy_jax.engine.core.compile import compiler_options, read_or_compile
from lmdeploy_jax.engine.core.program import Ladder, Programs
from lmdeploy_jax.engine.core.program_cache import ProgramCache
from lmdeploy_jax.engine.core.state import DeviceState, Update
from lmdeploy_jax.models.formats import E4M3, WeightFormat
from lmdeploy_jax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def programs(llama):
    model, mesh = load_model(llama), make_mesh(1)
    state = DeviceState(
        model,
        CacheSpec(model.config.cache_layout(1, session_len=64, step_tokens=64), 2, model.dtype, mesh),
        3,
    )
    state.allocate_caches()
    return Programs(state, find=lambda program: program.lower().compile())


def shifted(pending, by, scale):
    """Two inputs that an exchange would not break, but change."""
    return pending * scale, Update(pending=pending + by)


def test_names_find_their_arrays_in_any_order(programs):
    ints = programs.state.ints()
    program = programs.add("shifted", shifted, writes=("pending",), by=ints, scale=ints)
    held = programs.state.pending = programs.state.put(np.full(4, 5, np.int32))
    result = program(scale=np.int32(3), by=np.int32(2))
    assert result.tolist() == [15] * 4
    assert programs.state.pending.tolist() == [7] * 4
    assert held.is_deleted(), "what a program writes it may overwrite in place"


def test_xla_is_told_a_models_options(programs):
    told = Programs(programs.state, programs.find, {"xla_no_such_option": True})
    program = told.add("read", lambda pending: (pending, Update()))
    with pytest.raises(Exception, match="xla_no_such_option"):
        read_or_compile(program, ProgramCache(None, jax.devices()))


def test_only_products_of_rounded_rows_do_without_tritons():
    rounded = WeightFormat(E4M3, 64, 1, "float32", activations=E4M3)
    assert compiler_options("gpu", [rounded]) == {"xla_gpu_enable_triton_gemm": False}
    assert compiler_options("gpu", [replace(rounded, activations=None)]) == {}
    assert compiler_options("cpu", [rounded]) == {}


def test_what_is_only_read_stays(programs):
    program = programs.add("read", lambda pending, by: (pending + by, Update()), by=programs.state.ints())
    held = programs.state.pending
    program(by=np.int32(1))
    assert programs.state.pending is held
    assert not held.is_deleted()


@pytest.mark.parametrize("given", [{"by": 1}, {"by": 1, "scale": 1, "mask": 1}, {"by": 1, "scales": 1}])
def test_a_call_gives_exactly_the_inputs(programs, given):
    ints, size = programs.state.ints(), len(programs)  # a name of its own for each case
    program = programs.add("given", shifted, size=size, writes=("pending",), by=ints, scale=ints)
    with pytest.raises(TypeError, match=r"takes \['by', 'scale'\]"):
        program(**given)


def test_parameters_and_inputs_match(programs):
    with pytest.raises(TypeError, match="'caches_' is no parameter"):
        programs.add("unread", lambda caches: (None, Update()), caches_=programs.state.ints())
    with pytest.raises(TypeError, match="'peding' is neither an input nor state"):
        programs.add("unknown", lambda peding: (None, Update()))


def test_what_is_written_must_be_told(programs):
    program = programs.add("secret", lambda pending: (None, Update(pending=pending + 1)))
    with pytest.raises(AssertionError, match=r"writes \{'pending'\}"):
        program()
    program = programs.add("idle", lambda pending: (pending, Update()), writes=("pending",))
    with pytest.raises(AssertionError, match=r"writes set\(\)"):
        program()


def test_two_programs_of_one_name_are_refused(programs):
    programs.add("twin", lambda pending: (jnp.sum(pending), Update()), size=2)
    with pytest.raises(AssertionError, match="two programs"):
        programs.add("twin", lambda pending: (jnp.sum(pending), Update()), size=2)


def test_the_smallest_size_that_holds_is_taken(programs):
    ladder = Ladder(
        (1, 8, 32), lambda size: programs.add("sized", lambda pending: (None, Update()), size=size)
    )
    assert [ladder.fit(wanted).size for wanted in (1, 2, 8, 9, 32)] == [1, 8, 8, 32, 32]
    with pytest.raises(ValueError, match="33 is beyond the largest compiled size 32"):
        ladder.fit(33)
