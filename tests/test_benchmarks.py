"""The benchmarks: what a row counts, that libraries compute the same, and what is reported of a file."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

sys.path.append(str(pathlib.Path(__file__).parent.parent))  # after the installed package, which the folder has too

from benchmarks import __main__ as benchmarks_main
from benchmarks import accuracy, libraries, report
from benchmarks.__main__ import measure
from benchmarks.libraries import LIBRARIES
from benchmarks.suites import RAGGED, SUITES, Suite, decode, dense, packed

SMALL = dense("bfloat16", 2, 24, 3, 64, causal=True)
SMALL_FP8 = dataclasses.replace(SMALL, dtype="float8_e4m3fn")
SMALL_CACHE = decode("bfloat16", 3, 40, 4, 2)
RAGGED_CACHE = dataclasses.replace(SMALL_CACHE, kv_lengths=(9, 40, 23))
CACHES = [
    SMALL_CACHE,
    RAGGED_CACHE,
    dataclasses.replace(SMALL_CACHE, q_lengths=(4,) * 3, causal=True),
    *(dataclasses.replace(RAGGED_CACHE, page_size=size) for size in (1, 16)),
    dataclasses.replace(SMALL_CACHE, kv_dtype="float8_e4m3fn"),
    dataclasses.replace(SMALL_CACHE, dtype="float8_e4m3fn"),
]
ENVIRONMENT = {"device": "GPU", "jax": "1.2.3", "date": "2026-01-01", "commit": "abc"}


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
    row = dataclasses.replace(row, kv_dtype="float8_e4m3fn")
    assert row.bytes == 2 * (2 * 5 * 6 * 32 + 70 * 3 * (32 + 40))


def test_bytes_of_a_cache_are_those_that_count():
    for row in (RAGGED_CACHE, dataclasses.replace(RAGGED_CACHE, page_size=16)):
        assert row.bytes == 2 * (3 * 4 * 128 + (9 + 40 + 23) * 2 * 2 * 128)


def test_decode_over_uneven_lengths_reads_as_much_as_over_even_ones():
    uneven, even = SUITES["decode"].rows[-3:-1]
    assert (uneven.kv_lengths, min(RAGGED), max(RAGGED), len(even.kv_lengths)) == (RAGGED, 100, 32768, 64)
    assert abs(uneven.bytes / even.bytes - 1) < 1e-3


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


def test_v_quantised_in_the_jit_gives_the_same():
    before, in_the_jit = (
        libraries.prepare(name, SMALL_FP8)[0]() for name in ("jax_flash", "jax_flash, V quantised in the jit")
    )
    np.testing.assert_array_equal(np.asarray(before, np.float32), np.asarray(in_the_jit, np.float32))


def test_fp8_keys_are_compared_with_those_of_the_dtype_of_q():
    row = dataclasses.replace(SMALL, kv_dtype="float8_e4m3fn")
    assert [x.dtype.name for x in libraries.input_sets(row)[0]] == ["bfloat16", "float8_e4m3fn", "float8_e4m3fn"]
    ours, of_one_dtype = (
        libraries.prepare(name, row)[0]() for name in ("jax_flash", "jax_flash, k and v in the dtype of q")
    )
    np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(of_one_dtype, np.float32))
    with pytest.raises(libraries.Refusal, match="one dtype"):
        libraries.ours_of_one_dtype(SMALL)


@pytest.mark.parametrize("row", CACHES, ids=str)
def test_caches_hold_what_the_oracle_reads(row):
    q, k, v, lengths, *table = libraries.input_sets(row)[0]
    assert lengths.tolist() == list(row.kv_lengths)
    assert k.shape == v.shape == ((3, 40, 2, 128) if not table else (k.shape[0], row.page_size, 2, 128))
    arguments = {"q": q, "k_cache": k, "v_cache": v, "cache_seqlens": lengths, "causal": row.causal}
    if table:
        assert sorted(table[0].flatten().tolist()) == list(range(k.shape[0]))
        assert table[0].shape == (3, -(-40 // row.page_size))
        arguments["page_table"] = table[0]
    arguments = {name: x if name == "causal" else np.asarray(x) for name, x in arguments.items()}
    truth, _ = oracle.attention(oracle.over_cache(arguments)[0])
    out = np.asarray(libraries.prepare("jax_flash", row)[0](), np.float32)
    most = benchmarks_main.MOST_DIFFERENCE.get(row.dtype, 0.02)
    assert np.linalg.norm(out - truth) < most * np.linalg.norm(truth)


@pytest.mark.parametrize("row", CACHES, ids=str)
def test_caches_are_timed_by_those_that_take_them(row):
    seconds, refused = measure(row)
    assert seconds.keys() | refused.keys() == LIBRARIES.keys()
    assert "jax_flash" in seconds
    features = row.causal or row.kv_dtype or row.page_size or row.dtype == "float8_e4m3fn"
    assert ("XLA" in seconds) == (not features)
    if row.causal:
        assert "first key" in refused["XLA"]


def test_the_fastest_function_is_timed_once_it_is_asked_for(monkeypatch):
    bursts = []

    def timed(seconds, sets):
        def timer():
            bursts.append(seconds)
            return [seconds]

        return (lambda: f"took {seconds}"), timer

    monkeypatch.setattr(libraries, "jax_timer", timed)
    result, timer = libraries.fastest_timer([3.0, 1.0, 2.0], [])
    assert bursts == []
    assert (result(), timer(), timer()) == ("took 1.0", [1.0], [1.0])
    assert bursts == [3.0, 1.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "row",
    [SMALL, packed("float8_e4m3fn", (3, 4), 3, 64), dataclasses.replace(SMALL_FP8, kv_heads=1), CACHES[-1]],
    ids=str,
)
def test_only_plain_rows_of_fp8_have_v_quantised_in_the_jit(row):
    with pytest.raises(libraries.Refusal, match="FP8"):
        libraries.ours_quantising(row)


def test_time_of_quantising_is_taken_off(monkeypatch):
    timers = iter([lambda: [5.0, 7.0], lambda: [1.0, 2.0, 9.0]])
    monkeypatch.setattr(libraries, "jax_timer", lambda function, sets: (None, next(timers)))
    _, timer = libraries.quantising_timer(None, [(jnp.ones(1),) * 3])
    assert timer() == [3.0, 5.0]


def test_a_scaled_result_is_divided_afterwards():
    result, _ = libraries.cudnn_fp8_timer(lambda x: x, [(jnp.asarray([32, 1], jnp.float8_e4m3fn),)])
    np.testing.assert_array_equal(result(), [2, 1 / 16])


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
    results = {"environment": ENVIRONMENT, "ceilings": {"read, B/s": 4e12}, "rows": [entry]}
    path.write_text(json.dumps(results))
    table = report.table(path)
    assert "read 4 TB/s" in table
    assert f"| {SMALL} | **2** | 30 |" in table
    assert report.table(path, "no such row") == ""


def test_table_of_the_host(tmp_path):
    path = tmp_path / "some-gpu-host.json"
    path.write_text(json.dumps({"environment": ENVIRONMENT, "seconds": {"first call": 1.73, "a call": 2.71e-6}}))
    table = report.host_table(path)
    assert "On one GPU, jax 1.2.3, 2026-01-01, commit abc (`benchmarks/results/some-gpu-host.json`):" in table
    assert "| first call | 1.7 s |\n| a call | 2.7 µs |" in table


# Accuracy.


def of_length(length):
    """A row of each kind of inputs."""
    return [accuracy.Row(inputs=name, length=length) for name in accuracy.INPUTS]


def test_rows_of_accuracy_have_names_of_their_own():
    assert len({str(row) for row in accuracy.ROWS}) == len(accuracy.ROWS) == 10


@pytest.mark.parametrize("row", of_length(512), ids=str)
def test_inputs_are_what_their_name_says(row):
    arrays = accuracy.arrays_of(row)
    assert [(x.shape, x.dtype) for x in arrays] == [((1, 512, 2, 128), jnp.float32)] * 3
    q, k, v = (np.asarray(x, np.float64) for x in arrays)
    deviations = [(q**2).mean((0, 1, 2)) ** 0.5, (k**2).mean((0, 1, 2)) ** 0.5]
    if row.inputs == "outlier channels":
        assert [(x > 10 * np.median(x)).sum() for x in deviations] == [4, 4]
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / 128**0.5
        assert 3 < scores.std() < 4
    else:
        assert all((x > 10 * np.median(x)).sum() == 0 for x in deviations)
    share = [(np.abs(x) > 6).mean() for x in (q, k, v)]  # half of those that are ten times as large
    if row.inputs == "outliers":
        assert all(4e-4 < x < 7e-4 for x in share)
    assert abs(v.mean() - (row.inputs == "V of mean 1")) < 0.02


@pytest.mark.parametrize("store", [accuracy.by_head, accuracy.by_tensor, accuracy.in_bfloat16])
def test_stored_inputs_are_read_as_they_were(store):
    arrays = accuracy.arrays_of(of_length(64)[0])
    stored, descales = store(*arrays)
    for x, read in zip(arrays, accuracy.dequantised(stored, descales), strict=True):
        assert read.dtype == np.float64
        x = np.asarray(x[0], np.float64)
        assert 0 < np.linalg.norm(read - x) < 0.03 * np.linalg.norm(x)


def test_rotation_keeps_the_scores():
    arrays = accuracy.arrays_of(of_length(64)[0])
    (q, k, v), (rotated_q, rotated_k, rotated_v) = (
        accuracy.dequantised(*store(*arrays)) for store in (accuracy.by_head, accuracy.rotated)
    )
    scores, rotated = (np.einsum("qhd,khd->hqk", *pair) for pair in ((q, k), (rotated_q, rotated_k)))
    assert np.linalg.norm(rotated - scores) < 0.1 * np.linalg.norm(scores)
    assert np.linalg.norm(rotated_q - q) > np.linalg.norm(q)
    np.testing.assert_array_equal(rotated_v, v)


def test_exact_is_attention():
    q, k, v = np.random.default_rng(0).standard_normal((3, 20, 2, 128))
    out, lse = accuracy.exact(q[3:9], k, v)
    truth, truth_lse = oracle.attention({"q": q[None, 3:9], "k": k[None], "v": v[None]})
    np.testing.assert_allclose(out, truth[0], rtol=0, atol=1e-13)
    np.testing.assert_allclose(lse, truth_lse[0], rtol=0, atol=1e-13)


def test_accuracy_is_measured_reported_and_plotted(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    rows = of_length(256)
    monkeypatch.setattr(accuracy, "ROWS", rows)
    benchmarks_main.run_accuracy(tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-accuracy.json")
    entries = json.loads(path.read_text())["rows"]
    assert [(entry["row"], entry["inputs"], entry["length"]) for entry in entries] == [
        (str(row), row.inputs, 256) for row in rows
    ]
    for entry in entries:
        columns = [*accuracy.INPUTS[entry["inputs"]].columns, *(f"log-sum-exp of {x}" for x in accuracy.RETURNS_LSE)]
        measured = [*entry["errors"], *(f"log-sum-exp of {x}" for x in entry["lse"])]
        assert sorted([*measured, *entry["refused"]]) == sorted(columns)
        assert entry["lse"]["jax_flash"] < (0.01 if libraries.on_gpu() else 1e-4)
        if entry["inputs"] == "outlier channels":
            assert entry["errors"]["jax_flash, Hadamard"] < entry["errors"]["jax_flash"] / 2
        else:
            assert entry["errors"]["jax_flash"] < 0.05
    assert "| V of mean 1 S256 | 0.0" in capsys.readouterr().out
    assert report.accuracy_plot(path).exists()


def test_table_of_accuracy(tmp_path):
    path = tmp_path / "some-gpu-accuracy.json"
    rows = [
        {"row": "a S64", "errors": {"x": 0.01234, "y": 2e-4}, "lse": {"x": 1e-3}},
        {"row": "b S64", "errors": {"x": 0.3, "z": 0.1}, "lse": {"x": 2e-3, "y": 0.5}},
    ]
    path.write_text(json.dumps({"environment": ENVIRONMENT, "ceilings": {}, "rows": rows}))
    table = report.accuracy_table(path)
    assert "on one GPU, jax 1.2.3, 2026-01-01, commit abc (`benchmarks/results/some-gpu-accuracy.json`)" in table
    assert "| | x | y | z | log-sum-exp of x | log-sum-exp of y |" in table
    assert "| a S64 | 0.012 | 0.0002 | - | 0.001 | - |\n| b S64 | 0.3 | - | 0.1 | 0.002 | 0.5 |" in table
