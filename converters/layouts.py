"""How a weight of the model is put together from the tensors of a checkpoint.

Weights keep HuggingFace's [out, in] order, so every fused weight is a list of row runs: its leading axes,
flattened, are rows, and each row is a row of one source. Being only a list of runs, it is read by slice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """`count` rows of the source that plays `part`, from row `start`, each `step` rows behind the one before;
    `part` None: rows of zeros.
    """

    part: str | None
    start: int
    count: int
    step: int = 1

    def cut(self, skipped: int, count: int) -> Run:
        """`count` of its rows, behind the first `skipped`."""
        return Run(self.part, self.start + skipped * self.step, count, self.step)

    @property
    def stop(self) -> int:
        """The row behind the last."""
        return self.start + (self.count - 1) * self.step + 1


@dataclass(frozen=True)
class Assembly:
    """A weight's rows, in order. `row_axes` of its leading axes are rows; `sources` are the parts' shapes."""

    row_axes: int
    runs: tuple[Run, ...]
    sources: dict[str, Shape]


class Layout(Protocol):
    """A way to assemble a weight, whatever its size. Raises ValueError for a shape it cannot make."""

    def assemble(self, shape: Shape) -> Assembly:
        """The assembly of a weight of `shape`."""


@dataclass(frozen=True)
class Rows:
    """One source. The first `row_axes` axes are its rows, those after them its columns, perhaps flattened.

    Rows() is a plain copy; Rows(3) makes [KH, G + 2, D, E] of [KH * (G + 2) * D, E] (InternLM2's wqkv);
    Rows(1, flat_columns=True) makes [E, KH, G, D] of [E, H * D]; Rows(valid=n) pads n rows with zero rows.
    """

    row_axes: int = 1
    flat_columns: bool = False
    valid: int | None = None

    def assemble(self, shape: Shape) -> Assembly:
        rows = math.prod(shape[: self.row_axes])
        valid = rows if self.valid is None else self.valid
        if valid > rows:
            raise ValueError(f"{valid} rows of the checkpoint do not fit the {rows} rows of {shape}")
        columns = shape[self.row_axes :]
        source = (valid, math.prod(columns)) if self.flat_columns else (valid, *columns)
        return Assembly(self.row_axes, _merge([Run("", 0, valid), Run(None, 0, rows - valid)]), {"": source})


@dataclass(frozen=True)
class Scalars:
    """Sources without axes, one element of the weight each, in row-major order."""

    parts: tuple[str, ...] = ("",)

    def assemble(self, shape: Shape) -> Assembly:
        if math.prod(shape) != len(self.parts):
            raise ValueError(f"{len(self.parts)} numbers do not make {shape}")
        return Assembly(
            len(shape), tuple(Run(part, 0, 1) for part in self.parts), dict.fromkeys(self.parts, ())
        )


@dataclass(frozen=True)
class Stack:
    """Equal sources stacked along new leading axes: Stack(("gate", "up")) makes [2, I, E] of two [I, E].

    `axes` leading axes are new and count the parts in row-major order: experts are Stack(("0.gate", "0.up",
    "1.gate", ...), axes=2) for [X, 2, I, E]. The next `rows` axes are one in a part: Stack(("q", "k", "v"),
    rows=2) makes [3, H, D, E] of three [H * D, E].
    """

    parts: tuple[str, ...]
    axes: int = 1
    rows: int = 1

    def assemble(self, shape: Shape) -> Assembly:
        inner = self.axes + self.rows
        source = (math.prod(shape[self.axes : inner]), *shape[inner:])
        if math.prod(shape[: self.axes]) != len(self.parts) or len(shape) < inner:
            raise ValueError(f"{len(self.parts)} sources cannot be stacked to {shape} along {self.axes} axes")
        runs = [Run(part, 0, source[0]) for part in self.parts]
        return Assembly(inner, _merge(runs), dict.fromkeys(self.parts, source))


@dataclass(frozen=True)
class GroupedQKV:
    """q, k and v as [KH, G + 2, D, ...]: by KV head, its G query heads, then its k head, then its v head.

    `packing` says how the checkpoint holds them: "split", three sources q, k and v; "rows", one source with
    rows q|k|v (Phi-3); "grouped", one source in this order already (InternLM2). Each KV head of a checkpoint
    becomes `replicas` KV heads that share out its query heads, for a tp above the number of its KV heads.
    `interleaved`: how many leading elements of a head of q and k rotate in pairs of neighbours, which become
    pairs of halves (see `models.rope`): first those of even numbers, then the odd ones.
    `values`: whether there is a v; without, [KH, G + 1, D, ...] of two sources.
    """

    replicas: int = 1
    packing: str = "split"
    interleaved: int = 0
    values: bool = True

    def assemble(self, shape: Shape) -> Assembly:
        kv_heads, width, head_dim, *rest = shape
        if kv_heads % self.replicas:
            raise ValueError(f"{kv_heads} KV heads are no multiple of {self.replicas} replicas")
        queries = width - (2 if self.values else 1)
        heads = _Heads(kv_heads // self.replicas, queries * self.replicas, self.packing)
        runs = []
        for head in range(kv_heads):
            group, replica = divmod(head, self.replicas)
            first = group * heads.per_group + replica * queries
            part, start = heads.query(first)
            (k_part, k_row), (v_part, v_row) = heads.key_value(group)
            for row in range(start, start + queries):
                runs += self._turned(part, row, head_dim)
            runs += self._turned(k_part, k_row, head_dim)
            if self.values:
                runs.append(Run(v_part, v_row * head_dim, head_dim))
        counts = heads.counts()
        counts = counts if self.values else {part: counts[part] for part in ("q", "k")}
        sources = {part: (count * head_dim, *rest) for part, count in counts.items()}
        return Assembly(3, _merge(runs), sources)

    def _turned(self, part: str, head: int, head_dim: int) -> list[Run]:
        """The rows of a head that rotates."""
        return halves(part, head * head_dim, self.interleaved, head_dim)


@dataclass(frozen=True)
class Piece:
    """Of each head, `rows` rows of the source that plays `part`; there, all heads' begin at row `first`, and
    `replicas` neighbours have the same.
    """

    part: str
    rows: int
    first: int = 0
    replicas: int = 1


@dataclass(frozen=True)
class HeadPieces:
    """Sources in which each piece lies for all heads, as [H, rows of all pieces, ...], head by head."""

    pieces: tuple[Piece, ...]

    def assemble(self, shape: Shape) -> Assembly:
        heads, width, *rest = shape
        if sum(piece.rows for piece in self.pieces) != width:
            raise ValueError(f"{self.pieces} do not make the {width} rows of a head of {shape}")
        runs = [
            Run(piece.part, piece.first + head // piece.replicas * piece.rows, piece.rows)
            for head in range(heads)
            for piece in self.pieces
        ]
        counts: dict[str, int] = {}
        for piece in self.pieces:
            counts[piece.part] = counts.get(piece.part, 0) + heads // piece.replicas * piece.rows
        return Assembly(2, _merge(runs), {part: (count, *rest) for part, count in counts.items()})


def halves(part: str, first: int, rotating: int, size: int) -> list[Run]:
    """The rows of a head that begins at row `first`, its `rotating` ones in halves instead of in pairs."""
    half = rotating // 2
    return [
        *(Run(part, first + odd, half, 2) for odd in (0, 1)),
        Run(part, first + rotating, size - rotating),
    ]


@dataclass(frozen=True)
class RepeatedHeads:
    """One source of heads [KH * D], or if not `flat` [KH, D], as [KH * replicas, D]: each of them `replicas`
    times in a row.
    """

    replicas: int = 1
    flat: bool = True

    def assemble(self, shape: Shape) -> Assembly:
        heads, size = shape
        if not self.flat:
            rows = [Run("", head // self.replicas, 1) for head in range(heads)]
            return Assembly(1, _merge(rows), {"": (heads // self.replicas, size)})
        runs = [Run("", head // self.replicas * size, size) for head in range(heads)]
        return Assembly(2, _merge(runs), {"": (heads // self.replicas * size,)})


@dataclass(frozen=True)
class TurnedTails:
    """One source whose rows, the leading `row_axes` axes, are heads of `fixed` elements and `rotating` ones.

    These rotate in pairs of neighbours there, and in halves here, as `GroupedQKV.interleaved` tells.
    """

    fixed: int
    rotating: int
    row_axes: int

    def assemble(self, shape: Shape) -> Assembly:
        size, rows = self.fixed + self.rotating, math.prod(shape[: self.row_axes])
        runs: list[Run] = []
        for first in range(0, rows, size):
            runs.append(Run("", first, self.fixed))
            runs += halves("", first + self.fixed, self.rotating, self.rotating)
        return Assembly(self.row_axes, _merge(runs), {"": (rows, *shape[self.row_axes :])})


@dataclass(frozen=True)
class PermutedHeads:
    """Rows q|k|v of one source as [3, H, D, ...], the elements of each head of q and k in another order:
    `order` names the source's element for each, so that another kind of rotation becomes the model's own.
    `split`: q, k and v are sources of their own.
    """

    order: tuple[int, ...]
    split: bool = False

    def assemble(self, shape: Shape) -> Assembly:
        parts, heads, size, *rest = shape
        if parts != 3 or sorted(self.order) != list(range(size)):
            raise ValueError(f"an order of {len(self.order)} elements does not fit q, k and v of {shape}")
        rows = heads * size
        q, k, v = [("q", 0), ("k", 0), ("v", 0)] if self.split else [("", i * rows) for i in range(3)]
        runs = [
            Run(source, start + first + element, 1)
            for source, start in (q, k)
            for first in range(0, rows, size)
            for element in self.order
        ]
        runs.append(Run(*v, rows))
        held = {"q": rows, "k": rows, "v": rows} if self.split else {"": 3 * rows}
        return Assembly(3, _merge(runs), {source: (count, *rest) for source, count in held.items()})


@dataclass(frozen=True)
class _Heads:
    """Which source, and which head of it, holds a head of the checkpoint."""

    groups: int
    per_group: int
    packing: str

    def query(self, head: int) -> tuple[str, int]:
        if self.packing == "grouped":
            group, position = divmod(head, self.per_group)
            return "", group * (self.per_group + 2) + position
        return ("q" if self.packing == "split" else ""), head

    def key_value(self, group: int) -> list[tuple[str, int]]:
        if self.packing == "split":
            return [("k", group), ("v", group)]
        if self.packing == "grouped":
            key = group * (self.per_group + 2) + self.per_group
            return [("", key), ("", key + 1)]
        key = self.groups * self.per_group + group
        return [("", key), ("", key + self.groups)]

    def counts(self) -> dict[str, int]:
        queries = self.groups * self.per_group
        if self.packing == "split":
            return {"q": queries, "k": self.groups, "v": self.groups}
        return {"": queries + 2 * self.groups}


def _merge(runs: list[Run]) -> tuple[Run, ...]:
    """Drops empty runs and joins neighbours, so that reads are as long as they can be."""
    merged: list[Run] = []
    for run in runs:
        last = merged[-1] if merged else None
        joins = last is not None and last.part is not None and (run.part, run.start) == (last.part, last.stop)
        if last is not None and joins and last.step == run.step == 1:
            merged[-1] = Run(last.part, last.start, last.count + run.count)
        elif run.count:
            merged.append(run)
    return tuple(merged)
