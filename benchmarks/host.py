"""python -m benchmarks host: what a call costs beside its kernel, as a process's first and in a CUDA graph."""

from __future__ import annotations

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

CHAIN = 100


def first_call_seconds() -> dict[str, float]:
    """Tracing, NVRTC, XLA and the kernel: with an empty cache of kernels, and with the one that this left."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "JAX_FLASH_CACHE_DIR": folder}
        for cache in ("empty", "filled"):
            command = [sys.executable, "-c", _FIRST_CALL]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            seconds[f"first call, {cache} cache, s"] = float(done.stdout)
    return seconds


def chained_call_seconds() -> dict[str, float]:
    """Wall time and kernel time of each of 100 dependent calls in one jit, which XLA puts into a CUDA graph."""
    q, k, v = (jax.random.normal(key, (1, 256, 8, 64), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3))

    def chain(q, k, v):
        for _ in range(CHAIN):
            q = jax_flash.attention(q, k, v, implementation="cuda")
        return q

    _, timer = jax_timer(chain, [(q, k, v)])
    compiled = jax.jit(chain).lower(q, k, v).compile()
    walls = []
    for _ in range(20):
        start = time.perf_counter()
        compiled(q, k, v).block_until_ready()
        walls.append(time.perf_counter() - start)
    return {
        "call in a chain, wall, s": statistics.median(walls) / CHAIN,
        "call in a chain, kernel, s": statistics.median(timer()) / CHAIN,
    }


def main() -> None:
    """Prints both."""
    for name, value in {**first_call_seconds(), **chained_call_seconds()}.items():
        print(f"{name}: {value:.3g}")
