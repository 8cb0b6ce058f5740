"""Many streams at once, some of which are given up; `benchmarks/load_soak.py` does this for a minute."""

from tests.server.streaming_clients import clients, expected, leftovers

STREAMS, SECONDS = 16, 4.0


def test_streams_beside_clients_that_hang_up(live, pipe):
    texts = expected(pipe)
    tally = clients(int(live.url.rsplit(":", 1)[1]), STREAMS, SECONDS, texts)
    assert not tally.errors
    assert tally.answered  # how many depends on who else computes on the machine
    assert tally.hung_up
    assert leftovers(live, pipe.frontend.engine) == 0
    pipe.frontend.engine.scheduler.check_integrity()
