"""Every choice that a KernelSpec leaves open computes the same, those that heuristics.py never takes too."""

from __future__ import annotations

import jax
import pytest
from cases import CASES
from tolerance import check

from jax_flash import canonical, heuristics, launch
from jax_flash.spec import Call, Operands

CHOICES = {
    "no-ping-pong": {"ping_pong": False, "overlap": 0},
    "all-overlap": {"overlap": 8},
    "three-consumers": {"tile_m": 192, "tile_n": 32, "q_stages": 1},
    "narrow": {"tile_n": 32, "q_stages": 1, "stages": 2},
    "deep": {"tile_n": 32, "stages": 4, "q_stages": 2},
    "integer-max": {"integer_max": True, "rescale_threshold": 0},
}
IDS = (
    "long-packed-tiles",
    "long-few-tiles",
    "long-sections",
    "long-dense-window-softcap-sinks-bfloat16",
    "long-packed-window-softcap-sinks-float16",
    "long-packed-causal-softcap-bfloat16",
    "long-packed-sinks-float8_e4m3fn",
    "dense-all-bfloat16",
    "packed-239x1",
)


@pytest.mark.gpu
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("case", [case for case in CASES if case.id in IDS], ids=str)
def test_choice(case, choices):
    arguments = case.arguments()
    call = Call(**arguments)
    attention, operands = canonical.canonical(call)
    spec = heuristics.with_choices(launch.kernel_specs(attention, operands)[0], **choices)
    assert spec.shared_bytes <= heuristics.SHARED_LIMIT
    forward = jax.jit(lambda *arrays: launch.forward_cuda(attention, Operands(*arrays), [spec]))
    results = canonical.restore(call, *forward(*operands))
    check(arguments, *(results if call.return_lse else (results,)))


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_choice_compiles(choices):
    case = next(case for case in CASES if case.id == "long-packed-causal-softcap-bfloat16")
    attention, operands = canonical.canonical(Call(**case.arguments()))
    spec = heuristics.with_choices(launch.kernel_specs(attention, operands)[0], **choices)
    launch.compile_best("forward.cu", [spec])


def test_ids_are_of_cases():
    assert set(IDS) <= {case.id for case in CASES}
