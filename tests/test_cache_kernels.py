"""What is known without a GPU of the CUDA kernels that serve a KV cache: of few queries, and of an append."""

from __future__ import annotations

import itertools

import pytest
from test_kernels import FEATURES, OUT

from jax_flash import codegen, cuda, decode, heuristics, jit
from jax_flash.kernel_spec import AppendSpec, DecodeSpec


def of_decode(
    element: str,
    kv_element: str,
    head_dim: int,
    head_dim_v: int,
    tile_m: int,
    features: tuple[str, ...],
    page_size: int | None = None,
    most_tiles: int = 3,
    num_splits: int = 1,
) -> DecodeSpec:
    """The decode kernel of a combination."""
    return decode.decode_spec(
        element=element,
        kv_element=kv_element,
        out=OUT[element],
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        tile_m=tile_m,
        tiles=3,
        most_tiles=most_tiles,
        page_size=page_size,
        num_splits=num_splits,
        multiprocessors=132,
        page_table=page_size is not None,
        cache_batch_idx=False,
        **{name: name in features for name in (*FEATURES, "window_left", "window_right")},
    )


def decode_kernels():
    """Decode kernels of every pair of dtypes, head dim and height of a tile, plain and with everything by turns."""
    everything = tuple({*FEATURES, "window_left", "window_right"} - {"packed_k"})
    dims = (*((d, d) for d in heuristics.HEAD_DIMS), (64, 256), (192, 128))
    pairs = (("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3fn"), ("float8_e4m3fn", "float8_e4m3fn"))
    kernels = []
    for turn, (tile_m, elements, (head_dim, head_dim_v)) in enumerate(itertools.product(decode.TILES_M, pairs, dims)):
        features, page_sizes = (((), (None, None)), (everything, (16, 4)))[turn % 2]
        spec = of_decode(
            *elements,
            head_dim,
            head_dim_v,
            tile_m,
            features,
            page_size=page_sizes[turn % 5 % 2],
            most_tiles=(3, 200)[turn % 9 % 2],
            num_splits=(1, 4, 40)[turn // 2 % 3],
        )
        kernels.append(pytest.param(spec, id=f"{'-over-'.join(elements)}-d{head_dim}-{head_dim_v}-m{tile_m}"))
    return kernels


@pytest.mark.parametrize("spec", decode_kernels())
def test_decode_compiles_without_a_spill(spec):
    assert spec.shared_bytes <= heuristics.SHARED_LIMIT
    kernel = jit.compile(codegen.source("decode.cu", spec))
    assert kernel.spill_bytes == 0, f"{spec}\n{kernel.log}"
    # Registers are given to warps by the quarters of an SM.
    assert kernel.registers * 32 * -(-spec.threads // 128) * 4 <= 2**16


@pytest.mark.parametrize("num_splits", [1, 3, 8])
@pytest.mark.parametrize("tile_m", decode.TILES_M)
def test_decode_counts_its_shared_memory(tile_m, num_splits):
    """storage.cuh compares the number, and is compiled without the kernel here."""
    dims = (*((d, d) for d in heuristics.HEAD_DIMS), (64, 256), (256, 64))
    for (head_dim, head_dim_v), element, tiles in itertools.product(dims, ("bfloat16", "float8_e4m3fn"), (3, 200)):
        spec = of_decode("bfloat16", element, head_dim, head_dim_v, tile_m, (), None, tiles, num_splits)
        source, _, _ = codegen.source("decode.cu", spec).partition('extern "C" __global__')
        jit.compile(source + 'extern "C" __global__ void decode() {}\n}\n')


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("tile_m", decode.TILES_M)
def test_a_buffer_is_always_the_same_warps(tile_m, page_size):
    """storage.cuh tells why."""
    dims, elements = itertools.product(heuristics.HEAD_DIMS, repeat=2), ("bfloat16", "float8_e4m3fn")
    for (head_dim, head_dim_v), element, splits in itertools.product(dims, elements, (1, 3, 8, 40)):
        spec = of_decode("bfloat16", element, head_dim, head_dim_v, tile_m, (), page_size, 200, splits)
        assert spec.stages % (spec.threads // 32 - decode.WARPS - 1) == 0
        assert spec.stages % decode.key_warps(tile_m) == 0


@pytest.mark.parametrize(
    ("query", "new", "cache", "table"),
    [
        ("bfloat16", "bfloat16", "bfloat16", "float32"),
        ("float16", "float32", "float8_e4m3fn", "bfloat16"),
        ("float8_e4m3fn", "float8_e4m3fn", "float8_e4m3fn", "float16"),
    ],
)
@pytest.mark.parametrize("everything", [False, True])
def test_append_compiles(query, new, cache, table, everything):
    flags = ("rotates", "rotary_interleaved", "windowed", "packed_q", "packed_new", "page_table")
    spec = AppendSpec(
        query=query,
        new=new,
        cache=cache,
        table=table,
        threads=cuda.APPEND_THREADS,
        quantises=new != cache,
        cache_batch_idx=not everything,
        **dict.fromkeys(flags, everything),
    )
    assert jit.compile(codegen.source("append.cu", spec)).cubin.startswith(b"\x7fELF")


@pytest.mark.parametrize(
    ("tiles", "keys", "splits"),
    [
        *((2, 2048, 8), (2, 512, 4), (8, 4096, 8), (9, 4096, 14)),  # of a cluster, and past one
        *((1, 131072, 132), (8, 131072, 16), (32, 65536, 4), (2, 100, 1)),
        *((128, 2048, 1), (512, 8192, 1), (512, 32768, 4)),  # enough tiles, of which long ones are split
    ],
)
def test_keys_are_split_for_few_tiles_and_for_long_ones(tiles, keys, splits):
    assert decode.splits(tiles, keys, multiprocessors=132) == splits


@pytest.mark.parametrize(("rows", "packed", "tile_m"), [(3, False, 8), (8.5, False, 16), (3, True, 16), (90, True, 64)])
def test_tiles_have_as_many_rows_as_sequences(rows, packed, tile_m):
    assert decode.tile_m(rows, packed=packed) == tile_m


@pytest.mark.parametrize("page_size", [8, 16, 24, 48, 256])
def test_copies_of_a_block_come_together(page_size):
    """Each lane of a warp has one of 32 copies: those of a block must not be parted."""
    for (head_dim, head_dim_v), element, tile_m in itertools.product(
        itertools.product(heuristics.HEAD_DIMS, repeat=2), ("bfloat16", "float8_e4m3fn"), decode.TILES_M
    ):
        spec = of_decode(element, element, head_dim, head_dim_v, tile_m, (), page_size)
        assert not spec.gathers
        assert 32 % (spec.tile_n // spec.box_keys) == spec.tile_n % spec.box_keys == 0


@pytest.mark.parametrize(("page_size", "box"), [(1, 1), (4, 4), (16, 16), (48, 16), (64, 64), (256, 64), (7, 1)])
def test_copies_stay_in_a_page(page_size, box):
    assert heuristics.box_keys(page_size, 64) == box
