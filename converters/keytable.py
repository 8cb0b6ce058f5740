"""Key tables: which tensor of a checkpoint goes into which weight of the model.

A family lists rules; `bind` applies them to a checkpoint and to the model's weights. Either every tensor and
every weight is accounted for, or one error lists everything that is not.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import ml_dtypes
import numpy as np

from lmdeploy_jax.converters.layouts import Assembly, Layout, Rows, Run, Shape
from lmdeploy_jax.converters.reader import TensorReader
from lmdeploy_jax.converters.slicing import Index, Ranges, aligned_empty, as_ranges, runs, sizes
from lmdeploy_jax.errors import CheckpointError

MAX_PROBLEMS = 20
QUANTISED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv")  # ends of tensors' names
UNTOLD = (
    "\nThese are of a quantised checkpoint: without a quantization_config that tells how, give model_format"
)
PLAIN = Rows()
PREFIX = "model."  # stands before a decoder's names where it was saved with its head, and nowhere where not
FLOATS = frozenset(map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)))


@dataclass(frozen=True)
class Rule:
    r"""Tensors whose whole name matches `pattern` go to the weight `target`, playing `part` in its `layout`.

    `target` and `part` may use the pattern's groups, which do not nest:
    Rule(r"layers\.(\d+)\.attn\.([qkv])\.weight", r"layers.\1.attention.qkv.weight", r"\2", GroupedQKV()).
    A `target` of None: such tensors are left unread.
    """

    pattern: str
    target: str | None
    part: str = ""
    layout: Layout = PLAIN

    @cached_property
    def regex(self) -> re.Pattern[str]:
        return re.compile(self.pattern)


@dataclass(frozen=True)
class Leaf:
    """One weight of the model, readable by slice from the checkpoint that it was bound to."""

    reader: TensorReader
    shape: Shape
    assembly: Assembly
    names: Mapping[str, str]  # part -> tensor name
    ends: tuple[int, ...] = field(init=False)  # row after each run

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", tuple(accumulate(run.count for run in self.assembly.runs)))

    def read(self, index: Index, dtype: np.dtype) -> np.ndarray:
        """The slice `index` of the weight, converted to `dtype`; reads the bytes of that slice only."""
        ranges = as_ranges(index, self.shape)
        self.check_dtypes(np.dtype(dtype))
        out = aligned_empty(sizes(ranges), np.dtype(dtype))
        if not out.size:
            return out
        axes = self.assembly.row_axes
        flat, done = out.reshape(-1, *out.shape[axes:]), 0
        for run in self.cut(ranges[:axes]):
            self._read_run(run, ranges[axes:], flat[done : done + run.count])
            done += run.count
        return out

    def cut(self, rows: Ranges) -> Iterator[Run]:
        """The parts of the runs that lie in `rows`, ranges of the axes of the rows, in order."""
        for span in runs(rows, self.shape[: self.assembly.row_axes]):
            row = span.start
            while row < span.stop:
                position = bisect_right(self.ends, row)
                run = self.assembly.runs[position]
                skipped = row - (self.ends[position] - run.count)
                count = min(run.count - skipped, span.stop - row)
                yield run.cut(skipped, count)
                row += count

    def _read_run(self, run: Run, columns: tuple[range, ...], out: np.ndarray) -> None:
        if run.part is None:
            out[...] = 0
            return
        if run.step > 1 and run.count > 1:
            between = np.empty((run.stop - run.start, *out.shape[1:]), out.dtype)
            self._read_run(Run(run.part, run.start, len(between)), columns, between)
            out[...] = between[:: run.step]
            return
        name, rows = self.names[run.part], slice(run.start, run.start + len(out))
        if not self.assembly.sources[run.part]:
            out[...] = self.reader.read(name)
            return
        column_shape = self.shape[self.assembly.row_axes :]
        if self.assembly.sources[run.part][1:] == column_shape:
            self.reader.read_into(name, (rows, *(slice(c.start, c.stop) for c in columns)), out)
            return
        flat, done = out.reshape(len(out), -1), 0
        for span in runs(columns, column_shape):
            into = flat[:, done : done + len(span)]
            self.reader.read_into(name, (rows, slice(span.start, span.stop)), into)
            done += len(span)

    def check_dtypes(self, dtype: np.dtype) -> None:
        """Raises CheckpointError where a tensor cannot be read as `dtype`: only floats are converted."""
        for name in self.names.values():
            stored = self.reader.info(name).dtype
            if stored != dtype and not {stored, dtype} <= FLOATS:
                file = self.reader.info(name).file
                raise CheckpointError(
                    f"{file}: tensor {name}: stored as {stored}, which cannot be read as {dtype}; "
                    "give a checkpoint in 16 or 32 bits"
                )


def bind(
    rules: Sequence[Rule],
    reader: TensorReader,
    shapes: Mapping[str, Shape],
    names: Iterable[str] | None = None,
) -> dict[str, Leaf]:
    """A Leaf for every weight of `shapes` (name -> shape), of the tensors `names` (default: all).

    Raises one CheckpointError that lists all tensors without a rule or with two, tensors and weights without
    a counterpart, and tensors of a wrong shape.
    """
    problems: list[str] = []
    found = _match(rules, reader.names() if names is None else names, shapes, problems)
    leaves = {}
    for target, shape in shapes.items():
        leaf = _bind_leaf(rules, reader, target, shape, found.get(target, {}), problems)
        if leaf is not None:
            leaves[target] = leaf
    if problems:
        shown = "\n  ".join(problems[:MAX_PROBLEMS])
        more = len(problems) - MAX_PROBLEMS
        rest = f"\n  and {more} more" if more > 0 else ""
        rest += UNTOLD if any(problem.endswith(QUANTISED) for problem in problems) else ""
        raise CheckpointError(f"{reader.folder}: the tensors do not fit config.json:\n  {shown}{rest}")
    return leaves


Sources = dict[str, tuple[str, Layout]]  # part -> tensor name, layout


def _match(
    rules: Sequence[Rule], names: Iterable[str], shapes: Mapping[str, Shape], problems: list[str]
) -> dict[str, Sources]:
    found: dict[str, Sources] = {}
    for name in names:
        hits = _hits(rules, name)
        if len(hits) != 1:
            patterns = " and ".join(rule.pattern for _, rule in hits)
            problems.append(f"ambiguous tensor {name}: {patterns}" if hits else f"unknown tensor {name}")
            continue
        match, rule = hits[0]
        if rule.target is None:
            continue
        target, part = match.expand(rule.target), match.expand(rule.part)
        if target not in shapes:
            problems.append(f"extra tensor {name}: this config has no weight {target}")
        elif part in (sources := found.setdefault(target, {})):
            problems.append(f"ambiguous tensor {name}: {sources[part][0]} fills the same place")
        else:
            sources[part] = (name, rule.layout)
    return found


def find_tensor(rules: Sequence[Rule], names: Iterable[str], target: str) -> str | None:
    """The first tensor that `rules` put into the weight `target`; None where there is none."""
    mine = [rule for rule in rules if rule.target == target]
    return next((name for name in names if _hits(mine, name)), None)


def has_place(rules: Sequence[Rule], name: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether `rules` put the tensor `name` into one of the weights of `shapes`, or leave it unread."""
    hits = _hits(rules, name)
    return any(rule.target is None or match.expand(rule.target) in shapes for match, rule in hits)


