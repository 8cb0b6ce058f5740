"""Run by test_engines.py with two virtual CPU devices: random requests and aborts at tp 2."""

from __future__ import annotations

import sys
import tempfile

from tests.engine.test_soak import opened, storm
from tests.oracle import save_checkpoint

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        engine = opened(save_checkpoint("llama", f"{scratch}/llama"), f"{scratch}/programs", tp=2)
        storm(engine, int(sys.argv[1]))
        engine.close()
