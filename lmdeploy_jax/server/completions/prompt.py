"""Text completions as prompts and a generation config."""

from __future__ import annotations

from lmdeploy_jax.engine.io.sampling_defaults import SamplingDefaults
from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.server.bodies import length
from lmdeploy_jax.server.completions.bodies import CompletionRequest
from lmdeploy_jax.server.errors import ApiError

MAX_PROMPTS = 1024


def check(body: CompletionRequest) -> None:
    """Raises `ApiError` for what cannot be honoured."""
    if body.suffix:
        message = "suffix is not supported: the models here continue a text, they do not fill in."
        raise ApiError(400, message, param="suffix", code="unsupported_field")
    if body.best_of is not None and body.best_of != body.n:
        message = "best_of is not supported: ask for n answers and their logprobs."
        raise ApiError(400, message, param="best_of", code="unsupported_field")
    if body.length == 0 and not body.echo:
        raise ApiError(400, "max_tokens: 0 needs echo: true, else there is no answer.", param="max_tokens")


def generation_config(body: CompletionRequest, defaults: SamplingDefaults) -> GenerationConfig:
    """Raises `ConfigError`."""
    given = body.sampling() | {
        "n": body.n,
        "max_new_tokens": 1 if body.length == 0 else length(body.length),
        "logprobs": body.logprobs,
        "prompt_logprobs": body.logprobs if body.echo else None,
        "response_format": body.form(),
    }
    return defaults.config(given)


def prompts_of(body: CompletionRequest) -> list[str | list[int]]:
    """Texts, and prompts in tokens. Raises `ApiError` for none, and for too many."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ApiError(400, "prompt: give at least one text or one token.", param="prompt")
    if isinstance(prompt[0], int):
        return [prompt]  # type: ignore[list-item]
    if len(prompt) > MAX_PROMPTS:
        message = f"prompt: {len(prompt)} prompts are too many for one request; at most {MAX_PROMPTS}."
        raise ApiError(400, message, param="prompt")
    return list(prompt)  # type: ignore[arg-type]
