"""4-bit integers in the registers that tensor cores read as their left operand, in Mosaic GPU."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, BFloat16, Shaped, UInt16

from lmdeploy_jax.pallas_kernels.quant_gemm.words import PER_WORD

OFFSET = 128  # bfloat16's last bit is 1 from here on: a nibble becomes the end of such a number
LAYOUT = plgpu.Layout.WGMMA


def unpacked(
    words: UInt16[Array, "outputs words"], zeros: Shaped[Array, "outputs"] | None
) -> BFloat16[Array, "outputs columns"]:
    """Each integer less its zero, a byte or OFFSET more than it in bfloat16; 8 where there are none."""
    numbers = _unpack(words.shape[0], words.shape[1] * PER_WORD)(words)
    if zeros is None:
        return numbers - jnp.bfloat16(OFFSET + 8)
    zero = zeros.astype(jnp.bfloat16)
    zero = zero + jnp.bfloat16(OFFSET) if zeros.dtype == jnp.uint8 else zero
    return numbers - lax.broadcast_in_dim(zero, numbers.shape, [0])


def _unpack(rows: int, columns: int) -> Any:
    """uint16 words -> bfloat16, each OFFSET + a nibble.

    A register has two words side by side, and the same nibble of both is the pair of columns that the tensor
    cores want in a register of the tile 4 q further on: a shift and a mask, nothing moves between threads.
    """

    @plgpu.inline_mgpu(
        arg_types=(LAYOUT,),
        return_type=plgpu.ShapeDtypeStruct((rows, columns), jnp.bfloat16, layout=LAYOUT),
    )
    def unpack(_: Any, words: Any) -> Any:
        word = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        shape = fragmented_array.WGMMA_LAYOUT.registers_shape((rows, columns))
        registers = np.empty(shape, dtype=object)
        for (row, column, *rest), register in np.ndenumerate(words.registers):
            bits = mgpu.utils.bitcast(register, word)
            for nibble in range(PER_WORD):
                found: Any = llvm.inline_asm(word, [bits], _nibble(nibble), "=r,r")
                registers[(row, column + PER_WORD * nibble, *rest)] = mgpu.utils.bitcast(found, pair)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=fragmented_array.WGMMA_LAYOUT, _is_signed=None
        )

    return unpack


def _nibble(number: int) -> str:
    shift = f"shr.u32 t, $1, {4 * number};" if number else "mov.b32 t, $1;"
    return f"{{ .reg .b32 t; {shift} lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xea; }}"
