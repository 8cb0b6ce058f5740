"""How a quantised weight is held on the devices. Works without JAX, as the reading of checkpoints does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

INT4, INT8 = "int4", "int8"
E4M3, E5M2, E2M1 = "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"
E8M0 = "float8_e8m0fnu"
SCALES = ("float16", "bfloat16", "float32", "float64", E8M0, E4M3)
FOUR_BITS = (INT4, E2M1)
TILE = 128  # columns whose 4-bit elements share words
PER_WORD = 4  # 4-bit elements in a uint16


@dataclass(frozen=True)
class WeightFormat:
    """A weight [N, K] as arrays: `(element - zero) * scale * row scale`.

    values: [*out, K] of `element`; of 4-bit elements uint16 [*out, K / 4], `tile` columns sharing words.
    scales: [G, *out], one a row and `group` of columns; of e8m0 the exponent's byte.
    zeros: integers [G, *out]; without them int4's are 8, the others' 0.
    row_scales: f32 [*out].
    columns: i32 [K]: which column of the weight each column of `values` is, where those of a group lay apart
        (act-order); then no device may have a share of them.
    activations: what the weight's author meant activations to be rounded to, INT8 or E4M3; None: nothing.
    input_scale: f32 [1], what activations are divided by before they are rounded; without it each row's own.
    """

    element: str
    group: int
    groups: int
    scale: str
    tile: int = TILE
    zeros: str | None = None
    row_scales: bool = False
    columns: bool = False
    activations: str | None = None
    input_scale: bool = False

    @property
    def name(self) -> str:
        """As `models.tuning` tells formats apart: `w4a16_g128`, `w8a8_int8`, `w8a8_float8_e4m3fn_g128`."""
        bits = 4 if self.element in FOUR_BITS else 8
        kind = "" if self.element == INT4 else f"_{self.element}"
        group = "" if self.groups == 1 else f"_g{self.group}"
        return f"w{bits}a{8 if self.activations else 16}{kind}{group}"

    @property
    def is_sound(self) -> bool:
        """Whether every field, perhaps read from a file, has a value that means something."""
        sizes = (self.group, self.groups, self.tile)
        return (
            all(type(size) is int and size > 0 for size in sizes)
            and self.element in (INT4, INT8, E4M3, E5M2, E2M1)
            and self.scale in SCALES
            and self.zeros in (None, "uint8", "int16")
            and self.activations in (None, INT8, E4M3, E5M2)
            and isinstance(self.row_scales, bool)
            and isinstance(self.columns, bool)
            and isinstance(self.input_scale, bool)
        )

    @property
    def rounds_activations(self) -> bool:
        """Whether XLA's product is one of 8-bit activations and 8-bit weights, scaled afterwards."""
        return self.activations is not None and self.groups == 1 and self.zeros is None

    def cut(self, columns: int, devices: int) -> WeightFormat:
        """The same where `columns` are dealt out over devices, which then share neither words nor groups."""
        share = columns // devices
        group = self.group if self.groups == 1 or devices == 1 else gcd(self.group, share)
        return replace(self, group=group, groups=-(-columns // group), tile=tile_of(share))

    @property
    def stored(self) -> str:
        """The dtype of `values`."""
        return "uint16" if self.element in FOUR_BITS else self.element

    @property
    def per_value(self) -> int:
        """Columns in an element of `values`."""
        return PER_WORD if self.element in FOUR_BITS else 1


def tile_of(columns: int) -> int:
    """The tile of a weight, or of a device's part of it, of so many columns."""
    return gcd(TILE, columns)
