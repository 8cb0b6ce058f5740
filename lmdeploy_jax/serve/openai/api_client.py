"""LMDeploy's client of a running server, under LMDeploy's path."""

from __future__ import annotations

from contextlib import closing

from lmdeploy_jax.client import APIClient

__all__ = ["APIClient", "get_model_list"]


def get_model_list(api_url: str, api_key: str | None = None) -> list[str]:
    """The names of the models behind a URL such as "http://localhost:23333/v1/models".

    Raises `RequestError` and `EngineError` as `APIClient` does.
    """
    with closing(APIClient(api_url.rstrip("/").removesuffix("/models"), api_key)) as client:
        return client.available_models
