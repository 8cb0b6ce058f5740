"""`python -m lmdeploy_jax`: the command line."""

from lmdeploy_jax.cli.main import run

run()
