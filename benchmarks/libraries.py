"""Who is measured: jax_flash and its peers. For a row each gives the function that computes it, or refuses.

A function takes q, k and v; cu_seqlens where the row is packed; of a KV cache the length of each sequence, and the page
table if it has pages. A timer runs a burst of calls and gives the time of each in seconds: kernel time by CUPTI on a
GPU, wall time on the CPU.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp

import jax_flash
from benchmarks.inputs import arrays_of
from benchmarks.suites import Row

BURST = 12
"""Calls of one burst: enough for a median, few enough that the GPU does not throttle."""

PAUSE = 0.1
"""Seconds between bursts: without them power throttling, not the kernel, decides."""

SPLITS = (1, 4, 16, 32)
"""Of the keys of a sequence, where a library leaves them to its user; the best is taken."""

V_UNIT = 0.5
"""What one unit of v is worth that is quantised in the jit: a power of two, so that what was FP8 stays as it was."""

CUDNN_OUT_SCALE = 16
"""By which cuDNN multiplies its FP8 result: averages of many random normal values are small, single ones are not."""

CACHE_BYTES = 128 << 20
"""Inputs of less, which the L2 cache could keep from call to call, come in several sets that take turns."""

Result = Callable[[], jax.Array]
Timer = Callable[[], list[float]]
Name = TypeVar("Name", bound=Hashable)


class Refusal(Exception):
    """A library cannot run a row; the message says why."""


def reason(error: Exception) -> str:
    """What an exception says, in a line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def on_gpu() -> bool:
    """Whether JAX's default device is a GPU."""
    return jax.default_backend() == "gpu"


@functools.lru_cache(maxsize=1)
def input_sets(row: Row) -> list[tuple[jax.Array, ...]]:
    """Arguments of a row, the same for every library: as many sets as it takes to fill the cache."""
    count = min(16, math.ceil(CACHE_BYTES / row.bytes)) if on_gpu() else 1
    keys = jax.random.split(jax.random.key(0), (count, 3))
    return [arrays_of(row, *three) for three in keys]


def window_size(row: Row) -> tuple[int, int]:
    """The row's window as FlashAttention writes it."""
    return (-1 if row.window is None else row.window, -1)


def installed(package: str) -> None:
    """Refuses unless the package is there."""
    if not on_gpu() or importlib.util.find_spec(package) is None:
        raise Refusal("not installed")


def without(row: Row, *features: str) -> None:
    """Refuses a row that has one of these features."""
    for feature in features:
        if getattr(row, feature):
            raise Refusal(f"takes no {feature}")


def plain_fp8(row: Row) -> None:
    """Refuses all rows but those of FP8 with no feature but a causal mask."""
    if not row.plain or row.dtype != "float8_e4m3fn":
        raise Refusal("takes FP8 without further features alone")


def kernel_seconds(call: Callable[[], object], wait: Callable[[object], object]) -> list[float]:
    """Kernel time of each call of a burst by CUPTI, as jax.experimental.mosaic.gpu.profiler.measure has it for JAX
    alone. CUPTI serves one profiler at a time, and torch.profiler would not let go of it."""
    from jax._src.lib import mosaic_gpu

    extension = mosaic_gpu._mosaic_gpu_ext
    wait(call())
    extension._cupti_init()
    try:
        for result in [call() for _ in range(BURST)]:
            wait(result)
    finally:
        kernels = extension._cupti_get_timings(True)
    per_call = len(kernels) // BURST
    assert per_call * BURST == len(kernels) > 0, f"{len(kernels)} kernels in {BURST} calls"
    return [
        sum(milliseconds for _, milliseconds in kernels[i : i + per_call]) * 1e-3
        for i in range(0, len(kernels), per_call)
    ]


# Functions in JAX.


