"""What is known of the kernel of many queries without a GPU: how it is chosen, written, compiled, what ptxas reports.

A spill or a serialised wgmma costs most of a kernel's speed and changes no result, so no other test sees it.
"""

from __future__ import annotations

import dataclasses
import itertools
import struct

import numpy as np
import pytest
from cases import CASES, Case

from jax_flash import _ffi, canonical, codegen, cuda, heuristics
from jax_flash.kernel_spec import KernelSpec
from jax_flash.spec import UNBOUNDED, Call, Params

OUT = {"float16": "float16", "bfloat16": "bfloat16", "float8_e4m3fn": "bfloat16"}
WINDOWS = {"full": (UNBOUNDED, UNBOUNDED), "causal": (UNBOUNDED, 0), "causal-left": (5000, 0), "narrow": (500, 0)}
FEATURES = ("softcap", "sinks", "packed_q", "packed_k", "seqused_q", "seqused_k", "cache_leftpad", "lse")


def of_case(case: Case) -> list[KernelSpec]:
    """The kernels of a case, the best first."""
    return cuda.kernel_specs(*canonical.canonical(Call(**case.arguments())))


def of_grid(
    element: str,
    head_dim: int,
    head_dim_v: int,
    window: str,
    features: tuple[str, ...],
    queries: int = 100,
    keys: int | None = None,
    kv_element: str | None = None,
    heads_of_kv: int = 1,
    page_size: int | None = None,
) -> list[KernelSpec]:
    """The kernels of a combination, the best first; there are as many keys as queries unless given."""
    keys = queries if keys is None else keys
    left, right = WINDOWS[window]
    return heuristics.ranked(
        element=element,
        kv_element=kv_element or element,
        out=OUT[element],
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        window_left=left,
        window_right=right,
        mean_queries=queries,
        mean_keys=keys,
        kv_rows=keys,
        heads_of_kv=heads_of_kv,
        page_size=page_size,
        page_table=page_size is not None,
        cache_batch_idx=False,
        **{name: name in features for name in FEATURES},
    )


def kind(spec: KernelSpec) -> KernelSpec:
    """Kernels of one kind take the same registers: float16 what bfloat16 does, with a log-sum-exp or without."""
    bfloat16 = {name: "bfloat16" for name in ("element", "out") if getattr(spec, name) == "float16"}
    return dataclasses.replace(spec, lse=True, **bfloat16)


def kernels():
    """First choices of the test list and of the grid, each kind once, named by the first that asks for it."""
    asked = [(case.id, of_case(case)) for case in CASES if case.dtype != "float32"]
    elements = ("bfloat16", "float8_e4m3fn")
    # Short sequences and long ones in turn, for which FP8 has other kernels.
    combinations = (("full", ()), ("causal", ()), ("full", FEATURES), ("causal-left", FEATURES))
    for (element, head_dim, (window, features)), length in zip(
        itertools.product(elements, heuristics.HEAD_DIMS, combinations),
        itertools.cycle((100, 10000, 10000)),
        strict=False,
    ):
        name = f"{element}-d{head_dim}-{window}-{'everything' if features else 'plain'}"
        asked.append((name, of_grid(element, head_dim, head_dim, window, features, length)))
    # Few queries over many FP8 keys, which the kernel widens, or whose values it transposes.
    for head_dim, (window, features) in zip(heuristics.HEAD_DIMS, itertools.cycle(combinations), strict=False):
        for element in elements:
            specs = of_grid(element, head_dim, head_dim, window, features, 100, 10000, kv_element="float8_e4m3fn")
            asked.append((f"{element}-over-fp8-d{head_dim}", specs))
    # Over pages, which the kernel widens or transposes whatever there are.
    paged = ("seqused_k", "cache_leftpad", "packed_q", "sinks", "lse")
    for (head_dim, element, kv_element), (window, features) in zip(
        (
            (64, *elements),
            (96, *elements[:1] * 2),
            (128, *elements[1:] * 2),
            (256, *elements),
            (128, *elements[:1] * 2),
        ),
        itertools.cycle((("causal", ("seqused_k",)), ("causal-left", paged))),
        strict=False,
    ):
        specs = of_grid(element, head_dim, head_dim, window, features, 500, 8000, kv_element, 4, page_size=96)
        asked.append((f"{element}-over-pages-of-{kv_element}-d{head_dim}-{window}", specs))
    # Where warps that transpose also clear.
    for head_dim, window, features in ((128, "causal", ("softcap", "seqused_k")), (256, "full", ("seqused_k",))):
        specs = of_grid("float8_e4m3fn", head_dim, head_dim, window, features, 500)
        asked.append((f"fp8-d{head_dim}-{window}-clears", specs))
    asked.append(("fp8-tiny", of_grid("float8_e4m3fn", 128, 128, "full", ("packed_q", "packed_k"), 50)))
    # Where the first choice is known to spill.
    for head_dim, window, features in (
        (96, "causal", ("packed_q", "packed_k", "seqused_q", "seqused_k")),
        (128, "full", ("packed_q", "packed_k", "softcap")),
        (128, "causal-left", ("softcap",)),
    ):
        specs = of_grid("float8_e4m3fn", head_dim, head_dim, window, features, 100, 10000)
        asked.append((f"spills-d{head_dim}-{window}-{'-'.join(features)}", specs))
    distinct = {kind(specs[0]): (name, specs) for name, specs in reversed(asked)}
    return [pytest.param(specs, id=name) for name, specs in distinct.values()]


