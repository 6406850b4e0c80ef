"""python -m benchmarks accuracy: how far FP8 results lie from float64, by the length of the sequences.

Each library computes attention of all query rows, with inputs quantised as it takes them; a sample of the rows is
compared with float64 over the numbers that were stored, so what counts is the computation. Where rotating q and k is
compared with not doing so, quantising them counts too: there float64 takes q and k as they were before (for the
output; of the log-sum-exp quantising never counts).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import jax_flash
from benchmarks.libraries import LIBRARIES, reason
from benchmarks.suites import dense

HEADS, HEAD_DIM = 2, 128
LENGTHS = (2048, 16384, 65536, 131072)

SAMPLE = 512
"""Query rows that are compared, evenly spread."""

Arrays = Sequence[jax.Array]
Stored = Iterable[Arrays]
"""q, k and v, and what one unit of each is worth."""


# The inputs: each changes random normal q, k and v.


def mean_of_one(q: jax.Array, k: jax.Array, v: jax.Array) -> Arrays:
    """Values that are not centred, whose average does not shrink with the length."""
    return q, k, v + 1


def outliers(*arrays: jax.Array) -> Arrays:
    """Ten times as large, 0.1 % of the entries."""
    keys = jax.random.split(jax.random.key(1), len(arrays))
    return [jnp.where(jax.random.bernoulli(key, 1e-3, x.shape), 10 * x, x) for key, x in zip(keys, arrays, strict=True)]


def outlier_channels(q: jax.Array, k: jax.Array, v: jax.Array) -> Arrays:
    """Twenty times as large, 4 channels of q and k; then a smaller q, for a deviation of the scores of 3.5."""
    factors = jnp.ones(HEAD_DIM).at[jnp.asarray([3, 37, 70, 121])].set(20)
    return q * factors / 20, k * factors, v


# How they are stored.


def by_head(*arrays: jax.Array) -> Stored:
    """FP8 with a scale for each head."""
    return zip(*map(jax_flash.quantize_fp8, arrays), strict=True)


def by_tensor(*arrays: jax.Array) -> Stored:
    """FP8 with a scale for each array."""
    return zip(*(jax_flash.quantize_fp8(x, "tensor") for x in arrays), strict=True)


def rotated(q: jax.Array, k: jax.Array, v: jax.Array) -> Stored:
    """FP8 with a scale for each head, q and k rotated before."""
    rotate = functools.partial(jax_flash.quantize_fp8, hadamard=True)
    return zip(rotate(q), rotate(k), jax_flash.quantize_fp8(v), strict=True)


def in_bfloat16(*arrays: jax.Array) -> Stored:
    """Not FP8, to see what it costs; there is no scale."""
    return [x.astype(jnp.bfloat16) for x in arrays], ()


# The rows.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Inputs, and who is compared on them."""

    change: Callable[..., Arrays]
    columns: Mapping[str, tuple[str, Callable[..., Stored]]]
    """The library that computes a column, and how its inputs are stored."""
    lengths: tuple[int, ...] = LENGTHS
    truth_before_quantising: bool = False
    """Whether float64 takes q and k as they were before."""


LIBRARY_COLUMNS = {
    "jax_flash": ("jax_flash", by_head),
    "FA3 (PyTorch)": ("FA3 (PyTorch)", by_head),
    "cuDNN FP8": ("cuDNN FP8", by_tensor),
    "FA3 (dew_flash_attn), bfloat16": ("FA3 (dew_flash_attn)", in_bfloat16),
}
RETURNS_LSE = {"jax_flash": "return_lse", "FA3 (PyTorch)": "return_attn_probs"}
"""Libraries whose log-sum-exp is compared too, and the option by which they return it."""

