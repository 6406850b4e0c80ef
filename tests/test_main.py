"""python -m jax_flash, and the examples, as a user runs them."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from jax_flash import __main__ as command

EXAMPLES = sorted((pathlib.Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example):
    environment = os.environ | {"XLA_FLAGS": ""}  # without those of conftest.py
    result = subprocess.run([sys.executable, str(example)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "from the reference" in result.stdout


def test_cases_pass(capsys, monkeypatch):
    # The packed cases take seconds each on a CPU; that of ones is in the shared list of cases, the other in an example.
    quick = {name: case for name, case in command.CASES.items() if "packed" not in name}
    monkeypatch.setattr(command, "CASES", quick)
    assert command.main([]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["case", "device", "implementation"]
    assert [row.endswith("pass") for row in rows[:-1]] == [True] * len(quick)


@pytest.mark.parametrize("error", [0.1, np.nan])
def test_a_case_that_fails_is_told(capsys, monkeypatch, error):
    row = command.Row(
        case="broken", device="cpu", implementation="cpu", shape="1; 1", error=error, tolerance=0.05, seconds=1.0
    )
    rows = {"good": dataclasses.replace(row, case="good", error=0.01), "broken": row}
    monkeypatch.setattr(command, "CASES", rows)
    monkeypatch.setattr(command, "run_case", rows.get)
    assert command.main([]) == 1
    _, good, broken, _ = capsys.readouterr().out.splitlines()
    assert good.endswith("pass")
    assert broken.endswith("FAIL")


def test_tolerance_is_flash_attention_3s():
    truth = np.linspace(-3, 3, 1001)
    low = truth.astype(np.float16) + np.float16(0.125)
    rounding = np.abs((truth.astype(np.float16) + np.float16(0.3) - np.float16(0.3)).astype(np.float64) - truth).max()
    assert 0 < rounding < 2**-9
    assert command.tolerance(low, truth, 3) == pytest.approx(3 * np.abs(low - truth).max() + 2 * rounding)


def test_info(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_FLASH_CACHE_DIR", str(tmp_path))
    (tmp_path / "kernel").write_bytes(b"12345")
    assert command.main(["info"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("jax_flash 0.1.0, jax ")
    assert f"kernel cache: {tmp_path}, 1 kernels, 5 bytes" in out


def test_unknown_command_is_refused():
    with pytest.raises(SystemExit) as error:
        command.main(["benchmark"])
    assert error.value.code == 2
