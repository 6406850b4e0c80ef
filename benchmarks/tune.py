"""python -m benchmarks tune [HEAD_DIM ...]: searches the fastest kernels on this GPU and prints heuristics.TUNED.

From the choices that the table holds now, one field at a time takes each of its values; the fastest by more than the
noise is kept, and the next field follows, until a whole round changes nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax

from benchmarks.libraries import Timer, input_sets, jax_timer
from benchmarks.suites import Row, grid
from jax_flash import canonical, codegen, heuristics, jit, launch
from jax_flash.spec import Call, KernelSpec

LENGTHS = (512, 2048, 8192)
"""Their geometric mean decides."""

CHOICES: dict[str, tuple[int | bool, ...]] = {
    "tile_m": (128, 192),
    "tile_n": (64, 80, 96, 112, 128, 144, 160, 176),
    "q_stages": (1, 2),
    "stages": (2, 3, 4),
    "ping_pong": (True, False),
    "late_store": (False, True),
    "rescale_threshold": (0, 8),
    "integer_max": (False, True),
    "cluster": (1, 2),
}

NOISE = 1.003
ROUNDS = 2
PAUSE = 0.1
"""Seconds between bursts, as in a suite."""


def fixed_of(row: Row) -> dict:
    """The fields of KernelSpec that a row fixes."""
    attention, operands = canonical.canonical(Call(*input_sets(row)[0], causal=row.causal))
    spec = dataclasses.asdict(launch.kernel_specs(attention, operands)[0])
    signature = ("element", "out", "head_dim", "head_dim_v", "key_alignment", "window_left", "window_right")
    features = ("softcap", "sinks", "packed_q", "packed_k", "seqused_q", "seqused_k", "lse")
    return {name: spec[name] for name in (*signature, *features)}


def spec_of(row: Row, choices: dict) -> KernelSpec | None:
    """The kernel of these choices for a row, or None if it does not fit or ptxas spills."""
    spec = heuristics.kernel_spec(fixed_of(row), tile_v=row.head_dim_v, **choices)
    if spec.shared_bytes > heuristics.SHARED_LIMIT or spec.tile_n % (8 * spec.cluster):
        return None
    return spec if jit.compile(codegen.source("forward.cu", spec)).clean else None


def timer_of(row: Row, spec: KernelSpec) -> Timer:
    """A timer of one kernel."""

    def attention(q, k, v):
        call = canonical.canonical(Call(q, k, v, causal=row.causal))
        return launch.forward_cuda(*call, [spec])[0]

    return jax_timer(attention, input_sets(row))[1]


def rates(rows: Sequence[Row], alternatives: list[dict]) -> list[float]:
    """The geometric mean over rows of each alternative's rate, all measured in turn; 0 where it does not compile."""
    logarithms = [0.0] * len(alternatives)
    for row in rows:
        input_sets(row)
        with ThreadPoolExecutor(8) as pool:
            specs = list(pool.map(lambda choices, row=row: spec_of(row, choices), alternatives))
            timers = list(pool.map(lambda spec, row=row: spec and timer_of(row, spec), specs))
        times: list[list[float]] = [[] for _ in alternatives]
        for _, (number, timer) in itertools.product(range(ROUNDS), enumerate(timers)):
            if timer:
                time.sleep(PAUSE)
                times[number] += timer()
        for number, measured in enumerate(times):
            logarithms[number] += math.log(row.flops / statistics.median(measured)) if measured else -math.inf
    return [math.exp(logarithm / len(rows)) for logarithm in logarithms]


def search(rows: Sequence[Row], choices: dict) -> dict:
    """The best choices for rows of one head dim and mask, from `choices` on."""
    changed = True
    while changed:
        changed = False
        for name, values in CHOICES.items():
            alternatives = [choices, *({**choices, name: value} for value in values if value != choices[name])]
            measured = rates(rows, alternatives)
            print(
                f"  {name}: "
                + ", ".join(f"{a[name]} {r / 1e12:.0f}" for a, r in zip(alternatives, measured, strict=True)),
                flush=True,
            )
            best = max(range(len(alternatives)), key=measured.__getitem__)
            if measured[best] > NOISE * measured[0]:
                choices, changed = alternatives[best], True
    return choices


def main(head_dims: Sequence[int]) -> None:
    """Searches kernels of these head dims, full and causal, in bfloat16."""
    if jax.default_backend() != "gpu":
        raise SystemExit("tune needs a GPU of compute capability 9.0")
    table = {}
    for head_dim, causal in itertools.product(head_dims, (False, True)):
        rows = grid("bfloat16", (head_dim,), LENGTHS, (causal,))
        print(rows[0], flush=True)
        attention, operands = canonical.canonical(Call(*input_sets(rows[0])[0], causal=causal))
        spec = launch.kernel_specs(attention, operands)[0]
        table[2, head_dim, causal] = search(rows, {name: getattr(spec, name) for name in CHOICES})
        print(f"    {(2, head_dim, causal)}: {table[2, head_dim, causal]},", flush=True)
    print("TUNED = {", *(f"    {key}: {choices}," for key, choices in table.items()), "}", sep="\n")
