"""What every test relies on, wherever the run is started."""

import importlib.util
import signal

# A command that a script starts with `&` ignores Ctrl-C, and so would every process that tests start and end
# that way: a handler of one's own is not inherited.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A machine that runs the tests of its GPU alone may lack the checker; `test_shapes.py` fails without it.
if importlib.util.find_spec("beartype"):
    from tests import shapes

    shapes.install()
