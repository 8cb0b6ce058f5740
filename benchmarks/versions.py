"""Two versions of this project against each other, on one machine and by turns:

    python -m benchmarks.versions BEFORE AFTER llama3-8b --rounds 5 --workloads b1,b32,b128,mix256

BEFORE and AFTER are checkouts. Each run is a process of its own; the first ones of each compile its programs.
Prints the median and the range of each figure, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

Figures = dict[tuple[str, str], list[float]]
FIGURES = ("out_tok_s", "step_ms", "first_ms")


def run(checkout: Path, args: argparse.Namespace, scratch: str, workloads: str) -> list[dict[str, Any]]:
    """The lines of one process."""
    command = [sys.executable, "-m", "lmdeploy_jax", "bench", "throughput", args.model]
    command += ["--workloads", workloads, "--reps", str(args.reps), "--bandwidth", "4400"]
    command += ["--checkpoint_dir", f"{scratch}/checkpoints", "--tp", str(args.tp)]
    command += ["--compile-cache-dir", programs(scratch, checkout), *args.flag]
    environment = os.environ | {"PYTHONPATH": f"{checkout}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{checkout}: {done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def add(figures: Figures, lines: list[dict[str, Any]]) -> None:
    """Each workload's best repetition; the first is often slower, and none is faster than the machine."""
    by_workload = defaultdict(list)
    for line in lines:
        line["first_ms"] = line["ttft_ms"]["p50"]
        by_workload[line["workload"]].append(line)
        assert not line["compilations_while_serving"], line
    for workload, runs in by_workload.items():
        for name in FIGURES:
            if name in runs[0]:
                best = max if name == "out_tok_s" else min
                figures[workload, name].append(best(line[name] for line in runs))
    figures["start", "s"].append(lines[0]["start_s"])


def measure(
    versions: dict[str, Path], figures: dict[str, Figures], args: argparse.Namespace, scratch: str
) -> None:
    """Cold starts, then rounds; the versions by turns, now one first and now the other."""
    begun, longest = time.monotonic(), 0.0
    for i in range(args.cold):
        for name in list(versions)[:: -1 if i % 2 else 1]:
            start = time.monotonic()
            shutil.rmtree(programs(scratch, versions[name]), ignore_errors=True)
            cold = run(versions[name], args, scratch, "smoke")[0]["start_s"]
            figures[name]["cold start", "s"].append(cold)
            print(f"{name}: cold start {cold} s ({time.monotonic() - start:.0f} s in all)", flush=True)
    for i in range(args.rounds):
        start = time.monotonic()
        if start - begun + longest > args.seconds:
            break
        for name in list(versions)[:: -1 if i % 2 else 1]:
            lines = run(versions[name], args, scratch, args.workloads)
            add(figures[name], lines)
            told = (f"{line['workload']} {line['out_tok_s']} tok/s" for line in lines)
            print(f"{name}: start {lines[0]['start_s']} s, {', '.join(told)}", flush=True)
        longest = max(longest, time.monotonic() - start)
        print(f"round {i + 1}: {longest:.0f} s", flush=True)


def programs(scratch: str, checkout: Path) -> str:
    """Where a version keeps its compiled programs."""
    return f"{scratch}/programs-{checkout.name}"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("model")
    parser.add_argument("--workloads", default="b1,b32,b128,mix256")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reps", type=int, default=2)
    parser.add_argument("--cold", type=int, default=1, help="starts of each without compiled programs")
    parser.add_argument("--scratch", type=Path, help="a folder that keeps checkpoint and programs")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=540.0, help="no round begins that would end later")
    parser.add_argument("--flag", action="append", default=[], help="passed on to both")
    args = parser.parse_args()
    versions = {"before": args.before.resolve(), "after": args.after.resolve()}
    figures: dict[str, Figures] = {name: defaultdict(list) for name in versions}
    if args.scratch:
        args.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        measure(versions, figures, args, str(args.scratch or temporary))
    for key, old in figures["before"].items():
        new = figures["after"][key]
        texts = [f"{statistics.median(x):10.3f} ({min(x):.3f}-{max(x):.3f})" for x in (old, new)]
        ratio = statistics.median(new) / statistics.median(old)
        print(f"{' '.join(key):18} n={len(new)} {texts[0]:>32} {texts[1]:>32}  x {ratio:.4f}", flush=True)


if __name__ == "__main__":
    main()
