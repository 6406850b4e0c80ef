"""python -m benchmarks SUITE: every installed library on the same inputs, interleaved in one process.

Writes benchmarks/results/<device>-<suite>.json. A comparison counts within one row alone, which one process measures:
absolute numbers move by several percent between runs and machines. A suite that was cut off goes on with the rows that
its file lacks.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

# Peers in PyTorch share the GPU with JAX.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np

from benchmarks import accuracy, host, report, tune
from benchmarks.libraries import LIBRARIES, ceilings, input_sets, medians, on_gpu, prepare, reason
from benchmarks.suites import SUITES, Row
from jax_flash import heuristics

ROUNDS = 3

MOST_DIFFERENCE = {"float8_e4m3fn": 0.1}
"""How far a library's result may lie from that of jax_flash, relative to its size; else it solved another problem."""


def measure(row: Row) -> tuple[dict[str, float], dict[str, str]]:
    """The median time in seconds of each library that runs a row, over all rounds, and why the others do not."""
    timers, refused = {}, {}
    ours = None
    input_sets(row)
    with ThreadPoolExecutor(len(LIBRARIES)) as pool:  # each compiles for itself
        prepared = {name: pool.submit(prepare, name, row) for name in LIBRARIES}
    for name, future in prepared.items():
        try:
            compute, timer = future.result()
            result = np.asarray(compute(), np.float32)
        except Exception as error:  # whatever a peer raises is an answer
            refused[name] = reason(error)
            continue
        ours = result if ours is None else ours
        difference = np.linalg.norm(result - ours) / np.linalg.norm(ours)
        if difference < MOST_DIFFERENCE.get(row.dtype, 0.02):
            timers[name] = timer
        else:
            refused[name] = f"its result differs by {difference:.2g}"
    return medians(timers, ROUNDS), refused


def device_name() -> str:
    """The device measured."""
    return jax.devices()[0].device_kind if on_gpu() else f"{platform.machine()} CPU, {os.cpu_count()} cores"


def environment() -> dict[str, str]:
    """What the numbers depend on."""
    # Given where the sources are a copy without their history.
    commit = os.environ.get("JAX_FLASH_COMMIT")
    if commit is None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    peers = ("dew-flash-attn-cu13", "fa3-fwd", "flash-attn3-jax", "torch")
    packages = ("jax", "jaxlib", "nvidia-cuda-nvrtc", "nvidia-cudnn-cu13", *peers)
    # A name may be spelled with underscores.
    installed = {dist.metadata["Name"].replace("_", "-"): dist.version for dist in importlib.metadata.distributions()}
    return {
        "device": device_name(),
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        **{name: installed[name] for name in packages if name in installed},
    }


def progress(done: int, total: int, row: Row | accuracy.Row | None) -> None:
    """A bar on the terminal."""
    if sys.stderr.isatty():
        filled = 40 * done // total
        end = f" {row}" if row else "\n"
        print(f"\r[{'#' * filled}{'.' * (40 - filled)}] {done}/{total}{end:40}", end="", file=sys.stderr, flush=True)


def begun(path: pathlib.Path) -> dict:
    """What a file has of a suite measured in this environment; else the beginning of one."""
    here = environment()
    if path.exists() and (results := json.loads(path.read_text()))["environment"] == here:
        return results
    return {"environment": here, "ceilings": ceilings() if on_gpu() else {}, "rows": []}


def file_of(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Where the results of a suite, of accuracy, or of the host, are kept."""
    folder.mkdir(exist_ok=True)
    device = "cpu" if not on_gpu() else device_name().lower().replace(" ", "-")
    return folder / f"{device}-{name}.json"


def run_host(folder: pathlib.Path = report.RESULTS) -> None:
    """Measures the host, writes its file and prints its table."""
    path = file_of("host", folder)
    path.write_text(json.dumps({"environment": environment(), "seconds": host.measured()}, indent=1) + "\n")
    print(report.host_table(path))


def complete(path: pathlib.Path, rows: Sequence[Row | accuracy.Row], entry_of: Callable[..., dict]) -> None:
    """Adds the entries of the rows that a file lacks, and writes it after every one."""
    results = begun(path)
    measured = {entry["row"] for entry in results["rows"]}
    for number, row in enumerate(rows):
        if str(row) in measured:
            continue
        progress(number, len(rows), row)
        results["rows"].append({"row": str(row), **entry_of(row)})
        path.write_text(json.dumps(results, indent=1) + "\n")
    progress(len(rows), len(rows), None)


def run(name: str, folder: pathlib.Path = report.RESULTS) -> None:
    """Measures a suite and prints its table."""

    def entry_of(row):
        seconds, refused = measure(row)
        return {"problem": dataclasses.asdict(row), "seconds": seconds, "refused": refused}

    path = file_of(name, folder)
    complete(path, SUITES[name].rows, entry_of)
    print(report.table(path))


def run_accuracy(folder: pathlib.Path = report.RESULTS) -> None:
    """Measures accuracy and prints its table."""
    path = file_of("accuracy", folder)
    complete(path, accuracy.ROWS, accuracy.measure)
    print(report.accuracy_table(path))


def main() -> None:
    """Runs a suite, measures accuracy or the host, or searches kernels."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", choices=[*SUITES, "accuracy", "host", "tune"])
    parser.add_argument("head_dims", nargs="*", type=int, default=heuristics.HEAD_DIMS, help="for tune alone")
    arguments = parser.parse_args()
    if arguments.suite != "cpu" and not on_gpu():
        raise SystemExit(f"{arguments.suite} needs a GPU; without one there is the suite cpu")
    if arguments.suite == "tune":
        tune.main(arguments.head_dims)
    elif arguments.suite == "accuracy":
        run_accuracy()
    elif arguments.suite == "host":
        run_host()
    else:
        run(arguments.suite)


if __name__ == "__main__":
    main()
