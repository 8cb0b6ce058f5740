"""Flax NNX modules: one decoder, whose features are data (`DecoderConfig`)."""