# Of an instruction of compute capability 9.0: the last 12 bits of the first of its 16 bytes.
WGMMA = {0x9F0, 0xDF0, 0x9F3, 0xDF3}  # of 16-bit elements and of FP8
LANE_TO_UNIFORM_REGISTER = 0x2CA


def instructions(cubin: bytes) -> list[int]:
    """The kernel's instructions in order, each as those 12 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    (code,) = [s for s in sections if cubin.startswith(b".text.", sections[names][4] + s[0])]
    return [low & 0xFFF for low, _ in struct.iter_unpack("<QQ", cubin[code[4] : code[4] + code[5]])]


@pytest.mark.parametrize("specs", kernels())
def test_compiles_without_a_spill(specs):
    spec, kernel = cuda.compile_best("forward.cu", specs)
    assert kernel.cubin.startswith(b"\x7fELF")
    assert (kernel.spill_bytes, kernel.serialized) == (0, False), f"{spec}\n{kernel.log}"
    # setmaxnreg waits for ever for registers that the CTA was not launched with.
    registers = spec.producer_registers + spec.tile_m // 64 * spec.consumer_registers
    assert 128 * registers <= kernel.registers * spec.threads <= 2**16 / spec.ctas_per_sm
    # Operands of wgmma that ptxas keeps in registers of each lane cost a move before every one.
    code = instructions(kernel.cubin)
    starts = [i for i, instruction in enumerate(code) if instruction in WGMMA]
    batches = [code[a:b] for a, b in itertools.pairwise(starts) if b - a < 24]
    moves = sum(batch.count(LANE_TO_UNIFORM_REGISTER) for batch in batches)
    assert 4 * moves < len(batches)


@pytest.mark.parametrize(
    ("element", "kv_element"), [*((x, x) for x in OUT), *((x, "float8_e4m3fn") for x in ("float16", "bfloat16"))]
)
def test_every_combination_has_a_legal_kernel(element, kv_element):
    for combination in itertools.product(heuristics.HEAD_DIMS, heuristics.HEAD_DIMS, WINDOWS, ((), FEATURES)):
        spec = of_grid(element, *combination, kv_element=kv_element)[0]
        assert heuristics.legal(spec), combination
        assert spec.shared_bytes <= heuristics.SHARED_LIMIT, combination
        assert spec.threads == 128 * (spec.tile_m // 64 + 1), combination
        # setmaxnreg takes multiples of 8.
        assert spec.producer_registers % 8 == spec.consumer_registers % 8 == 0, combination


@pytest.mark.parametrize(
    ("head_dim", "window", "features", "queries", "keys", "tile"),
    [
        (64, "full", (), 8192, 8192, (192, 128)),
        (96, "full", (), 8192, 8192, (192, 96)),
        (128, "full", (), 8192, 8192, (128, 128)),
        (128, "causal", (), 8192, 8192, (128, 128)),
        (256, "full", (), 8192, 8192, (128, 64)),
        (96, "full", (), 512, 512, (128, 128)),
        # Queries that fill tiles of 128 rows, of which 192 would leave a third empty, or a ninth.
        (64, "full", (), 256, 4096, (128, 128)),
        (64, "full", (), 512, 4096, (192, 128)),
        (64, "full", ("packed_q", "packed_k"), 60, 60, (128, 128)),
        (64, "full", ("packed_q", "packed_k"), 256, 256, (192, 128)),
    ],
)
def test_16_bit_tiles_are_those_that_were_found_fastest(head_dim, window, features, queries, keys, tile):
    spec = of_grid("bfloat16", head_dim, head_dim, window, features, queries, keys)[0]
    assert (spec.tile_m, spec.tile_n) == tile


@pytest.mark.parametrize(
    ("head_dim", "window", "features", "queries", "keys", "choice"),
    [
        (64, "full", (), 8192, 8192, (192, 128, 2, 4)),
        (64, "full", (), 512, 512, (192, 128, 3, 4)),
        (64, "full", (), 256, 256, (128, 128, 3, 4)),
        (64, "full", (), 256, 4096, (128, 256, 3, 4)),
        (64, "causal", ("softcap",), 256, 4096, (128, 192, 3, 0)),
        (96, "full", (), 256, 4096, (128, 192, 3, 4)),
        (96, "full", ("softcap",), 1024, 1024, (128, 128, 3, 0)),
        (128, "full", (), 8192, 8192, (128, 192, 2, 1)),
        (128, "full", (), 512, 512, (128, 128, 3, 4)),
        (128, "full", (), 256, 4096, (128, 192, 3, 4)),
        (128, "full", ("packed_q", "packed_k"), 60, 60, (64, 64, 3, 4)),
        (256, "full", (), 8192, 8192, (128, 128, 2, 1)),
        (256, "full", (), 512, 512, (128, 128, 3, 1)),
        # Three buffers of V before wide steps.
        (256, "full", (), 256, 4096, (128, 96, 3, 1)),
    ],
)
def test_fp8_choices_are_those_that_were_found_fastest(head_dim, window, features, queries, keys, choice):
    spec = of_grid("float8_e4m3fn", head_dim, head_dim, window, features, queries, keys)[0]
    assert (spec.tile_m, spec.tile_n, spec.v_stages, spec.overlap) == choice


@pytest.mark.parametrize(("head_dim", "padded"), [(8, 64), (64, 64), (72, 96), (128, 128), (136, 192), (256, 256)])
def test_head_dim_is_padded_to_the_next(head_dim, padded):
    assert heuristics.padded_head_dim(head_dim) == padded


def test_fp8_values_lie_in_the_order_of_probabilities():
    """Of 16 keys a thread q of four holds, in its order, columns 2q, 2q + 1, 2q + 8 and 2q + 9 of P (fragment.cuh)."""
    groups, rows, heads, columns = 2, 41, 3, 16
    v = np.arange(groups * rows * heads * columns).reshape(groups, rows, heads, columns)
    transposed = np.asarray(cuda.transpose_fp8_values(v))
    assert transposed.shape == (groups, heads, columns, 48)
    keys = [key for q in range(4) for key in (2 * q, 2 * q + 1, 2 * q + 8, 2 * q + 9)]
    order = [start + key for start in (0, 16, 32) for key in keys]
    padded = np.pad(v, ((0, 0), (0, 7), (0, 0), (0, 0)))
    np.testing.assert_array_equal(transposed, padded[:, order].transpose(0, 2, 3, 1))


def test_only_packed_fp8_keys_that_come_transposed_are_aligned():
    assert of_grid("float8_e4m3fn", 64, 64, "full", FEATURES, 10000)[0].key_alignment == 16
    assert of_grid("float8_e4m3fn", 64, 64, "full", FEATURES)[0].key_alignment == 1
    assert of_grid("float8_e4m3fn", 64, 64, "full", ())[0].key_alignment == 1
    assert of_grid("bfloat16", 64, 64, "full", FEATURES)[0].key_alignment == 1


@pytest.mark.parametrize(
    ("queries", "heads_of_kv", "window", "head_dim", "widens"),
    [
        *((1024, 1, "full", 128, True), (256, 4, "full", 128, True), (257, 4, "full", 128, False)),
        *((2048, 1, "causal", 64, True), (2049, 1, "causal", 64, False)),
        (2049, 1, "narrow", 64, True),
        (700, 4, "narrow", 64, False),
        (100, 1, "full", 72, False),  # rows that TMA does not take
    ],
)
def test_kernels_widen_fp8_keys_that_few_queries_see(queries, heads_of_kv, window, head_dim, widens):
    options = {"queries": queries, "kv_element": "float8_e4m3fn", "heads_of_kv": heads_of_kv}
    for element in ("bfloat16", "float16"):
        spec = of_grid(element, head_dim, head_dim, window, (), **options)[0]
        assert spec.widens == widens
        assert spec.element == ("float16" if widens else element)
        assert spec.converts_q == (widens and element == "bfloat16")


@pytest.mark.parametrize(
    ("head_dim", "queries", "keys", "heads_of_kv", "window", "features", "transposes"),
    [
        *((128, 1536, 1536, 1, "full", (), True), (128, 1552, 1552, 1, "full", (), False)),
        *((64, 3072, 3072, 1, "full", (), True), (64, 3088, 3088, 1, "full", (), False)),
        *((256, 768, 768, 1, "full", (), True), (256, 784, 784, 1, "full", (), False)),
        *((128, 384, 40000, 4, "full", (), True), (128, 400, 400, 4, "full", (), False)),
        *((128, 3072, 3072, 1, "causal", (), True), (128, 3088, 3088, 1, "causal", (), False)),
        *((128, 1520, 40000, 1, "causal", (), True), (128, 3072, 40000, 1, "causal", (), False)),
        *((128, 40000, 40000, 3, "narrow", (), True), (128, 40000, 40000, 4, "narrow", (), False)),
        # Keys that nobody sees count too.
        *((128, 8192, 80000, 24, "narrow", (), True), (128, 8192, 80000, 32, "narrow", (), False)),
        *((128, 3072, 3072, 1, "full", FEATURES, True), (128, 3088, 3088, 1, "full", FEATURES, False)),
        *((128, 3072, 3072, 1, "full", ("packed_k",), True), (128, 3072, 3072, 1, "full", ("packed_q",), False)),
        # Rows that XLA would pad.
        *((128, 6144, 6145, 1, "full", (), True), (128, 6145, 6145, 1, "full", (), False)),
    ],
)
def test_kernels_transpose_fp8_values_that_few_queries_see(
    head_dim, queries, keys, heads_of_kv, window, features, transposes
):
    spec = of_grid("float8_e4m3fn", head_dim, head_dim, window, features, queries, keys, heads_of_kv=heads_of_kv)[0]
    assert spec.transposes == transposes


def test_source_expands_each_include_once():
    source = codegen.source("forward.cu", of_grid("bfloat16", 128, 128, "causal", ())[0])
    assert "#include" not in source
    for name in ("forward.cu", "params.h", "spec.h", "wgmma.h", "softmax.cuh", "hopper/types.cuh"):
        assert source.count(f'#line 1 "{name}"\n') == 1, name


def test_first_deposit_is_the_same_in_python_and_cuda():
    source = codegen.source("forward.cu", of_grid("float8_e4m3fn", 128, 128, "full", ())[0])
    assert f"constexpr int kFirstDeposit = {heuristics.FIRST_DEPOSIT} / spec::kTileN;" in source


def test_spec_header_has_every_field():
    spec = of_grid("float8_e4m3fn", 128, 192, "causal", FEATURES)[0]
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
