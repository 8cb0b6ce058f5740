"""What every test relies on, wherever the run is started."""

import signal

# A command that a script starts with `&` ignores Ctrl-C, and so would every process that tests start and end
# that way: a handler of one's own is not inherited.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
