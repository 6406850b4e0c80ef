"""The FFI calls: operand order, attributes, TMA maps; targets are registered when the first call is lowered."""

from __future__ import annotations

import dataclasses
import math
import threading

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash import canonical, codegen, decode, heuristics, jit
from jax_flash.order import Divisor, Order
from jax_flash.spec import UNBOUNDED, Attention, DecodeSpec, KernelSpec, Operands, Params


def register(platform: str) -> None:
    """Registers the handlers of a platform with JAX, once. State types come first: a target names the types it uses."""
    from jax_flash import _ffi

    with _registering:
        if platform in _registered:
            return
        xla_name = {"cpu": "cpu", "cuda": "CUDA"}[platform]
        for name, type_info in _ffi.types(platform).items():
            jax.ffi.register_ffi_type(name, type_info, platform=xla_name)
        for name, target in _ffi.targets(platform).items():
            jax.ffi.register_ffi_target(name, target, platform=xla_name)
        _registered.add(platform)


_registered: set[str] = set()
_registering = threading.Lock()


def cannot_run(implementation: str | None, reason: str) -> NotImplementedError:
    """The error where an implementation asked for by name cannot serve a call."""
    return NotImplementedError(f"implementation {implementation!r} cannot run here: {reason}")


def params_attribute(params: Params) -> dict[str, np.int32 | np.float32]:
    """Params as an FFI attribute: the type of each field is the one that kernels/params.h gives it."""
    return {
        name: np.float32(value) if isinstance(value, float) else np.int32(value)
        for name, value in dataclasses.asdict(params).items()
    }


def forward_result(attention: Attention, params: Params) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """What the forward writes: out, and the LSE, which is empty unless asked for."""
    lse_shape = (params.q_groups, params.heads, params.q_rows) if attention.return_lse else (0,)
    return (
        jax.ShapeDtypeStruct((params.q_groups, params.q_rows, params.heads, params.head_dim_v), attention.out_dtype),
        jax.ShapeDtypeStruct(lse_shape, jnp.float32),
    )


def forward_cpu(attention: Attention, operands: Operands):
    """The CPU handler: out and lse."""
    register("cpu")
    params = Params.of(attention, operands)
    call = jax.ffi.ffi_call("jax_flash_cpu_forward", forward_result(attention, params))
    return call(*operands, params=params_attribute(params))


def backward_cpu(attention: Attention, operands: Operands, dout, lse, delta):
    """The CPU handler's backward: dq, dk and dv, in the dtypes of q, k and v."""
    register("cpu")
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[:3]]
    call = jax.ffi.ffi_call("jax_flash_cpu_backward", results)
    return call(*operands, dout, lse, delta, params=params_attribute(Params.of(attention, operands)))


def write_cpu(cache, rows, group, row):
    """The CPU handler of append.py's writes: the cache with each of `rows` in its place, in place if XLA lets it."""
    register("cpu")
    result = jax.ShapeDtypeStruct(cache.shape, cache.dtype)
    call = jax.ffi.ffi_call("jax_flash_cpu_write", result, input_output_aliases={0: 0})
    return call(cache, rows, group, row)


# CUDA.

MAX_SOFTCAP = 1e4
"""The tanh of the kernels is exact to about 1e-7, so a score to as much of the cap: here to 1e-3."""

MAX_ROWS = 2**29
"""Of all heads and sequences of an array: the kernels add such numbers, and windows of 2**30, in 32 bits."""

MAX_ATTEMPTS = 4
"""Kernels compiled, at some seconds each, before one that spills is taken."""


def why_no_cuda() -> str | None:
    """Why no CUDA kernel can run on this machine, or None."""
    return _why_not_compiled() if _gpus() else "JAX sees no CUDA GPU."


def why_not_served(attention: Attention, operands: Operands) -> str | None:
    """Why no CUDA kernel serves a call, or None. Lowering for CUDA where there is no GPU assumes capability 9.0."""
    if operands.q.dtype == jnp.float32:
        return "the CUDA kernels take float16, bfloat16 and float8_e4m3fn, not float32."
    if attention.softcap > MAX_SOFTCAP:
        return f"the CUDA kernels take a softcap of at most {MAX_SOFTCAP:g}, not {attention.softcap:g}."
    counts = (math.prod(x.shape[:3]) for x in operands[:3])
    if max(operands.batch * operands.q.shape[2], operands.capacity, *counts) >= MAX_ROWS:
        return (
            f"the CUDA kernels count in 32 bits, and the rows of all heads of q, k or v, or the heads of all "
            f"sequences, are {MAX_ROWS} or more."
        )
    return _why_not_compiled()


