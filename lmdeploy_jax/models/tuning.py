"""Which products of few rows a hand-written kernel does faster than XLA, as measured (`bench tune`)."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import lmdeploy_jax
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.pallas_kernels.skinny_gemm import MAX_TOKENS, StreamTiling, Tiling

FOLDER = Path(lmdeploy_jax.__file__).parent / "configs" / "kernels"
OPS = {
    "prefill_attention": ("mosaic", "pallas", "xla"),
    "rounding": ("pallas", "xla"),
    "activation": ("pallas", "xla"),
    "experts": ("mosaic", "pallas", "xla"),
    "all_reduce": ("pallas", "xla"),
    "encoder": ("mosaic", "pallas", "xla"),
    "encoder_sums": ("mosaic", "xla"),
    "routing": ("pallas", "xla"),
    "latent_queries": ("pallas", "xla"),
}
"""Those whose faster backend is told, and the backends that it may be."""

Kind = Literal["parts", "gated", "whole", "norm_parts", "norm_gated"]


@dataclass(frozen=True)
class Measurement:
    """A product of `tokens` rows with a weight of `out` by `inner` elements, and the fastest way to do it.

    out, inner: on one device, which has a share of a weight that is cut over several.
    kind: `parts`, which the next kernel sums, `gated` (`out` by `inner` twice) or `whole`. tiling None: XLA's
    product. Times are microseconds; xla_us is that of XLA's product. `norm_parts` and `norm_gated` are
    products of one row with the residual addition and the norm before it; tiling None: those are kernels of
    their own, whose time xla_us is.
    format: bits of weights and activations: `w16a16`; what shares scales would follow, as in `w4a16_g128`.
    """

    format: str
    kind: Kind
    out: int
    inner: int
    tokens: int
    tiling: Tiling | StreamTiling | None
    us: float
    xla_us: float

    @property
    def shape(self) -> tuple[str, str, int, int]:
        """What it has in common with measurements of other numbers of rows."""
        return self.format, self.kind, self.out, self.inner


@dataclass(frozen=True)
class Tuning:
    """What was measured on one GPU. Products that are not here are XLA's.

    prefill_attention: the faster backend of that op where it can do the model; None: not measured.
    activation: that of gating what is rounded next, "pallas" where one kernel for both is faster.
    experts: that of mixtures of many tokens, "mosaic" where fused ones are faster; None: not measured.
    all_reduce: that of small sums over devices, "pallas" where GPUs that store for each other are faster.
    rounding: that of activations that XLA's products of 8 bits read; those of kernels round in kernels.
    encoder: that of vision towers, "mosaic" where Hopper's own kernels are faster; None: not measured.
    routing: that of few tokens' routers, "pallas" where one kernel for the norm before, the product and the
    choice is faster than three; None: not measured.
    latent_queries: that of what leads a decode step's queries into the space of latents, "pallas" where one
    kernel is faster than XLA's three; None: not measured.
    encoder_sums: that of a tower's norms and residual sums, "mosaic" where products that have them within are
        faster than passes of their own (`TowerConfig.fused`); None: not measured.
    """

    products: tuple[Measurement, ...] = ()
    prefill_attention: str | None = None
    rounding: str | None = None
    activation: str | None = None
    experts: str | None = None
    all_reduce: str | None = None
    encoder: str | None = None
    routing: str | None = None
    latent_queries: str | None = None
    encoder_sums: str | None = None

    def find(
        self, format: str, kind: Kind, weight: tuple[int, int], tokens: int, *, streams: bool = True
    ) -> Tiling | StreamTiling | None:
        """The tiling that was fastest for that many rows, or the next higher number measured; None: XLA.

        `weight` is (out, inner). streams: whether so many rows can be streamed; where they cannot and that
        was fastest, it is the one of the next lower number which has one for any rows.
        """
        known = sorted(
            (p for p in self.products if p.shape == (format, kind, *weight)), key=lambda p: p.tokens
        )
        chosen = next((p.tiling for p in known if p.tokens >= tokens), None)
        if streams or not isinstance(chosen, StreamTiling):
            return chosen
        lower = [p.tiling for p in known if p.tokens < tokens <= MAX_TOKENS and isinstance(p.tiling, Tiling)]
        return lower[-1] if lower else None

    def without(self, format: str, kind: Kind) -> Tuning:
        """As if no such product had been measured."""
        kept = tuple(p for p in self.products if (p.format, p.kind) != (format, kind))
        return replace(self, products=kept)

    def merged(self, newer: Tuning) -> Tuning:
        """With `newer` products in place of those of the same shape."""
        replaced = {p.shape for p in newer.products}
        others = tuple(p for p in self.products if p.shape not in replaced)
        ops = {name: getattr(newer, name) or getattr(self, name) for name in OPS}
        return Tuning(others + newer.products, **ops)


UNTUNED = Tuning()


def file_name(device_kind: str) -> str:
    """The table's file for `jax.Device.device_kind`: "NVIDIA H200" -> "nvidia-h200.json"."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-") + ".json"


