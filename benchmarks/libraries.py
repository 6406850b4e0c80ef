"""Who is measured: jax_flash and its peers, each as a function from a row to a timer, or None where it cannot run it.

A timer runs a burst of calls and gives the time of each, in seconds. On a GPU that is kernel time, by CUPTI for JAX
and by CUDA events for PyTorch; on the CPU it is wall time.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

import jax_flash
from benchmarks.suites import Row

BURST = 12
"""Calls of one burst: enough for a median, few enough that the GPU does not throttle."""

Timer = Callable[[], list[float]]


def on_gpu() -> bool:
    """Whether JAX's default device is a GPU."""
    return jax.default_backend() == "gpu"


@functools.lru_cache(maxsize=1)
def inputs(row: Row) -> list[jax.Array]:
    """q, k and v of a row, the same for every library."""
    shape = (row.batch, row.length, row.heads, row.head_dim)
    return [
        jax.random.normal(key, shape, jnp.float32).astype(row.dtype) for key in jax.random.split(jax.random.key(0), 3)
    ]


def jax_timer(function, row: Row) -> Timer:
    """A timer of a JAX function of q, k and v."""
    compiled = jax.jit(function).lower(*inputs(row)).compile()
    jax.block_until_ready(compiled(*inputs(row)))

    def on_cpu():
        times = []
        for _ in range(BURST):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*inputs(row)))
            times.append(time.perf_counter() - start)
        return times

    def by_cupti():
        from jax.experimental.mosaic.gpu import profiler

        _, milliseconds = profiler.measure(compiled, iterations=BURST)(*inputs(row))
        return [t * 1e-3 for t in milliseconds]

    return by_cupti if on_gpu() else on_cpu


def ours(row: Row) -> Timer:
    """jax_flash.attention."""
    return jax_timer(functools.partial(jax_flash.attention, causal=row.causal), row)


def jax_nn(row: Row) -> Timer | None:
    """jax.nn.dot_product_attention: cuDNN on a GPU, XLA on the CPU."""
    if row.dtype == "float8_e4m3fn":
        return None
    implementation = "cudnn" if on_gpu() else "xla"
    return jax_timer(
        functools.partial(jax.nn.dot_product_attention, is_causal=row.causal, implementation=implementation), row
    )


def fa3_jax(row: Row) -> Timer | None:
    """FlashAttention-3 as dew_flash_attn packs it for JAX: 16-bit alone."""
    if not on_gpu() or row.dtype == "float8_e4m3fn" or importlib.util.find_spec("dew_flash_attn") is None:
        return None
    import dew_flash_attn

    return jax_timer(functools.partial(dew_flash_attn.flash_mha, is_causal=row.causal), row)


def fa3_torch(row: Row) -> Timer | None:
    """FlashAttention-3 for PyTorch: FP8 alone, since the rest is measured in JAX. It transposes V itself."""
    if not on_gpu() or row.dtype != "float8_e4m3fn" or importlib.util.find_spec("fa3_fwd_interface") is None:
        return None
    import fa3_fwd_interface
    import torch

    q, k, v = (torch.from_dlpack(x.view(jnp.uint8)).view(torch.float8_e4m3fn) for x in inputs(row))
    call = functools.partial(fa3_fwd_interface.flash_attn_func, q, k, v, causal=row.causal)
    call()

    def by_events():
        torch.cuda.synchronize()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(BURST)]
        for start, end in events:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in events]

    return by_events


LIBRARIES = {"jax_flash": ours, "FA3 (JAX)": fa3_jax, "FA3 (PyTorch)": fa3_torch, "jax.nn": jax_nn}