def _gpus() -> list[jax.Device]:
    """Those that JAX sees, all of one kind."""
    try:
        return jax.devices("cuda")
    except RuntimeError:
        return []


def _why_not_compiled() -> str | None:
    """Why kernels for the GPU, or for one of capability 9.0 where there is none, cannot be compiled here, or None."""
    for gpu in _gpus()[:1]:
        if gpu.compute_capability != "9.0":
            return f"the GPU has compute capability {gpu.compute_capability}; the kernels need 9.0 (Hopper)."
    return jit.why_no_nvrtc()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TensorMap:
    """How TMA sees one operand, as TensorMapRecord in ffi/cuda.cc: four dims, the innermost first."""

    operand: int
    element_bytes: int
    swizzle_bytes: int
    dims: tuple[int, int, int, int]
    """In elements."""
    strides: tuple[int, int, int]
    """In bytes, of all dims but the innermost."""
    box: tuple[int, int, int, int]
    """What one copy brings, in elements."""

    def flat(self) -> list[int]:
        """All numbers in order."""
        return [self.operand, self.element_bytes, self.swizzle_bytes, *self.dims, *self.strides, *self.box]


def _rows_map(operand: int, shape, size: int, box_rows: int, box_bytes: int = 128) -> TensorMap:
    """An array (groups, rows, heads, columns), in boxes of `box_bytes` of `box_rows` rows of one head."""
    groups, rows, heads, columns = shape
    return TensorMap(
        operand=operand,
        element_bytes=size,
        swizzle_bytes=box_bytes,
        dims=(columns, rows, heads, groups),
        strides=(heads * columns * size, columns * size, rows * heads * columns * size),
        box=(box_bytes // size, box_rows, 1, 1),
    )


def _columns_map(operand: int, shape, box_rows: int, tile_columns: int) -> TensorMap:
    """An FP8 array (groups, heads, columns, rows), in boxes of `box_rows` rows and bytes of `tile_columns` columns."""
    groups, heads, columns, rows = shape
    return TensorMap(
        operand=operand,
        element_bytes=1,
        swizzle_bytes=box_rows,
        dims=(rows, columns, heads, groups),
        strides=(rows, columns * rows, heads * columns * rows),
        box=(box_rows, tile_columns, 1, 1),
    )


def _units_map(operand: int, shape, unit: int, tile_columns: int) -> TensorMap:
    """An FP8 array (groups, rows, heads, columns), in boxes of `unit` rows and `tile_columns`, cut into squares."""
    groups, rows, heads, columns = shape
    return TensorMap(
        operand=operand,
        element_bytes=1,
        swizzle_bytes=unit,
        dims=(unit, rows, heads * columns // unit, groups),
        strides=(heads * columns, unit, rows * heads * columns),
        box=(unit, unit, tile_columns // unit, 1),
    )


def transpose_fp8_values(v):
    """V (G, S, Hk, Dv) as FP8 wgmma wants it: (G, Hk, Dv, S up to a multiple of 16), keys innermost.

    Within 16 keys the order is that in which a thread holds P in registers (kernels/fragment.cuh): position 4q + 2i + e
    holds key 8i + 2q + e. XLA fuses this into whatever computes V; into padding it must not, for that is slow.
    """
    groups, rows, heads, columns = v.shape
    if rows % heuristics.V_ROWS:
        v = jnp.pad(v, ((0, 0), (0, -rows % heuristics.V_ROWS), (0, 0), (0, 0)))
        v = jax.lax.optimization_barrier(v)
    v = v.reshape(groups, -1, 2, 4, 2, heads, columns)
    return v.transpose(0, 5, 6, 1, 3, 2, 4).reshape(groups, heads, columns, -1)


def _mean_lengths(operands: Operands) -> tuple[float, float]:
    """The average number of queries and of keys of a sequence, as far as shapes tell."""
    queries, keys = (math.prod(x.shape[:2]) / operands.batch for x in (operands.q, operands.k))
    return queries, keys if operands.has("cu_seqlens_k") else operands.capacity


def _features(attention: Attention, operands: Operands) -> dict[str, bool]:
    """The flags of a kernel."""
    names = ("sinks", "page_table", "cache_batch_idx", "cache_leftpad", "seqused_q", "seqused_k")
    return {name: operands.has(name) for name in names} | {
        "softcap": attention.softcap > 0,
        "packed_q": operands.has("cu_seqlens_q"),
        "packed_k": operands.has("cu_seqlens_k"),
        "lse": attention.return_lse,
    }


def kernel_specs(attention: Attention, operands: Operands) -> list[KernelSpec]:
    """The kernels that could compute a call of many queries, the best first."""
    mean_queries, mean_keys = _mean_lengths(operands)
    return heuristics.ranked(
        element=operands.q.dtype.name,
        kv_element=operands.k.dtype.name,
        out=attention.out_dtype,
        head_dim=operands.q.shape[-1],
        head_dim_v=operands.v.shape[-1],
        window_left=attention.window_left,
        window_right=attention.window_right,
        mean_queries=mean_queries,
        mean_keys=mean_keys,
        kv_rows=operands.k.shape[1],
        heads_of_kv=operands.q.shape[2] // operands.k.shape[2],
        **_features(attention, operands),
    )


def compile_best(entry: str, specs: list[KernelSpec]) -> tuple[KernelSpec, jit.Kernel]:
    """The first kernel that ptxas compiles without spills, which differs by its version; else the best one."""
    compiled = []
    for spec in specs[:MAX_ATTEMPTS]:
        compiled.append((spec, jit.compile(codegen.source(entry, spec))))
        if compiled[-1][1].clean:
            return compiled[-1]
    return compiled[0]


def forward_cuda(attention: Attention, operands: Operands):
    """The CUDA kernels: out and lse."""
    if decode.serves(*_mean_lengths(operands), operands.q.shape[2] // operands.k.shape[2]):
        return decode_cuda(attention, operands)
    if operands.has("page_table"):
        operands = canonical.gathered(operands)  # by XLA
    return prefill_cuda(attention, operands)


def prefill_cuda(attention: Attention, operands: Operands, specs: list[KernelSpec] | None = None):
    """The kernel of many queries. `specs` are those to choose from, else those of heuristics.py."""
    spec, kernel = compile_best("forward.cu", specs or kernel_specs(attention, operands))
    params = Params.of(attention, operands)
    if not spec.widens:
        operands = operands.widened()
    size = operands.k.dtype.itemsize
    row_bytes = 64 if spec.widens else 128
    maps = [
        _rows_map(0, operands.q.shape, operands.q.dtype.itemsize, 64),
        _rows_map(1, operands.k.shape, size, spec.tile_n, row_bytes),
    ]
    if spec.transposes:
        maps.append(_units_map(2, operands.v.shape, spec.v_box_keys, spec.head_dim_v))
    elif heuristics.element_bytes(spec.element) == 1:
        operands = operands._replace(v=transpose_fp8_values(operands.v))
        maps.append(_columns_map(2, operands.v.shape, spec.v_box_keys, spec.head_dim_v))
    else:
        maps.append(_rows_map(2, operands.v.shape, size, spec.v_box_keys, row_bytes))
    results = forward_result(attention, params)
    if results[0].dtype.itemsize == 2:
        maps.append(_rows_map(len(operands), results[0].shape, 2, 16))
    # CTAs draw their tiles; where each has one at most there is no counter, and no memset in front of a short kernel.
    tiles = _max_tiles(spec, params)
    grid = min(tiles, spec.ctas_per_sm * _multiprocessors())
    counters = [jax.ShapeDtypeStruct((1,), jnp.int32)] if spec.packed_q and tiles > grid else []
    out, lse, *_ = _launch(
        kernel,
        "forward",
        operands,
        [*results, *counters],
        params,
        maps=maps,
        grid=grid,
        threads=spec.threads,
        shared_bytes=spec.shared_bytes,
        counters=2 if counters else -1,
        order=Order.of(spec, params, grid, attention.max_seqlen_q).flat(),
    )
    return out, lse


def decode_cuda(attention: Attention, operands: Operands, spec: DecodeSpec | None = None):
    """The kernel of few queries."""
    params = Params.of(attention, operands)
    group = params.heads // params.kv_heads
    rows = _mean_lengths(operands)[0] * group
    tile_m = decode.tile_m(rows)
    if not operands.k.shape[-1] % 16 == operands.v.shape[-1] % 16 == 0:  # rows of FP8 that TMA does not take
        operands = operands.widened()
    if operands.has("cu_seqlens_q"):  # each sequence, and the rows around them in a group, may end in a partial tile
        m_blocks, tiles = 1, params.q_groups * params.q_rows * group // tile_m + params.batch + 2 * params.q_groups
    else:
        m_blocks = -(-params.q_rows * group // tile_m)
        tiles = params.batch * m_blocks
    keys = operands.capacity
    if UNBOUNDED not in (attention.window_left, attention.window_right):
        keys = min(keys, attention.window_left + attention.window_right + math.ceil(rows / group))
    tiles *= params.kv_heads
    splits = attention.num_splits or decode.splits(tiles, keys, _multiprocessors())
    spec = spec or decode.decode_spec(
        element=operands.q.dtype.name,
        kv_element=operands.k.dtype.name,
        out=attention.out_dtype,
        head_dim=params.head_dim,
        head_dim_v=params.head_dim_v,
        window_left=attention.window_left != UNBOUNDED,
        window_right=attention.window_right != UNBOUNDED,
        rows=rows,
        tiles=tiles,
        page_size=params.kv_rows if operands.has("page_table") else None,
        num_splits=splits,
        multiprocessors=_multiprocessors(),
        **_features(attention, operands),
    )
    items = tiles * splits
    counted = spec.draws or spec.partial
    part_floats = spec.tile_m * (spec.head_dim_v + 2)
    results = [
        *forward_result(attention, params),
        jax.ShapeDtypeStruct((1 + tiles if counted else 0,), jnp.int32),
        jax.ShapeDtypeStruct((items * part_floats if spec.partial else 0,), jnp.float32),
    ]
    size = operands.k.dtype.itemsize
    divisors = [Divisor.of(x) for x in (splits, m_blocks, params.kv_heads, group)]
    out, lse, *_ = _launch(
        jit.compile(codegen.source("decode.cu", spec)),
        "decode",
        operands,
        results,
        params,
        # The kernel reads Q by itself.
        maps=[_rows_map(i, operands[i].shape, size, spec.box_keys) for i in (1, 1, 2)],
        grid=min(items, _multiprocessors()) if spec.draws else items,
        threads=spec.threads,
        shared_bytes=spec.shared_bytes,
        cluster=spec.cluster,
        counters=2 if counted else -1,
        order=[items, *(number for divisor in divisors for number in divisor)],
    )
    return out, lse


def _launch(kernel, entry, operands, results, params, *, maps, grid, threads, shared_bytes, counters, order, cluster=1):
    """The call of a compiled kernel; `counters` is the result that is 0 when it begins, or -1."""
    register("cuda")
    return jax.ffi.ffi_call("jax_flash_cuda_launch", results)(
        *operands,
        cubin=np.frombuffer(kernel.cubin, np.uint8),
        entry=entry,
        tensor_maps=np.array([number for m in maps for number in m.flat()], np.int64),
        grid=np.int64(grid),
        cluster=np.int64(cluster),
        threads=np.int64(threads),
        shared_bytes=np.int64(shared_bytes),
        counters=np.int64(counters),
        params=params_attribute(params),
        order=np.array(order, np.uint32).view(np.int32),
    )


def _max_tiles(spec: KernelSpec, params: Params) -> int:
    """No call has more tiles: each sequence, and the rows around them in a group, may end in a partial one."""
    whole = params.q_groups * -(-params.q_rows // spec.tile_m)
    partial = params.batch + params.q_groups if spec.packed_q else 0
    return params.heads * (whole + partial)


def _multiprocessors() -> int:
    """Of the GPU. Lowering where there is none assumes a whole H100 or H200: another number costs time and no more."""
    gpus = _gpus()
    return gpus[0].core_count if gpus else 132