def ours(row: Row) -> Callable:
    """jax_flash.attention, or attention_with_kv_cache."""
    options = {"causal": row.causal, "window_size": window_size(row), "softcap": row.softcap}
    if row.kv_cache:
        return lambda q, k, v, lengths, pages=None: jax_flash.attention_with_kv_cache(
            q, k, v, cache_seqlens=lengths, page_table=pages, **options
        )
    call = functools.partial(jax_flash.attention, **options)
    if not row.packed:
        return call
    longest = max(row.q_lengths)
    return lambda q, k, v, cu: call(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest
    )


def ours_quantising(row: Row) -> Callable:
    """`ours` of q and k in FP8, and of v in bfloat16, which a user quantises by a constant scale."""
    plain_fp8(row)
    call = ours(row)
    return lambda q, k, v: call(q, k, quantised(v), v_descale=V_UNIT)


def ours_of_one_dtype(row: Row) -> Callable:
    """`ours` of k and v in the dtype of q, where a row has FP8 ones."""
    if not row.kv_dtype:
        raise Refusal("q, k and v have one dtype")
    return ours(row)


def quantised(v: jax.Array) -> jax.Array:
    """v in FP8, in units of V_UNIT."""
    largest = float(jnp.finfo(jnp.float8_e4m3fn).max)
    return jnp.clip(v / V_UNIT, -largest, largest).astype(jnp.float8_e4m3fn)


def jax_nn(row: Row, implementation: str | None = None) -> Callable:
    """jax.nn.dot_product_attention: by cuDNN on a GPU, XLA on the CPU, unless it is named. It has no packed sequences,
    and takes a cache as k and v, with lengths where it is not full."""
    without(row, "packed", "softcap", "kv_dtype", "page_size")
    call = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=row.causal,
        local_window_size=None if row.window is None else (row.window, 0 if row.causal else row.kv_lengths[0]),
        implementation=implementation or ("cudnn" if on_gpu() else "xla"),
    )
    if not row.kv_cache:
        return call
    if row.causal:
        raise Refusal("its causal mask has the first query at the first key")
    full = len({*row.kv_lengths}) == 1
    return lambda q, k, v, lengths: call(q, k, v, key_value_seq_lengths=None if full else lengths)


def xla(row: Row) -> Callable:
    """jax.nn.dot_product_attention by XLA, over a cache: of few queries it can hold all scores."""
    if not row.kv_cache:
        raise Refusal("measured over a KV cache alone")
    return jax_nn(row, "xla")


def cudnn_fp8(row: Row) -> Callable:
    """cuDNN in FP8, which JAX has under no public name: a descale for each tensor, the result in FP8 too."""
    if not on_gpu():
        raise Refusal("not installed")
    plain_fp8(row)
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention, fp8_params_keys

    def attention(q, k, v, q_descale=1.0, k_descale=1.0, v_descale=1.0):
        scales = {
            **dict.fromkeys(fp8_params_keys, 1.0),  # most are of the backward pass
            **{"descale_q": q_descale, "descale_k": k_descale, "descale_v": v_descale},
            **{"scale_s": 256.0, "descale_s": 1 / 256},  # probabilities, which end at 1, use FP8's range to 448
            "scale_o": CUDNN_OUT_SCALE,
        }
        out, _, _ = dot_product_attention(
            q,
            k,
            v,
            scale=row.head_dim**-0.5,
            mask_type=MaskType.CAUSAL if row.causal else MaskType.NO_MASK,
            use_fp8=True,
            fp8_params={name: jnp.full((1, 1, 1, 1), scale, jnp.float32) for name, scale in scales.items()},
        )
        return out

    return attention


def dew_flash_attn(row: Row) -> Callable:
    """FlashAttention-3 as dew_flash_attn packs it for JAX."""
    installed("dew_flash_attn")
    without(row, "softcap", "kv_dtype", "kv_cache")
    from dew_flash_attn import flash_mha, flash_mha_varlen

    options = {"is_causal": row.causal, "window_size": window_size(row)}
    if not row.packed:
        return functools.partial(flash_mha, **options)
    return lambda q, k, v, cu: flash_mha_varlen(q, k, v, cu, max(row.q_lengths), **options)


