"""LMDeploy's path to its client: `serve.openai.api_client`. The server itself is `lmdeploy_jax.server`."""