INPUTS = {
    "V of mean 1": Inputs(change=mean_of_one, columns=LIBRARY_COLUMNS),
    "outliers": Inputs(change=outliers, columns=LIBRARY_COLUMNS),
    "outlier channels": Inputs(
        change=outlier_channels,
        columns={"jax_flash": ("jax_flash", by_head), "jax_flash, Hadamard": ("jax_flash", rotated)},
        lengths=LENGTHS[:2],
        truth_before_quantising=True,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One sequence of a length."""

    inputs: str
    """Of INPUTS."""
    length: int

    def __str__(self) -> str:
        return f"{self.inputs} S{self.length}"


ROWS = tuple(Row(inputs=name, length=length) for name, inputs in INPUTS.items() for length in inputs.lengths)


def arrays_of(row: Row) -> Arrays:
    """q, k and v of a row in float32, before they are stored."""
    keys = jax.random.split(jax.random.key(0), 3)
    return INPUTS[row.inputs].change(*(jax.random.normal(key, (1, row.length, HEADS, HEAD_DIM)) for key in keys))


# Measuring them.


def measure(row: Row) -> dict:
    """The relative error of each column, the greatest error of each log-sum-exp, and why others have none."""
    inputs, arrays = INPUTS[row.inputs], arrays_of(row)
    sample = np.linspace(0, row.length - 1, min(SAMPLE, row.length), dtype=int)

    @functools.cache  # by far the longest of all, and the same for several columns
    def truth_of(store, before_quantising):
        q, k, v = dequantised(*store(*arrays))
        if before_quantising:
            q, k, _ = dequantised(arrays)
        return exact(q[sample], k, v)

    errors, lse_errors, refused = {}, {}, {}
    for column, (library, store) in inputs.columns.items():
        try:
            out = result(library, row, *store(*arrays))[0, sample]
        except Exception as error:  # whatever a peer raises is an answer
            refused[column] = reason(error)
            continue
        truth, _ = truth_of(store, inputs.truth_before_quantising)
        errors[column] = float(np.linalg.norm(np.asarray(out, np.float64) - truth) / np.linalg.norm(truth))

    _, truth = truth_of(by_head, False)
    for library in RETURNS_LSE:
        try:
            lse = result(library, row, *by_head(*arrays), lse=True)[0][:, sample]
        except Exception as error:
            refused[f"log-sum-exp of {library}"] = reason(error)
            continue
        lse_errors[library] = float(np.abs(np.asarray(lse, np.float64) - truth).max())
    return {**dataclasses.asdict(row), "errors": errors, "lse": lse_errors, "refused": refused}


def result(library: str, row: Row, stored: Arrays, descales: Arrays, *, lse: bool = False) -> jax.Array:
    """What a library gives for stored q, k and v: out, or its log-sum-exp."""
    function, timer = LIBRARIES[library]
    call = function(dense("float8_e4m3fn", 1, row.length, HEADS, HEAD_DIM))

    def attention(q, k, v, *descales):
        options = dict(zip(("q_descale", "k_descale", "v_descale"), descales, strict=False))
        return call(q, k, v, **options, **{RETURNS_LSE[library]: True})[1] if lse else call(q, k, v, **options)

    compute, _ = timer(attention, [(*stored, *descales)])
    return compute()


def dequantised(stored: Arrays, descales: Arrays = ()) -> list[np.ndarray]:
    """Stored q, k and v of the only sequence, each (S, H, D), in float64."""
    pairs = itertools.zip_longest(stored, descales, fillvalue=1.0)
    return [(np.asarray(x, np.float64) * np.asarray(descale, np.float64)[..., None])[0] for x, descale in pairs]


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """out (Sq, H, D) and log-sum-exp (H, Sq), in float64."""
    q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
    scores = q @ k.swapaxes(1, 2)
    scores *= HEAD_DIM**-0.5
    top = scores.max(-1, keepdims=True)
    scores -= top
    weights = np.exp(scores, out=scores)
    total = weights.sum(-1, keepdims=True)
    return (weights @ v / total).swapaxes(0, 1), (top + np.log(total))[..., 0]
