"""Kernels over a paged KV cache: pure functions over arrays, each in plain XLA and in Pallas.

A cache is one K and one V array a layer, `[pages, kv_heads, PAGE_SIZE, head_dim]`. Page 0 is the dump page:
rows that only pad a batch write there and never read it. Every op takes `backend=`, a name that
the engine picks by `registry.why_not`.
"""

from __future__ import annotations
