"""On-device sampling: pure functions over logits, used inside the engine's compiled head programs."""
