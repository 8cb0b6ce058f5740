"""What is read out of a profiler's trace."""

from benchmarks.step_profile import busy
from lmdeploy_jax.bench.gpu_trace import by_program, on_streams

NAMES = [
    {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/device:GPU:0"}},
    {"ph": "M", "pid": 2, "name": "process_name", "args": {"name": "/host:CPU"}},
    {"ph": "M", "pid": 1, "tid": 7, "name": "thread_name", "args": {"name": "Stream #7(Compute)"}},
    {"ph": "M", "pid": 1, "tid": 8, "name": "thread_name", "args": {"name": "XLA Ops"}},
    {"ph": "M", "pid": 2, "tid": 7, "name": "thread_name", "args": {"name": "Stream of consciousness"}},
    {},
]


def event(start: float, length: float, pid: int = 1, tid: int = 7, module: str = "jit_step(3)") -> dict:
    args = {"hlo_module": module}
    return {"ph": "X", "pid": pid, "tid": tid, "ts": start, "dur": length, "name": "kernel", "args": args}


def test_only_what_ran_on_the_gpu_counts_and_overlaps_count_once():
    ours = [event(10, 5), event(0, 4), event(12, 8)]
    events = on_streams([*NAMES, *ours, event(0, 99, pid=2), event(0, 99, tid=8)])
    assert [e["ts"] for e in events] == [0, 10, 12]
    assert busy(events) == (14e-6, 20e-6)


def test_events_are_sorted_by_the_function_that_launched_them():
    programs = by_program([event(0, 1), event(1, 1, module="jit_timed_case_4"), event(2, 1)])
    assert {name: len(events) for name, events in programs.items()} == {"step": 2, "timed_case_4": 1}
