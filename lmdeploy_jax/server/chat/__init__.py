"""What every chat protocol shares: the call, its way to the engine, and the deltas of its answers."""
