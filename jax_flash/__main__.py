"""python -m jax_flash: three cases, one twice, on the best device here, against the definition; `info`: versions."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

import jax_flash
from jax_flash import canonical, jit, launch, reference
from jax_flash.spec import Call

MIN_CALLS, MIN_SECONDS = 3, 0.3
"""A case is timed over at least so many calls and so much time; the table shows the median."""


# The cases: each makes the arguments of one call of `attention`.

PACKED_LENGTHS = (64, 64, *(38 + i % 5 for i in range(80)), 1680, 32)
"""Tokens of 84 packed sequences as sentences and a document: many of 64 or less, one of 1680; 5040 in all."""


def fp8_packed(rng: np.random.Generator, *, ones: bool) -> dict:
    """84 sequences, packed, in FP8, with a descale for each sequence and head; with `ones` q and k are ones."""
    cu_seqlens = jnp.asarray(np.cumsum([0, *PACKED_LENGTHS]), jnp.int32)
    q, k, v = (_normal(rng, (sum(PACKED_LENGTHS), 16, 128), jnp.float8_e4m3fn) for _ in range(3))
    q_descale, k_descale, v_descale = (
        jnp.asarray(rng.uniform(0.5, 1.5, (len(PACKED_LENGTHS), 16)), jnp.float32) for _ in range(3)
    )
    if ones:
        q, k = jnp.ones_like(q), jnp.ones_like(k)
    return {
        "q": q,
        "k": k,
        "v": v,
        "q_descale": q_descale,
        "k_descale": k_descale,
        "v_descale": v_descale,
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": max(PACKED_LENGTHS),
        "max_seqlen_k": max(PACKED_LENGTHS),
    }


def fp16_causal(rng: np.random.Generator) -> dict:
    """Two sequences of 512 tokens under a causal mask."""
    q, k, v = (_normal(rng, (2, 512, 16, 128), jnp.float16) for _ in range(3))
    return {"q": q, "k": k, "v": v, "causal": True}


def fp16_decode(rng: np.random.Generator) -> dict:
    """One new token against 2048 keys, 8 query heads to a key/value head."""
    q = _normal(rng, (1, 1, 16, 128), jnp.float16)
    k, v = (_normal(rng, (1, 2048, 2, 128), jnp.float16) for _ in range(2))
    return {"q": q, "k": k, "v": v}


CASES: dict[str, Callable[[np.random.Generator], dict]] = {
    "fp8 packed, q and k ones": lambda rng: fp8_packed(rng, ones=True),
    "fp8 packed": lambda rng: fp8_packed(rng, ones=False),
    "fp16 causal": fp16_causal,
    "fp16 decode": fp16_decode,
}


def _normal(rng, shape, dtype) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)


# Running them.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table."""

    case: str
    device: str
    implementation: str
    shape: str
    error: float
    tolerance: float
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the result is within the tolerance; a NaN is not."""
        return self.error <= self.tolerance

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        verdict = "pass" if self.passed else "FAIL"
        numbers = f"{self.error:.2e}", f"{self.tolerance:.2e}", f"{self.seconds * 1e3:.3f} ms"
        return self.case, self.device, self.implementation, self.shape, *numbers, verdict


HEADER = ("case", "device", "implementation", "shape of q; k", "error", "tolerance", "time", "")


def run_case(name: str) -> Row:
    """Runs one case inside jax.jit, checks it and measures it."""
    arguments = CASES[name](np.random.default_rng(0))
    arrays = {name: x for name, x in arguments.items() if isinstance(x, jax.Array)}
    static = {name: x for name, x in arguments.items() if name not in arrays}
    attention = jax.jit(lambda arrays: jax_flash.attention(**arrays, **static))
    out = np.asarray(attention(arrays))
    truth, same_precision = expected(arguments)
    return Row(
        case=name,
        device=jax.devices()[0].device_kind,
        implementation=implementation(arguments),
        shape="; ".join("x".join(map(str, arguments[x].shape)) for x in ("q", "k")),
        error=largest_difference(out, truth),
        tolerance=tolerance(same_precision, truth),
        seconds=wall_time(lambda: attention(arrays)),
    )


def expected(arguments: dict) -> tuple[np.ndarray, np.ndarray]:
    """The result by the definition: in float32, and in the precision that the inputs ask for."""
    call = Call(**arguments)
    attention, operands = canonical.canonical(call)
    narrow = attention.out_dtype  # the dtype of q, bfloat16 for FP8
    forward = jax.jit(reference.forward, static_argnums=(0, 2))
    truth = forward(dataclasses.replace(attention, out_dtype="float32"), operands, None)
    same_precision = forward(attention, operands, narrow)
    return np.asarray(canonical.restore(call, *truth)), np.asarray(canonical.restore(call, *same_precision))


def tolerance(same_precision: np.ndarray, truth: np.ndarray, factor: float = 2) -> float:
    """FlashAttention-3's rule: `factor` errors of the same-precision reference, and twice what rounding costs.

    factor * max|same_precision - truth| + 2 * max|(truth + 0.3 - 0.3) - truth|, that sum in the narrow dtype.
    """
    shift = np.asarray(0.3, same_precision.dtype)
    rounded = truth.astype(same_precision.dtype) + shift - shift
    return factor * largest_difference(same_precision, truth) + 2 * largest_difference(rounded, truth)


def largest_difference(x: np.ndarray, y: np.ndarray) -> float:
    """max|x - y|, 0 for empty arrays."""
    return float(np.abs(x.astype(np.float64) - y.astype(np.float64)).max(initial=0))


def wall_time(call: Callable[[], jax.Array]) -> float:
    """Median seconds from a call to its result; whoever asks has called it before, which compiled it."""
    seconds: list[float] = []
    while len(seconds) < MIN_CALLS or sum(seconds) < MIN_SECONDS:
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def implementation(arguments: dict) -> str:
    """Who serves a call on the default device."""
    platform = jax.default_backend()
    if platform == "gpu":
        return "xla" if launch.why_not_served(*canonical.canonical(Call(**arguments))) else "cuda"
    return "cpu" if platform == "cpu" else "xla"


def run_cases() -> int:
    """Prints the table; the number of cases that failed."""
    rows = [run_case(name) for name in CASES]
    cells = [HEADER, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(
        "error: largest difference from jax_flash.reference in float32; tolerance: FlashAttention-3's rule; "
        "time: median wall time of a call, each waited for."
    )
    return sum(not row.passed for row in rows)


# Info.


def print_info() -> None:
    """Prints versions, devices, who serves here, and what is compiled."""
    print(f"jax_flash {jax_flash.__version__}, jax {jax.__version__}, jaxlib {jaxlib.__version__}")
    print(f"NVRTC: {'not usable (CUDA alone needs it)' if jit.why_no_nvrtc() else jit.compiler_version()}")
    for device in jax.devices():
        capability = getattr(device, "compute_capability", None)
        words = f"{device.device_kind}, compute capability {capability}" if capability else device.device_kind
        print(f"device {device.id}: {words}")
    why_not = launch.why_no_cuda()
    other = "cpu" if jax.default_backend() == "cpu" else "xla"
    print(f"implementation: {other}, not cuda: {why_not}" if why_not else "implementation: cuda")
    folder = jit.cache_folder()
    sizes = [file.stat().st_size for file in folder.iterdir()] if folder.is_dir() else []
    print(f"kernel cache: {folder}, {len(sizes)} kernels, {sum(sizes)} bytes")


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m jax_flash", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["info"], help="prints what is installed here, runs nothing")
    if parser.parse_args(arguments).command == "info":
        print_info()
        return 0
    return 1 if run_cases() else 0


if __name__ == "__main__":
    sys.exit(main())
