"""What is known of the CUDA kernels without a GPU: how they are chosen, written, compiled, and what ptxas reports.

A spill or a serialised wgmma costs most of a kernel's speed and changes no result, so no other test sees it.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from cases import CASES, Case

from jax_flash import _ffi, canonical, codegen, heuristics, jit, launch
from jax_flash.spec import UNBOUNDED, Call, KernelSpec, Params

OUT = {"float16": "float16", "bfloat16": "bfloat16", "float8_e4m3fn": "bfloat16"}
WINDOWS = {"full": (UNBOUNDED, UNBOUNDED), "causal": (UNBOUNDED, 0), "causal-left": (100, 0)}
FEATURES = ("softcap", "sinks", "packed_q", "packed_k", "seqused_q", "seqused_k", "lse")


def of_case(case: Case) -> KernelSpec:
    """The kernel of a case. A KernelSpec knows no length, so short sequences do."""
    shorter = {side: tuple(min(length, 2) for length in getattr(case, side)) for side in ("q_lens", "k_lens")}
    attention, operands = canonical.canonical(Call(**dataclasses.replace(case, **shorter).arguments()))
    return launch.kernel_spec(attention, operands)


def of_grid(element: str, head_dim: int, head_dim_v: int, window: str, features: str) -> KernelSpec:
    """The kernel of a combination: `features` are "plain", none of them, or "everything"."""
    left, right = WINDOWS[window]
    return heuristics.choose(
        element=element,
        out=OUT[element],
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        window_left=left,
        window_right=right,
        **dict.fromkeys(FEATURES, features == "everything"),
    )


def kernels():
    """Every kernel of the test list and of the grid once, named by the first that asks for it."""
    names: dict[KernelSpec, str] = {}
    for case in CASES:
        if case.dtype != "float32":
            names.setdefault(of_case(case), case.id)
    for element, head_dim, *rest in itertools.product(OUT, heuristics.HEAD_DIMS, WINDOWS, ("plain", "everything")):
        names.setdefault(of_grid(element, head_dim, head_dim, *rest), f"{element}-d{head_dim}-{'-'.join(rest)}")
    return [pytest.param(spec, id=name) for spec, name in names.items()]


@pytest.mark.parametrize("spec", kernels())
def test_compiles_without_a_spill(spec):
    kernel = jit.compile(codegen.source("forward.cu", spec))
    assert kernel.cubin.startswith(b"\x7fELF")
    assert (kernel.spill_bytes, kernel.serialized) == (0, False), f"{spec}\n{kernel.log}"


@pytest.mark.parametrize("element", OUT)
def test_every_combination_has_a_legal_kernel(element):
    combinations = itertools.product(heuristics.HEAD_DIMS, heuristics.HEAD_DIMS, WINDOWS, ("plain", "everything"))
    for combination in combinations:
        spec = of_grid(element, *combination)
        assert heuristics.legal(spec), combination
        assert spec.shared_bytes <= heuristics.SHARED_LIMIT, combination
        assert spec.threads == 128 * (spec.tile_m // 64 + 1), combination
        # 64 K registers serve a CTA; setmaxnreg takes multiples of 8.
        registers = 128 * (spec.producer_registers + spec.tile_m // 64 * spec.consumer_registers)
        assert registers <= 64 * 1024, combination
        assert spec.producer_registers % 8 == spec.consumer_registers % 8 == 0, combination


@pytest.mark.parametrize(
    ("head_dim", "window", "tile"),
    [
        (64, "full", (192, 128, 64)),
        (128, "full", (128, 176, 128)),
        (128, "causal", (128, 128, 128)),
        (256, "full", (128, 80, 256)),
    ],
)
def test_16_bit_tiles_are_those_of_flash_attention_3(head_dim, window, tile):
    spec = of_grid("bfloat16", head_dim, head_dim, window, "plain")
    assert (spec.tile_m, spec.tile_n, spec.tile_v) == tile


@pytest.mark.parametrize(("head_dim", "padded"), [(8, 64), (64, 64), (72, 96), (128, 128), (136, 192), (256, 256)])
def test_head_dim_is_padded_to_the_next(head_dim, padded):
    assert heuristics.padded_head_dim(head_dim) == padded


def test_only_packed_fp8_keys_are_aligned():
    assert of_grid("float8_e4m3fn", 64, 64, "full", "everything").key_alignment == 16
    assert of_grid("float8_e4m3fn", 64, 64, "full", "plain").key_alignment == 1
    assert of_grid("bfloat16", 64, 64, "full", "everything").key_alignment == 1


def test_source_expands_each_include_once():
    source = codegen.source("forward.cu", of_grid("bfloat16", 128, 128, "causal", "plain"))
    assert "#include" not in source
    for name in ("forward.cu", "params.h", "spec.h", "wgmma.h", "softmax.cuh", "hopper/types.cuh"):
        assert source.count(f'#line 1 "{name}"\n') == 1, name


def test_spec_header_has_every_field():
    spec = of_grid("float8_e4m3fn", 128, 192, "causal", "everything")
    source = codegen.source("forward.cu", spec)
    for name, value in dataclasses.asdict(spec).items():
        camel = name.title().replace("_", "")
        if isinstance(value, str):
            assert f"using {camel} = " in source
        else:
            kind, text = ("bool", str(value).lower()) if isinstance(value, bool) else ("int", value)
            assert f"constexpr {kind} k{camel} = {text};" in source


def test_params_are_the_same_list_in_python_and_cpp():
    fields = [(field.name, field.type) for field in dataclasses.fields(Params)]
    assert fields == list(_ffi.param_fields().items())
