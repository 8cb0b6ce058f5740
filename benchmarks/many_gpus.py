"""What machines of four and eight GPUs are for, by value: python -m benchmarks.many_gpus --gpus 8

Each row is a process of its own with a time limit; what it prints is appended to `--out` as soon as it ends:
a machine that is taken away has told what it had done. Weights are made on the devices, without files, but
for FP8, whose rows need `--checkpoint_dir`. `--rows` names those to run, `--list` prints them all.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

WORKLOADS = "b1,b32,b128,mix256"


@dataclass(frozen=True)
class Row:
    """A measurement: `command` after `python -m`, and the seconds that it may take."""

    name: str
    gpus: int
    command: str
    seconds: int


def throughput(name: str, gpus: int, shape: str, more: str = "--random", seconds: int = 240) -> Row:
    """A shape's tokens a second, first tokens and start, with so many devices a copy."""
    command = f"lmdeploy_jax bench throughput {shape} --tp {gpus} --max_batch_size 256 {more}"
    return Row(name, gpus, f"{command} --workloads {WORKLOADS}", seconds)


ROWS = (
    Row("sums 4", 4, "benchmarks.all_reduce --tp 4 --rows 1 8 32 64 128 256", 120),
    throughput("8b tp 4", 4, "llama3-8b"),
    throughput("70b tp 4", 4, "llama3-70b", seconds=360),
    Row("sums 8", 8, "benchmarks.all_reduce --tp 8 --rows 1 8 32 64 128 256", 120),
    throughput("70b tp 8", 8, "llama3-70b", seconds=360),
    throughput("8b tp 8", 8, "llama3-8b"),
    throughput("235b ep 8", 8, "qwen3-235b-a22b-half", "--random --ep 8", 480),
    throughput("8b fp8 tp 4", 4, "llama3-8b", "--model_format fp8"),
    throughput("70b fp8 tp 4", 4, "llama3-70b", "--model_format fp8", 480),
    throughput("70b fp8 tp 8", 8, "llama3-70b", "--model_format fp8", 480),
)


def run(row: Row, folder: str | None) -> str:
    """What it printed, or how far it came, with the seconds that it took."""
    checkpoints = ["--checkpoint_dir", folder] if folder and "bench throughput" in row.command else []
    command = [sys.executable, "-m", *row.command.split(), *checkpoints]
    begun = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        text, ending = process.communicate(timeout=row.seconds)[0], f"exit {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
        text, ending = process.communicate()[0], "ran into its time limit"
    kept = [line for line in text.splitlines() if not line.startswith(("W0", "I0", "E0"))]
    head = f"== {row.name}: {ending} after {time.monotonic() - begun:.0f} s: {' '.join(command[2:])}"
    return "\n".join([head, *kept, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--rows", nargs="+", help="names of rows; all that the GPUs suffice for without it")
    parser.add_argument("--out", type=Path, default=Path("many_gpus.txt"))
    parser.add_argument("--checkpoint_dir")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    for row in ROWS:
        if row.gpus > options.gpus or (options.rows and row.name not in options.rows):
            continue
        if options.list:
            print(f"{row.name}: {row.command} ({row.seconds} s)")
            continue
        text = run(row, options.checkpoint_dir)
        with options.out.open("a") as file:
            file.write(text)
        print(text, flush=True)


if __name__ == "__main__":
    main()
