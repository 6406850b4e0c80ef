"""python -m benchmarks SUITE: every installed library on the same inputs, interleaved in one process.

Writes benchmarks/results/<device>-<suite>.json. A comparison counts within one file alone: absolute numbers move by
several percent between runs and machines.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import time

# Peers in PyTorch share the GPU with JAX.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from benchmarks.libraries import LIBRARIES, on_gpu
from benchmarks.suites import SUITES, Row

ROUNDS = 3
PAUSE = 0.1
"""Seconds between bursts: without them power throttling, not the kernel, decides."""


def measure(row: Row) -> dict[str, float]:
    """The median time in seconds of each library that runs a row, over all rounds."""
    timers = {name: timer for name, library in LIBRARIES.items() if (timer := library(row)) is not None}
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            time.sleep(PAUSE)
            times[name] += timer()
    return {name: statistics.median(values) for name, values in times.items()}


def device_name() -> str:
    """The device measured."""
    return jax.devices()[0].device_kind if on_gpu() else f"{platform.machine()} CPU, {os.cpu_count()} cores"


def environment() -> dict[str, str]:
    """What the numbers depend on."""
    # Given where the sources are a copy without their history.
    commit = os.environ.get("JAX_FLASH_COMMIT")
    if commit is None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    packages = ("jax", "jaxlib", "nvidia-cuda-nvrtc", "nvidia-cudnn-cu13", "dew-flash-attn-cu13", "fa3-fwd")
    installed = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {
        "device": device_name(),
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        **{name: installed[name] for name in packages if name in installed},
    }


def main() -> None:
    """Runs a suite, prints its table, writes its file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    suite = parser.parse_args().suite
    folder = pathlib.Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    device = "cpu" if not on_gpu() else device_name().lower().replace(" ", "-")
    path = folder / f"{device}-{suite}.json"
    results = {"environment": environment(), "rows": []}
    for number, row in enumerate(SUITES[suite], 1):
        seconds = measure(row)
        tflops = {name: row.flops / t / 1e12 for name, t in seconds.items()}
        results["rows"].append({"row": str(row), "tflops": tflops, "seconds": seconds})
        path.write_text(json.dumps(results, indent=1) + "\n")
        cells = "  ".join(f"{name} {value:8.3g} TFLOP/s" for name, value in tflops.items())
        print(f"[{number}/{len(SUITES[suite])}] {row!s:36} {cells}", flush=True)
    print(path)


if __name__ == "__main__":
    main()
