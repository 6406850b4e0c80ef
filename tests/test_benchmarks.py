"""The benchmarks: what a row counts, that libraries compute the same, and what is reported of a file."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).parent.parent))  # after the installed package, which the folder has too

from benchmarks import __main__ as benchmarks_main
from benchmarks import report
from benchmarks.__main__ import measure
from benchmarks.libraries import LIBRARIES
from benchmarks.suites import SUITES, Suite, dense, packed

SMALL = dense("bfloat16", 2, 24, 3, 64, causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_flops_are_those_of_the_pairs_seen(causal, window):
    row = packed("bfloat16", (13, 40), 3, 16, head_dim_v=24, causal=causal, window=window)
    pairs = 0.0
    for length in row.q_lengths:
        query, key = np.mgrid[:length, :length]
        seen = np.ones((length, length))
        if window is not None:
            seen = (key >= query - window) & ((key <= query) | (not causal))
        elif causal:
            seen /= 2
        pairs += seen.sum()
    assert row.flops == 2 * 3 * (16 + 24) * pairs


def test_bytes_are_those_of_the_inputs():
    row = dense("float16", 2, 70, 6, 32, kv_heads=3, head_dim_v=40, q_lengths=(5, 5))
    assert row.bytes == 2 * 2 * (5 * 6 * 32 + 70 * 3 * (32 + 40))


@pytest.mark.parametrize("name", SUITES)
def test_rows_of_a_suite_have_names_of_their_own(name):
    names = [str(row) for row in SUITES[name].rows]
    assert len(set(names)) == len(names)


def test_a_row_survives_its_file():
    for suite in SUITES.values():
        for row in suite.rows:
            assert report.row_of(json.loads(json.dumps(dataclasses.asdict(row)))) == row


def test_libraries_are_timed_or_say_why_not():
    seconds, refused = measure(SMALL)
    assert seconds.keys() | refused.keys() == LIBRARIES.keys()
    assert {"jax_flash", "jax.nn"} <= seconds.keys()
    assert all(time > 0 for time in seconds.values())


def test_a_suite_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    rows = tuple(dataclasses.replace(SMALL, head_dim=dim) for dim in (16, 32, 48))
    monkeypatch.setitem(SUITES, "cases", Suite(rows=rows))
    asked = []

    def measured(row):
        asked.append(row)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"jax_flash": 1e-3}, {}

    monkeypatch.setattr(benchmarks_main, "measure", measured)
    with pytest.raises(KeyboardInterrupt):
        benchmarks_main.run("cases", tmp_path)
    benchmarks_main.run("cases", tmp_path)
    assert asked == [*rows, rows[2]]
    (path,) = tmp_path.iterdir()
    assert [entry["row"] for entry in json.loads(path.read_text())["rows"]] == [str(row) for row in rows]


def test_table_marks_the_best(tmp_path):
    path = tmp_path / "some-gpu-cases.json"
    entry = {"row": str(SMALL), "problem": dataclasses.asdict(SMALL), "seconds": {"a": 2e-6, "b": 30e-6}, "refused": {}}
    environment = {"device": "GPU", "jax": "1.2.3", "date": "2026-01-01", "commit": "abc"}
    results = {"environment": environment, "ceilings": {"read, B/s": 4e12}, "rows": [entry]}
    path.write_text(json.dumps(results))
    table = report.table(path)
    assert "read 4 TB/s" in table
    assert f"| {SMALL} | **2** | 30 |" in table
    assert report.table(path, "no such row") == ""


def test_table_of_the_host(tmp_path):
    path = tmp_path / "some-gpu-host.json"
    environment = {"device": "GPU", "jax": "1.2.3", "date": "2026-01-01", "commit": "abc"}
    path.write_text(json.dumps({"environment": environment, "seconds": {"first call": 1.73, "a call": 2.71e-6}}))
    table = report.host_table(path)
    assert "On one GPU, jax 1.2.3, 2026-01-01, commit abc (`benchmarks/results/some-gpu-host.json`):" in table
    assert "| first call | 1.7 s |\n| a call | 2.7 µs |" in table
