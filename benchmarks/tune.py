"""python -m benchmarks tune [HEAD_DIM ...]: searches the fastest kernels on this GPU and prints heuristics.TUNED.

From the choices that the table holds now, one field at a time takes each of its values; the fastest by more than the
noise is kept, and the next field follows, until a whole round changes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax

from benchmarks.libraries import Timer, input_sets, jax_timer, medians
from benchmarks.suites import Row, grid
from jax_flash import canonical, codegen, cuda, heuristics, jit
from jax_flash.kernel_spec import KernelSpec
from jax_flash.spec import Attention, Call, Operands

LENGTHS = (512, 2048, 8192)
"""Their geometric mean decides. What is faster for short ones alone goes into heuristics.SHORT, by hand."""

CHOICES: dict[str, tuple[int | bool, ...]] = {
    "tile_m": (128, 192),
    "tile_n": (64, 80, 96, 112, 128, 144, 160, 176),
    "q_stages": (1, 2),
    "k_stages": (2, 3, 4),
    "v_stages": (2, 3, 4),
    "ping_pong": (True, False),
    "overlap": (0, 1, 2, 3, 4, 6, 8),
    "integer_max": (False, True),
}

NOISE = 1.003
ROUNDS = 2


def call_of(row: Row, *arrays: jax.Array) -> tuple[Attention, Operands]:
    """What kernels compute of a row's inputs."""
    return canonical.canonical(Call(*arrays, causal=row.causal, softcap=row.softcap))


def best_spec(row: Row) -> KernelSpec:
    """The kernel that heuristics.py chooses now."""
    return cuda.kernel_specs(*call_of(row, *input_sets(row)[0]))[0]


def spec_of(row: Row, choices: dict) -> KernelSpec | None:
    """The kernel with these choices, or None if it does not fit or ptxas spills."""
    spec = heuristics.with_choices(best_spec(row), **choices)
    if spec.shared_bytes > heuristics.SHARED_LIMIT:
        return None
    return spec if jit.compile(codegen.source("forward.cu", spec)).clean else None


def timer_of(row: Row, spec: KernelSpec) -> Timer:
    """A timer of one kernel."""

    def attention(q, k, v):
        return cuda.forward_prefill(*call_of(row, q, k, v), [spec])[0]

    return jax_timer(attention, input_sets(row))[1]


def rates(rows: Sequence[Row], alternatives: list[dict]) -> list[float]:
    """The geometric mean over rows of each alternative's rate, all measured in turn; 0 where it does not compile."""
    logarithms = [0.0] * len(alternatives)
    with ThreadPoolExecutor(8) as pool:
        for row in rows:
            input_sets(row)
            specs = list(pool.map(functools.partial(spec_of, row), alternatives))
            built = {number: spec for number, spec in enumerate(specs) if spec is not None}
            timers = dict(zip(built, pool.map(functools.partial(timer_of, row), built.values()), strict=True))
            seconds = medians(timers, ROUNDS)
            for number in range(len(alternatives)):
                logarithms[number] += math.log(row.flops / seconds[number]) if number in seconds else -math.inf
    return [math.exp(logarithm / len(rows)) for logarithm in logarithms]


def search(rows: Sequence[Row]) -> dict:
    """The best choices for rows of one head dim, from those of heuristics.py on."""
    base = best_spec(rows[-1])
    choices = {name: getattr(base, name) for name in CHOICES}
    changed = True
    while changed:
        changed = False
        for name, values in CHOICES.items():
            alternatives = [choices, *({**choices, name: value} for value in values if value != choices[name])]
            measured = rates(rows, alternatives)
            cells = (f"{a[name]} {rate / 1e12:.0f}" for a, rate in zip(alternatives, measured, strict=True))
            print(f"  {name}: {', '.join(cells)}", flush=True)
            best = max(range(len(alternatives)), key=measured.__getitem__)
            if measured[best] > NOISE * measured[0]:
                choices, changed = alternatives[best], True
    return choices


def main(head_dims: Sequence[int]) -> None:
    """Searches kernels of these head dims, without and with a softcap, in bfloat16."""
    table = {}
    for head_dim, softcap in itertools.product(head_dims, (0.0, 30.0)):
        rows = [dataclasses.replace(row, softcap=softcap) for row in grid("bfloat16", (head_dim,), LENGTHS)]
        print(rows[0], flush=True)
        key = (2, head_dim, softcap > 0)
        table[key] = search(rows)
        print(f"    {key}: {table[key]},", flush=True)
    print("TUNED = {", *(f"    {key}: {choices}," for key, choices in table.items()), "}", sep="\n")
