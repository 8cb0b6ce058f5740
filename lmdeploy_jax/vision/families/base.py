"""What a vision family is made of, and what families' readers and key tables share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.converters.layouts import Layout, Rows, Stack
from lmdeploy_jax.vision.config import Activation, TowerConfig, VisionModelConfig
from lmdeploy_jax.vision.pixels import RESAMPLE, Resample
from lmdeploy_jax.vision.placeholders import Placeholder
from lmdeploy_jax.vision.resize import ImagePlan
from lmdeploy_jax.vision.video import VideoRule

LAYER = r"tower.layers.\1."
ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
}
FUSED_QKV = Rows(3)
MOST_LAYERS, MOST_HEADS, MOST_SIDE = 1000, 1024, 4096


ImageRows = Callable[[VisionModelConfig, ImagePlan], np.ndarray]
"""Which rows stand for an image, int32: tokens of its views by number; learned rows are -1, -2 and so on."""


def rows_in_order(config: VisionModelConfig, plan: ImagePlan) -> np.ndarray:
    """The tokens of an image's views one after the other."""
    rows, columns = config.processor.tokens(plan)
    return np.arange(plan.views * rows * columns, dtype=np.int32)


@dataclass(frozen=True)
class VideoFamily:
    """An architecture's videos.

    rule: of `config.json` and the video processor's own file.
    """

    rule: Callable[[Fields, Fields], VideoRule]
    placeholder: Placeholder


@dataclass(frozen=True)
class VisionFamily:
    """One architecture's images.

    config: of `config.json` and the image processor's own file.
    rules: the key table, for the names of a checkpoint's tensors; the language model's are left unread.
    rows: which rows of the projector an image gives, in the order of its placeholder tokens.
    mrope: whether the language model rotates by `mrope.mrope_positions`.
    bidirectional: whether a view's tokens attend to each other both ways in the language model.
    video: None: it takes no videos.
    """

    config: Callable[[Fields, Fields], VisionModelConfig]
    rules: Callable[[VisionModelConfig, Sequence[str]], tuple[Rule, ...]]
    placeholder: Placeholder
    rows: ImageRows = rows_in_order
    mrope: bool = False
    bidirectional: bool = False
    video: VideoFamily | None = None


# --- Reading configs ----------------------------------------------------------------------------------------


def number_of_layers(fields: Fields, name: str = "num_hidden_layers", default: int | None = None) -> int:
    """How many layers the tower has; lists are made of so many entries before a tensor is looked at."""
    return fields.size(name, *() if default is None else (default,), most=MOST_LAYERS)


def number_of_heads(
    fields: Fields, width: int, name: str = "num_attention_heads", default: int = 16, *, unit: int = 1
) -> int:
    """How many heads share the width, each a multiple of `unit`: 4 where they rotate by rows and columns.

    Raises UnsupportedModelError where they cannot.
    """
    heads = fields.size(name, default, most=MOST_HEADS)
    if width % (heads * unit):
        raise fields.unsupported(name, heads, f"a number of heads that share out the width {width}")
    return heads


def side(fields: Fields, name: str, default: int) -> int:
    """A size that a config gives as one number, or as height and width, which must be equal."""
    value = fields.get(name)
    if (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) == 2
        and value[0] == value[1]
    ):
        value = value[0]
    elif isinstance(value, Mapping) and value.get("height") == value.get("width"):
        value = value.get("height")
    return Fields({name: value}, fields.where).size(name, default, most=MOST_SIDE)


def layer_numbers(fields: Fields, name: str, default: list[int], layers: int) -> tuple[int, ...]:
    """A list of some of the tower's layers, in order."""
    numbers = fields.items(name, default)
    if not all(type(number) is int and 0 <= number < layers for number in numbers):
        raise fields.damaged(name, numbers, f"a list of numbers from 0 to {layers - 1}")
    return tuple(sorted(set(numbers)))


def check_blocks(fields: Fields, name: str, block: int, grid: int) -> None:
    """Refuses blocks of patches, of the size that `name` gives, that do not fill a view of `grid` patches."""
    if not 0 < block <= grid or grid % block:
        raise fields.unsupported(name, block, f"blocks that divide a view of {grid} x {grid} patches")


