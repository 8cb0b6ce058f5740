"""See `lmdeploy_jax.serve`."""