def _hits(rules: Sequence[Rule], name: str) -> list[tuple[re.Match[str], Rule]]:
    """The rules for a tensor. As in transformers, a name that has none is tried with and without `model.`."""
    for spelling in (name, PREFIX + name, name.removeprefix(PREFIX)):
        hits = [(match, rule) for rule in rules if (match := rule.regex.fullmatch(spelling))]
        if hits:
            return hits
    return []


def _bind_leaf(
    rules: Sequence[Rule],
    reader: TensorReader,
    target: str,
    shape: Shape,
    sources: Sources,
    problems: list[str],
) -> Leaf | None:
    """The leaf, or None and the reasons in `problems`."""
    layouts = {layout for _, layout in sources.values()} or set(_layouts_of(rules, target)[:1])
    if len(layouts) != 1:
        names = ", ".join(name for name, _ in sources.values())
        problems.append(
            f"weight {target}: {names} are of different layouts" if names else f"no rule for {target}"
        )
        return None
    assembly = layouts.pop().assemble(shape)
    before = len(problems)
    for part, expected in assembly.sources.items():
        if part not in sources:
            problems.append(f"missing tensor {_expected_name(rules, target, part)}")
        elif (stored := reader.info(sources[part][0]).shape) != expected:
            problems.append(
                f"tensor {sources[part][0]}: shape {list(stored)}, config.json asks for {list(expected)}"
            )
    surplus = [name for part, (name, _) in sources.items() if part not in assembly.sources]
    problems.extend(f"extra tensor {name}: {target} has no place for it" for name in surplus)
    parts = {part: name for part, (name, _) in sources.items()}
    return Leaf(reader, tuple(shape), assembly, parts) if len(problems) == before else None


# --- Rules read backwards, to name a tensor that is not there -----------------------------------------------


def _layouts_of(rules: Sequence[Rule], target: str) -> list[Layout]:
    return [rule.layout for rule in rules if _groups_of(rule, rule.target, target) is not None]


def _expected_name(rules: Sequence[Rule], target: str, part: str) -> str:
    """The name that would have filled `part` of `target`."""
    for rule in rules:
        groups = _groups_of(rule, f"{rule.target}\n{rule.part}", f"{target}\n{part}")
        if groups is not None and rule.target is not None:
            pieces = re.split(r"\(([^()]*)\)", rule.pattern)
            for number, value in groups.items():
                pieces[2 * number - 1] = value
            return "".join(pieces).replace("\\.", ".")
    return f"for {target} {part}".rstrip()


def _groups_of(rule: Rule, template: str | None, text: str) -> dict[int, str] | None:
    """The values of the pattern's groups for which `template` expands to `text`."""
    if rule.target is None or template is None:
        return None
    groups = re.findall(r"\(([^()]*)\)", rule.pattern)
    regex, seen = "", set()
    for position, piece in enumerate(re.split(r"\\(\d)", template)):
        if position % 2 == 0:
            regex += re.escape(piece)
        else:
            regex += f"(?P=g{piece})" if piece in seen else f"(?P<g{piece}>{groups[int(piece) - 1]})"
            seen.add(piece)
    match = re.fullmatch(regex, text)
    return {int(name[1:]): value for name, value in match.groupdict().items()} if match else None