def flash_attn3_jax(row: Row) -> list[Callable]:
    """FlashAttention-3 as flash_attn3_jax packs it for JAX: of few queries a function for each of SPLITS."""
    installed("flash_attn3_jax")
    without(row, "softcap", "kv_dtype")
    from flash_attn3_jax import flash_mha, flash_mha_varlen, flash_mha_with_kvcache

    options = {"is_causal": row.causal, "window_size": window_size(row)}
    if row.packed:
        longest = max(row.q_lengths)
        options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        return [lambda q, k, v, cu: flash_mha_varlen(q, k, v, cu, **options)]
    if row.q_lengths == row.kv_lengths and not row.kv_cache:
        return [functools.partial(flash_mha, **options)]
    all_keys = jnp.asarray(row.kv_lengths, jnp.int32)

    def over_cache(num_splits, q, k, v, lengths=all_keys, pages=None):
        return flash_mha_with_kvcache(
            q, k, v, cache_seqlens=lengths, page_table=pages, num_splits=num_splits, **options
        )

    return [functools.partial(over_cache, num_splits) for num_splits in SPLITS]


def pallas(row: Row) -> Callable:
    """The attention that JAX ships in Pallas for Mosaic GPU. It has no scale: q is scaled beforehand."""
    if not on_gpu():
        raise Refusal("not installed")
    without(row, "packed", "softcap", "window", "kv_dtype", "kv_cache")
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(
        block_q=64,
        block_kv=64 if row.head_dim > 128 else 128,
        max_concurrent_steps=2,
        use_schedule_barrier=True,
        causal=row.causal,
    )
    return lambda q, k, v: attention_mgpu.attention(q, k, v, config)


def jax_timer(function: Callable, sets: list[tuple]) -> tuple[Result, Timer]:
    """How to compute the result of a JAX function of the first set, and its timer."""
    compiled = jax.jit(lambda sets: [function(*arguments) for arguments in sets]).lower(sets).compile()

    def on_cpu():
        times = []
        for _ in range(BURST):
            start = time.perf_counter()
            jax.block_until_ready(compiled(sets))
            times.append((time.perf_counter() - start) / len(sets))
        return times

    def on_a_gpu():
        times = kernel_seconds(lambda: compiled(sets), jax.block_until_ready)
        return [seconds / len(sets) for seconds in times]

    return lambda: compiled(sets)[0], on_a_gpu if on_gpu() else on_cpu


def quantising_timer(function: Callable, sets: list[tuple]) -> tuple[Result, Timer]:
    """jax_timer of a function that quantises v of bfloat16, less the time of quantising alone, measured before it."""
    sets = [(q, k, v.astype(jnp.bfloat16)) for q, k, v in sets]
    result, whole = jax_timer(function, sets)
    _, alone = jax_timer(lambda q, k, v: quantised(v), sets)

    def difference():
        quantising = statistics.median(alone())
        return [seconds - quantising for seconds in whole()]

    return result, difference


def one_dtype_timer(function: Callable, sets: list[tuple]) -> tuple[Result, Timer]:
    """jax_timer; k and v are widened to the dtype of q beforehand."""
    return jax_timer(function, [(q, k.astype(q.dtype), v.astype(q.dtype), *rest) for q, k, v, *rest in sets])


def cudnn_fp8_timer(function: Callable, sets: list[tuple]) -> tuple[Result, Timer]:
    """jax_timer; the result is divided by its scale afterwards."""
    result, timer = jax_timer(function, sets)
    return lambda: result().astype(jnp.float32) / CUDNN_OUT_SCALE, timer


def pallas_timer(function: Callable, sets: list[tuple]) -> tuple[Result, Timer]:
    """jax_timer; q is scaled beforehand."""
    return jax_timer(function, [((q * q.shape[-1] ** -0.5).astype(q.dtype), *rest) for q, *rest in sets])


