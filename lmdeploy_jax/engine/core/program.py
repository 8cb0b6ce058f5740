"""A compiled function with all that belongs to it: what it reads and writes, how its step is packed."""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any

import jax

from lmdeploy_jax.engine.core.batch import Layout
from lmdeploy_jax.engine.core.program_cache import Key
from lmdeploy_jax.engine.core.state import DeviceState, Update

Function = Callable[..., tuple[Any, Update]]


class Program:
    """A function over arrays, compiled for one size.

    The function's parameters are its one description: each is an array of the `DeviceState` of that name, or
    an input that every call gives by that name (what follows a `*` is bound already). It returns its result
    and an `Update` of the state, of which it may overwrite what it `writes`. `layout` is that of its input
    `packed`, if it has one. Raises TypeError where names do not match, here and when it is called.
    """

    def __init__(
        self,
        key: Key,
        function: Function,
        programs: Programs,
        *,
        writes: tuple[str, ...],
        layout: Any,
        inputs: Mapping[str, Any],
        compiler_options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.key, self.layout = key, layout
        self._function, self._writes = function, writes
        self._state, self._find = programs.state, programs.find
        self.compiler_options = {**programs.compiler_options, **compiler_options}
        parameters = inspect.signature(function).parameters.values()
        self._names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self._inputs = inputs.keys()
        self._specs = self._specs_among({**self._state.specs, **inputs})

    def _specs_among(self, known: Mapping[str, Any]) -> tuple[Any, ...]:
        """Those of the parameters, in order. Raises TypeError for a name that has no counterpart."""
        for name in self._names:
            if name not in known:
                raise TypeError(f"program {self.key}: {name!r} is neither an input nor state ({list(known)})")
        for name in self._inputs:
            if name not in self._names:
                raise TypeError(f"program {self.key}: {name!r} is no parameter ({self._names})")
        return tuple(known[name] for name in self._names)

    @property
    def size(self) -> int:
        return self.key[1]

    def pack(self, *args: Any, **options: Any) -> Any:
        """One call's `packed`, see the layout."""
        return self.layout.pack(*args, **options)

    def __call__(self, **inputs: Any) -> Any:
        """Dispatch it; the state holds what it writes from now on. -> its result.

        Host arrays go as they are: the call hands them over at a fraction of what `device_put` takes.
        """
        state = self._state
        if inputs.keys() != self._inputs:
            raise TypeError(f"program {self.key} takes {list(self._inputs)}, but was given {list(inputs)}")
        args = [inputs[name] if name in inputs else getattr(state, name) for name in self._names]
        result, update = self.compiled(*args)
        state.take(update)
        return result

    @cached_property
    def compiled(self) -> jax.stages.Compiled:
        """Read or compiled when it is first needed, unless that has been done ahead."""
        return self._find(self)

    def lower(self) -> jax.stages.Lowered:
        written = Update(**{name: self._state.shardings[name] for name in self._writes})
        donated = tuple(self._names.index(name) for name in self._writes if name in self._names)
        out = (self._state.replicated, written)
        return jax.jit(self._traced, donate_argnums=donated, out_shardings=out).lower(*self._specs)

    def _traced(self, *args: Any) -> tuple[Any, Update]:
        result, update = self._function(*args)
        written = {name for name, value in update._asdict().items() if value is not None}
        assert written == set(self._writes), f"program {self.key} writes {written}"
        return result, update


class Programs(dict[Key, Program]):
    """All programs of an engine. `find` reads a program from where compiled ones are kept, or compiles it,
    with XLA's `compiler_options`.
    """

    program_type: type[Program] = Program

    def __init__(
        self,
        state: DeviceState,
        find: Callable[[Program], jax.stages.Compiled],
        compiler_options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.state = state
        self.find = find
        self.compiler_options = dict(compiler_options)

    def add(
        self,
        name: str,
        function: Function,
        *,
        size: int = 0,
        writes: tuple[str, ...] = (),
        layout: Layout | None = None,
        compiler_options: Mapping[str, Any] = MappingProxyType({}),
        **inputs: Any,
    ) -> Program:
        """A program of that name and size, which no other has; `inputs` are the shapes of what calls give,
        `compiler_options` are beside those of all programs.
        """
        if layout is not None:
            inputs["packed"] = self.state.ints(layout.size)
        key = (name, size)
        assert key not in self, f"there are two programs {key}"
        how: dict[str, Any] = {"writes": writes, "layout": layout, "compiler_options": compiler_options}
        program = self.program_type(key, function, self, inputs=inputs, **how)
        return self.setdefault(key, program)

    def put(self, array: Any) -> Any:
        """See `DeviceState.put`; for arrays that programs are given."""
        return self.state.put(array)

    def use(self, compiled: Mapping[Key, jax.stages.Compiled]) -> None:
        """Take programs that were compiled ahead."""
        for key, ready in compiled.items():
            self[key].compiled = ready


class Ladder(dict[int, Program]):
    """Programs that do the same for different numbers of rows or tokens, by that size, the smallest first."""

    def __init__(self, sizes: Iterable[int], make: Callable[[int], Program]) -> None:
        super().__init__((size, make(size)) for size in sizes)
        self._sizes = tuple(self)

    def fit(self, count: int) -> Program:
        """The smallest that holds `count` rows or tokens. Raises ValueError beyond the last."""
        i = bisect_left(self._sizes, count)
        if i == len(self._sizes):
            raise ValueError(f"{count} is beyond the largest compiled size {self._sizes[-1]}")
        return self[self._sizes[i]]
