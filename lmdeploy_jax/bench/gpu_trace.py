"""What ran on the GPU, from JAX's profiler: kernels with their times, free of launch and host overhead."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

Event = dict[str, Any]


@contextmanager
def traced() -> Iterator[list[Event]]:
    """Fills the list, when the block has ended, with the complete events on the GPU's streams."""
    events: list[Event] = []
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            yield events
        (path,) = Path(folder).rglob("*.trace.json.gz")
        events += on_streams(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"])


def on_streams(events: list[Event]) -> list[Event]:
    """Of a trace's events, those that kernels and copies on a GPU's streams have left, in order of time."""
    names = {
        (e["pid"], e.get("tid"), e["name"]): e["args"].get("name", "") for e in events if e.get("ph") == "M"
    }
    gpus = {pid for (pid, _, kind), name in names.items() if kind == "process_name" and "GPU" in name}
    streams = {
        (pid, tid)
        for (pid, tid, kind), name in names.items()
        if kind == "thread_name" and pid in gpus and name.startswith("Stream")
    }
    found = [e for e in events if e.get("ph") == "X" and (e["pid"], e.get("tid")) in streams]
    return sorted(found, key=lambda e: e["ts"])


def by_program(events: list[Event]) -> dict[str, list[Event]]:
    """Events by the name of the jitted function that launched them."""
    programs: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        module = event.get("args", {}).get("hlo_module", "")
        programs[module.removeprefix("jit_").split("(")[0]].append(event)
    return programs
