"""Models that judge texts: a decoder of another architecture under a head of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.converters.published import HEAD
from lmdeploy_jax.models.config import DecoderConfig
from lmdeploy_jax.models.score_config import Activation, ScoreConfig

ONE_LAYER: Mapping[str, str] = {"score": "out"}
TWO_LAYERS: Mapping[str, str] = {r"score\.0": "inner", r"score\.2": "out"}
VALUE: Mapping[str, str] = {"v_head": "out"}
STEP = "<extra_0>"
PROBLEMS: Mapping[str, Activation] = {"regression": "none", "multi_label_classification": "sigmoid"}


def scored_config(
    fields: Fields, *, base: Callable[[Fields], DecoderConfig], read: Callable[[Fields], ScoreConfig]
) -> DecoderConfig:
    """The decoder of `base` under the head that `read` finds."""
    config, score = base(fields), read(fields)
    if score.words:
        return replace(config, score=score)
    return replace(config, score=score, tie_embeddings=True, head_bias=False)


def scored_rules(
    config: DecoderConfig,
    tp: int,
    *,
    base: Callable[[DecoderConfig, int], tuple[Rule, ...]],
    names: Mapping[str, str],
) -> tuple[Rule, ...]:
    """names: the checkpoint's layers of the head -> those of `ScoreHead`. An output head is left unread."""
    rules = base(config, tp)
    if not config.judges_only:
        return rules
    head = (Rule(rf"{ours}\.(weight|bias)", rf"score.{theirs}.\1") for ours, theirs in names.items())
    return (*(replace(r, target=None) if r.target == HEAD else r for r in rules), *head)


def read_classes(fields: Fields) -> ScoreConfig:
    """`...ForSequenceClassification` of HF. With `classifier_from_token`, as vLLM has it, the classes are
    words that the language model goes on with.
    """
    words = fields.items("classifier_from_token", [])
    prompt = fields.flag("is_original_qwen3_reranker", False)
    if words:
        if len(words) < 2 or not all(isinstance(word, str) and word for word in words):
            raise fields.damaged("classifier_from_token", words, "a list of two words or more")
        return ScoreConfig(tuple(words), activation="softmax", words=True, qwen3_prompt=prompt)
    named = fields.table("id2label")
    count = fields.size("num_labels", len(named) or 2)
    labels = tuple(str(named.get(str(i), f"LABEL_{i}")) for i in range(count))
    usual: Activation = "sigmoid" if count == 1 else "softmax"
    problem = fields.get("problem_type")
    return ScoreConfig(labels, activation=PROBLEMS.get(problem, usual) if isinstance(problem, str) else usual)


def read_value(fields: Fields) -> ScoreConfig:
    """InternLM2-Reward's own code."""
    fields.get("reward_token_id")  # who asks for a reward ends the conversation with it
    return ScoreConfig(("reward",), "reward")


def read_two_layers(fields: Fields) -> ScoreConfig:
    """Qwen2.5-Math-RM's own code."""
    return ScoreConfig(("reward",), "reward", width=fields.size("hidden_size"), bias=True)


def read_steps(fields: Fields) -> ScoreConfig:
    """Qwen2.5-Math-PRM's own code."""
    width = fields.size("hidden_size")
    return ScoreConfig(("wrong", "right"), "steps", "softmax", width=width, bias=True, step=STEP)
