"""The FFI calls: operand order, attributes; what CUDA serves; targets are registered when the first call is lowered."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash import jit
from jax_flash.spec import Append, Attention, Operands, Params
from jax_flash.tensor_map import TensorMap


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


def why_not_appended(arrays: Append) -> str | None:
    """Why no CUDA kernel serves an append, or None."""
    if arrays.q.dtype == jnp.float32:
        return "the CUDA kernels take no float32 q."
    if max(math.prod(x.shape[:3]) for x in (arrays.q, arrays.k_new)) >= MAX_ROWS:
        return f"the CUDA kernels count in 32 bits, and the rows of all heads of q or k_new are {MAX_ROWS} or more."
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


NO_PARAMS = Params(**{name: 0 for name in Params.__slots__} | {"softcap": 0.0})  # type: ignore[arg-type]
"""Those of a kernel that takes none."""


def call_kernel(
    kernel: jit.Kernel,
    entry: str,
    operands: Iterable,
    results: list[jax.ShapeDtypeStruct],
    *,
    grid: int,
    threads: int,
    order: Iterable[int],
    params: Params = NO_PARAMS,
    maps: Iterable[TensorMap] = (),
    shared_bytes: int = 0,
    cluster: int = 1,
    counters: int = -1,
    aliases: dict[int, int] | None = None,
):
    """The call of a compiled kernel; `counters` is the result that is 0 when it begins, `aliases` says whose memory, of
    the operands, results take."""
    register("cuda")
    return jax.ffi.ffi_call("jax_flash_cuda_launch", results, input_output_aliases=aliases)(
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
        order=np.array([*order], np.uint32).view(np.int32),
    )


def multiprocessors() -> int:
    """Of the GPU. Lowering where there is none assumes a whole H100 or H200: another number costs time and no more."""
    gpus = _gpus()
    return gpus[0].core_count if gpus else 132
