"""python -m benchmarks host: what a call costs beside its kernel, as a process's first and in a CUDA graph."""

from __future__ import annotations

import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp

import jax_flash
from benchmarks.libraries import jax_timer

_FIRST_CALL = """
import time
import jax, jax.numpy as jnp
import jax_flash
q, k, v = (jax.random.normal(key, (2, 512, 16, 128), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3))
jax.block_until_ready((q, k, v))
start = time.perf_counter()
jax.jit(lambda *arrays: jax_flash.attention(*arrays, implementation="cuda"))(q, k, v).block_until_ready()
print(time.perf_counter() - start)
"""

CHAIN = 400


def first_call_seconds() -> dict[str, float]:
    """Tracing, NVRTC, XLA and the kernel: with an empty cache of kernels, and with the one that this left."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        # NVRTC keeps a cache of its own too.
        environment = {**os.environ, "JAX_FLASH_CACHE_DIR": folder, "CUDA_CACHE_DISABLE": "1"}
        for cache in ("an empty", "a filled"):
            command = [sys.executable, "-c", _FIRST_CALL]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            seconds[f"first call, {cache} cache of kernels"] = float(done.stdout)
    return seconds


def chained_call_seconds() -> dict[str, float]:
    """Wall time less kernel time of each of 400 dependent calls in one jit, which XLA puts into a CUDA graph."""
    q, k, v = (jax.random.normal(key, (1, 256, 8, 64), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3))
    functions = {
        "jax_flash": functools.partial(jax_flash.attention, implementation="cuda"),
        "cuDNN": functools.partial(jax.nn.dot_product_attention, implementation="cudnn"),
        "an addition": lambda q, k, v: jax.lax.optimization_barrier(q + k),  # or XLA would make one kernel of all
    }
    seconds = {}
    for name, function in functions.items():

        def chain(q, k, v, function=function):
            for _ in range(CHAIN):
                q = function(q, k, v)
            return q

        compute, kernel_timer = jax_timer(chain, [(q, k, v)])
        walls = []
        for _ in range(20):
            start = time.perf_counter()
            compute().block_until_ready()
            walls.append(time.perf_counter() - start)
        between = statistics.median(walls) - statistics.median(kernel_timer())
        seconds[f"call in a CUDA graph, beside its kernel, {name}"] = between / CHAIN
    return seconds


def measured() -> dict[str, float]:
    """Both, by what they are."""
    return first_call_seconds() | chained_call_seconds()
