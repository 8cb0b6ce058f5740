"""What every test relies on, wherever the run is started."""

import importlib.metadata
import importlib.util
import os
import signal

# What tests compile runs a few times, so it counts how fast it is compiled: up to four times as fast so,
# in the processes that tests start too. Tests of programs for GPUs judge what the compiler makes of them.
FAST_TO_COMPILE = "--xla_backend_optimization_level=0"
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 12):
    FAST_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"  # XLA ends a process over a flag it lacks
if not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))):
    os.environ.setdefault("XLA_FLAGS", FAST_TO_COMPILE)

# A command that a script starts with `&` ignores Ctrl-C, and so would every process that tests start and end
# that way: a handler of one's own is not inherited.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A machine that runs the tests of its GPU alone may lack the checker; `test_shapes.py` fails without it.
if importlib.util.find_spec("beartype"):
    from tests import shapes

    shapes.install()
