"""Quantising checkpoints: a plain one in, one in a public format out, a layer at a time."""