def medians(timers: Mapping[Name, Timer], rounds: int) -> dict[Name, float]:
    """The median time of each timer in seconds, all bursts taking turns."""
    times: dict[Name, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            time.sleep(PAUSE)
            times[name] += timer()
    return {name: statistics.median(values) for name, values in times.items()}


def fastest_timer(functions: list[Callable], sets: list[tuple]) -> tuple[Result, Timer]:
    """jax_timer of the fastest of some functions, found by a burst of each when first asked: `prepare` runs none."""
    candidates = [jax_timer(function, sets) for function in functions]

    @functools.cache
    def fastest():
        seconds = medians({number: timer for number, (_, timer) in enumerate(candidates)}, 1)
        return candidates[min(seconds, key=seconds.__getitem__)]

    return lambda: fastest()[0](), lambda: fastest()[1]()


# In PyTorch.


def fa3_fwd(row: Row) -> Callable:
    """FlashAttention-3 for PyTorch. It transposes FP8 values itself."""
    installed("fa3_fwd_interface")
    without(row, "kv_dtype")
    from fa3_fwd_interface import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

    options = {"causal": row.causal, "window_size": window_size(row), "softcap": row.softcap}
    if row.kv_cache:
        return lambda q, k, v, lengths, pages=None: flash_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths, page_table=pages, **options
        )
    if not row.packed:
        return functools.partial(flash_attn_func, **options)
    longest = max(row.q_lengths)
    return lambda q, k, v, cu: flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, **options)


def torch_timer(function: Callable, sets: list[tuple]) -> tuple[Result, Timer]:
    """How to compute the result of a PyTorch function of the first set, and its timer."""
    import torch

    def to_torch(x):
        if x.dtype == jnp.float8_e4m3fn:
            return torch.from_dlpack(x.view(jnp.uint8)).view(torch.float8_e4m3fn)
        return torch.from_dlpack(x)

    torch_sets = [tuple(map(to_torch, arguments)) for arguments in sets]

    def result():
        out = jnp.from_dlpack(function(*torch_sets[0]).float().contiguous())
        torch.cuda.synchronize()  # JAX reuses the memory of inputs that nobody holds, though PyTorch still reads it
        return out

    def on_a_gpu():
        times = kernel_seconds(
            lambda: [function(*arguments) for arguments in torch_sets], lambda _: torch.cuda.synchronize()
        )
        return [seconds / len(sets) for seconds in times]

    return result, on_a_gpu


LIBRARIES = {
    "jax_flash": (ours, jax_timer),
    "jax_flash, V quantised in the jit": (ours_quantising, quantising_timer),
    "jax_flash, k and v in the dtype of q": (ours_of_one_dtype, one_dtype_timer),
    "FA3 (dew_flash_attn)": (dew_flash_attn, jax_timer),
    "FA3 (flash_attn3_jax)": (flash_attn3_jax, fastest_timer),
    "FA3 (PyTorch)": (fa3_fwd, torch_timer),
    "jax.nn": (jax_nn, jax_timer),
    "XLA": (xla, jax_timer),
    "cuDNN FP8": (cudnn_fp8, cudnn_fp8_timer),
    "Pallas": (pallas, pallas_timer),
}


def prepare(name: str, row: Row) -> tuple[Result, Timer]:
    """How a library computes its result on the first set of a row's inputs, and its timer; what it raises is a refusal.

    It only compiles: where cuDNN first runs, it captures a graph, which calls of other threads to the GPU would spoil.
    """
    library, timer = LIBRARIES[name]
    return timer(library(row), input_sets(row))


# Ceilings of the machine, measured in the same run.


def ceilings() -> dict[str, float]:
    """The rate of a bf16 matrix product by cuBLAS in FLOP/s, and of reading memory in bytes/s."""
    side, bytes_read = 8192, 4 << 30
    matrix = jax.random.normal(jax.random.key(1), (side, side), jnp.bfloat16)
    _, multiply = jax_timer(jnp.matmul, [(matrix, matrix)])
    _, read = jax_timer(lambda x: jnp.max(x, axis=-1), [(jnp.ones((1 << 14, bytes_read >> 16), jnp.float32),)])
    return {
        "bfloat16 matmul 8192, FLOP/s": 2 * side**3 / statistics.median(multiply()),
        "memory read, B/s": bytes_read / statistics.median(read()),
    }