def shuffled_block(fields: Fields, name: str) -> int:
    """The edge of the blocks of patches that become one, of the field that gives 1 divided by it."""
    ratio = fields.positive(name, 0.5)
    if not 1 / MOST_SIDE <= ratio <= 1 or 1 / ratio != int(1 / ratio):
        raise fields.unsupported(name, ratio, "1 divided by a whole number")
    return int(1 / ratio)


def layers_run(fields: Fields, name: str, layers: int, default: int) -> int:
    """How many layers give the features: `name` counts hidden states from the embeddings or from the end."""
    index = fields.get(name, default)
    if isinstance(index, bool) or not isinstance(index, int) or not -layers <= index <= layers or index == 0:
        raise fields.unsupported(name, index, f"the number of one of the tower's {layers} layers")
    return index if index > 0 else layers + 1 + index


Triple = tuple[float, ...]


def normalisation(fields: Fields, mean: Triple, std: Triple) -> tuple[Triple, Triple]:
    """Mean and deviation of each channel, of an image processor's file."""
    if not fields.flag("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    factor = fields.number("rescale_factor", 1 / 255)
    if not fields.flag("do_rescale", True) or abs(factor * 255 - 1) > 1e-6:
        raise fields.unsupported("rescale_factor", factor, "1 / 255")
    mean, std = _triple(fields, "image_mean", mean), _triple(fields, "image_std", std)
    if not min(std) > 0:
        raise fields.damaged("image_std", list(std), "three numbers above 0")
    return mean, std


def _triple(fields: Fields, name: str, default: Triple) -> Triple:
    values = fields.items(name, list(default))
    if len(values) != 3 or not all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in values):
        raise fields.damaged(name, values, "three numbers from 0 to 1")
    return tuple(float(value) for value in values)


def resample(fields: Fields, default: Resample) -> Resample:
    """The filter of an image processor's file."""
    number = fields.get("resample")
    if number is None:
        return default
    if not isinstance(number, int) or number not in RESAMPLE:
        raise fields.unsupported("resample", number, f"one of {', '.join(map(str, RESAMPLE))}")
    return RESAMPLE[number]


# --- Key tables ---------------------------------------------------------------------------------------------


def tower_rules(
    tower: TowerConfig,
    prefix: str,
    names: Mapping[str, str],
    *,
    qkv: str,
    out: str,
    fused: bool,
    layout: Layout | None = None,
) -> tuple[Rule, ...]:
    """The layers' rules. `prefix` stands before a layer's number; `names` are parts copied as they are.

    qkv: the tensors of q, k and v, with one group for the letter; or of one tensor, where they are `fused`.
    layout: of q, k and v together, where it is not that of plain rows.
    """
    layer = prefix + f"({_any(range(tower.layers))})" + r"\."
    parts, target = (r"(weight|bias)", LAYER + r"attention.qkv.\2")
    if not fused:
        target = LAYER + r"attention.qkv.\3"
    layout = layout or (FUSED_QKV if fused else Stack(("q", "k", "v"), rows=2))
    return (
        Rule(rf"{layer}{qkv}\.{parts}", target, "" if fused else r"\2", layout),
        Rule(rf"{layer}{out}\.weight", LAYER + "attention.out.weight", "", Rows(1, flat_columns=True)),
        Rule(rf"{layer}{out}\.bias", LAYER + "attention.out.bias"),
        *(Rule(rf"{layer}{name}\.{parts}", LAYER + rf"{part}.\2") for name, part in names.items()),
        Rule(prefix + rf"(?!({_any(range(tower.layers))})\.)\d+\..*", None),
    )


def gated_rule(prefix: str, target: str, part: str) -> Rule:
    """gate and up in one weight. `prefix` ends before the projections' names."""
    return Rule(rf"{prefix}(gate|up)_proj\.(weight|bias)", target, part, Stack(("gate", "up")))


def plain(names: Mapping[str, str]) -> tuple[Rule, ...]:
    """Weights and biases copied as they are."""
    return tuple(Rule(rf"{name}\.(weight|bias)", rf"{target}.\1") for name, target in names.items())


def language_model(*patterns: str) -> tuple[Rule, ...]:
    """Tensors that are none of the vision model's."""
    return tuple(Rule(pattern, None) for pattern in patterns)


def _any(numbers: range) -> str:
    return "|".join(map(str, numbers))