def load(device_kind: str, *folders: Path) -> Tuning:
    """The tables of a device kind: the one that ships, and those in `folders`, of which later ones win.

    Raises ConfigError for a file that cannot be read.
    """
    tuning = Tuning()
    for folder in (FOLDER, *folders):
        path = folder / file_name(device_kind)
        if path.exists():
            tuning = tuning.merged(read(path))
    return tuning


def read(path: Path) -> Tuning:
    """One table. Raises ConfigError."""
    try:
        table = json.loads(path.read_text())
        products = [_measurement(row) for row in table["products"]]
        return Tuning(tuple(products), **_ops(table))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"the tuning table {path} cannot be read ({error!r}); delete it, or make it anew "
            "with `lmdeploy_jax bench tune`"
        ) from error


def _ops(table: dict[str, Any]) -> dict[str, str | None]:
    """Raises ValueError for an op that there is none of, and for a backend that it has not."""
    told = {name: backend for name, backend in table.items() if name != "products" and backend is not None}
    for name, backend in told.items():
        if name not in OPS:
            raise ValueError(f"{name!r} is no op; known are {', '.join(OPS)}")
        if backend not in OPS[name]:
            raise ValueError(f"{name}={backend!r} is not one of {', '.join(OPS[name])}")
    return {name: told.get(name) for name in OPS}


def _measurement(row: dict[str, Any]) -> Measurement:
    """Tables of before formats were told apart are of 16 bits."""
    return Measurement(**{"format": "w16a16"} | row | {"tiling": _tiling(row["tiling"])})


def _tiling(fields: dict[str, Any] | None) -> Tiling | StreamTiling | None:
    if fields is None:
        return None
    return StreamTiling(**fields) if "programs" in fields else Tiling(**fields)


def write(path: Path, tuning: Tuning) -> None:
    """One product a line, of whose tiling what is as usual is left out."""
    rows = [json.dumps(_row(product)) for product in sorted(tuning.products, key=_order)]
    path.parent.mkdir(parents=True, exist_ok=True)
    ops = {name: getattr(tuning, name) for name in OPS}
    head = json.dumps({name: op for name, op in ops.items() if op or name == "prefill_attention"})
    path.write_text(head[:-1] + ', "products": [\n' + ",\n".join(rows) + "\n]}\n")


def _row(product: Measurement) -> dict[str, Any]:
    tiling = product.tiling
    if tiling is None:
        return asdict(product)
    usual = {field.name: field.default for field in fields(tiling)}
    kept = {name: value for name, value in asdict(tiling).items() if value != usual[name]}
    return asdict(product) | {"tiling": kept}


def _order(product: Measurement) -> tuple[str, str, int, int, int]:
    return *product.shape, product.tokens
