"""Every choice that a KernelSpec leaves open computes the same, those that heuristics.py never takes too."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from cases import CASES
from tolerance import check

from jax_flash import canonical, cuda, heuristics
from jax_flash.spec import Call, Operands

CHOICES = {
    "no-ping-pong": {"ping_pong": False, "overlap": 0},
    "all-overlap": {"overlap": 8},
    "three-consumers": {"tile_m": 192, "tile_n": 32, "q_stages": 1, "transposes": False},
    "narrow": {"tile_n": 32, "q_stages": 1, "k_stages": 2, "v_stages": 2},
    "deep": {"tile_n": 32, "k_stages": 3, "v_stages": 4, "q_stages": 2},
    "integer-max": {"integer_max": True},
    "fp8-transposed-before": {"transposes": False},
    "fp8-transposes": {"tile_m": 128, "tile_n": 64, "transposes": True},
    "fp8-small": {"tile_m": 64, "tile_n": 64, "ctas_per_sm": 2, "transposes": True, "ping_pong": False},
    "fp8-deposits": {"deposits": True, "tile_n": 64, "v_stages": 2},
}
IDS = (
    "long-packed-tiles",
    "long-few-tiles",
    "long-sections",
    "long-dense-window-softcap-sinks-bfloat16",
    "long-packed-window-softcap-sinks-float16",
    "long-packed-causal-softcap-bfloat16",
    "long-packed-sinks-float8_e4m3fn",
    "long-dense-causal-softcap-float8_e4m3fn",
    "dense-all-bfloat16",
    "packed-239x1",
    "long-dense-over-fp8",
    "long-packed-over-fp8",
)


NARROW = ("three-consumers", "fp8-small")
"""Whose threads start with 128 registers, where one wgmma of 256 columns takes more."""

COMBINATIONS = [
    pytest.param(case, choices, id=f"{case}-{name}")
    for case in CASES
    for name, choices in CHOICES.items()
    if case.id in IDS
    if case.dtype == "float8_e4m3fn" or not name.startswith("fp8")
    if case.head_dim < 256 or name not in NARROW
]


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "choices"), COMBINATIONS)
def test_choice(case, choices):
    arguments = case.arguments()
    call = Call(**arguments)
    attention, operands = canonical.canonical(call)
    spec = heuristics.with_choices(cuda.kernel_specs(attention, operands)[0], **choices)
    assert spec.shared_bytes <= heuristics.SHARED_LIMIT
    forward = jax.jit(lambda *arrays: cuda.forward_prefill(attention, Operands(*arrays), [spec]))
    results = canonical.restore(call, *forward(*operands))
    check(arguments, *(results if call.return_lse else (results,)))


@pytest.mark.gpu
def test_values_transposed_by_whomever_give_the_same_bits():
    call = Call(**next(case for case in CASES if case.id == "long-dense-causal-softcap-float8_e4m3fn").arguments())
    attention, operands = canonical.canonical(call)
    spec = cuda.kernel_specs(attention, operands)[0]

    def forward(transposes):
        chosen = heuristics.with_choices(spec, tile_m=128, tile_n=64, transposes=transposes)
        return jax.jit(lambda *arrays: cuda.forward_prefill(attention, Operands(*arrays), [chosen]))(*operands)

    jax.tree.map(np.testing.assert_array_equal, forward(False), forward(True))


@pytest.mark.parametrize("name", CHOICES)
def test_choice_compiles(name):
    element = "float8_e4m3fn" if name.startswith("fp8") else "bfloat16"
    case = next(case for case in CASES if case.id == f"long-packed-causal-softcap-{element}")
    attention, operands = canonical.canonical(Call(**case.arguments()))
    spec = heuristics.with_choices(cuda.kernel_specs(attention, operands)[0], **CHOICES[name])
    cuda.compile_best("forward.cu", [spec])


def test_ids_are_of_cases():
    assert set(IDS) <= {case.id for case in CASES}
