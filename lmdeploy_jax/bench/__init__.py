"""Benchmarks: fixed work, random checkpoints of well-known shapes, and the report."""
