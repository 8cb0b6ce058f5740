"""How a paged cache holds keys and values in fewer than 16 bits, told without JAX.

A token's key, or value, of one head has a scale of its own, and integers a zero point too. Its elements are
codes; `per_word` of them share a uint16 word: code number p of word j is that of element
`p * words + j`. So a kernel reads 16-bit elements, which it can turn while it loads them, and each code of
the words is a block of columns, for a product of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

LEAST_COLUMNS = 16  # of the kernels' products
WORD_DTYPE, WORD_BITS = "uint16", 16
SCALE_BYTES = 4


@dataclass(frozen=True)
class KVFormat:
    """A number of `bits`: an integer, or a float with so many bits of `mantissa`."""

    name: str
    bits: int
    mantissa: int | None = None

    @property
    def is_float(self) -> bool:
        return self.mantissa is not None

    @property
    def per_word(self) -> int:
        return WORD_BITS // self.bits

    @property
    def levels(self) -> int:
        """The highest code of an integer."""
        return (1 << self.bits) - 1

    @property
    def centre(self) -> int:
        """What is taken from an integer's zero point, so that float16 tells more of its fraction."""
        return 1 << self.bits - 1

    @property
    def largest(self) -> float:
        """The largest float that a code stands for. E4M3 is read as float16, whose exponents begin 2**8
        lower: 448 becomes 1.75.
        """
        return 1.75 if self.mantissa == 3 else 57344.0

    @property
    def gain(self) -> float:
        """What a kernel multiplies V's scales by, so that weights times scales stay within float16."""
        return self.largest if self.is_float else float(self.levels)

    @property
    def scale_dtype(self) -> str:
        """Of a token's and head's scale: four bytes, the least that Triton copies ahead of time. Those of
        integers are two float16: the scale, and the zero point in the upper half.
        """
        return "float32" if self.is_float else "uint32"

    def words(self, head_dim: int) -> int:
        """Words of a head."""
        return head_dim // self.per_word

    def head_bytes(self, head_dim: int) -> int:
        """Bytes of a token's key or value of one head, with its scale."""
        return self.words(head_dim) * WORD_BITS // 8 + SCALE_BYTES

    def why_not_heads(self, head_dim: int) -> str | None:
        """Why the hand-written kernels cannot read such a cache, or None if they can."""
        least = LEAST_COLUMNS * self.per_word
        if head_dim & head_dim - 1 or head_dim < least:
            return f"head_dim {head_dim} of a cache in {self.name} is no power of two from {least} on"
        return None


INT4, INT8 = KVFormat("int4", 4), KVFormat("int8", 8)
E4M3, E5M2 = KVFormat("fp8_e4m3", 8, 3), KVFormat("fp8_e5m2", 8, 2)
KV_FORMATS: Mapping[int, KVFormat] = MappingProxyType({4: INT4, 8: INT8, 16: E4M3, 17: E5M2})
"""By LMDeploy's `quant_policy`."""
