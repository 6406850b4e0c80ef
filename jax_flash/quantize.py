"""To FP8: scales, and the rotation that spreads outliers of q and k over their channels. Plain jnp, which jit fuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash import canonical, validate

LARGEST = float(jnp.finfo(jnp.float8_e4m3fn).max)
"""448. XLA's cast makes NaN of what rounds to more."""

LEAST_UNIT = float(jnp.finfo(jnp.float32).smallest_normal)
"""A smaller descale would be taken for 0 where subnormals are flushed, and divided by."""


def quantize_fp8(
    x: jax.Array,
    granularity: str = "head",
    *,
    cu_seqlens: jax.Array | None = None,
    seqused: jax.Array | None = None,
    hadamard: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """x as float8_e4m3fn and what one unit of it is worth, so that x is about x8 * descale.

        q8, q_descale = jax_flash.quantize_fp8(q, hadamard=True)
        k8, k_descale = jax_flash.quantize_fp8(k, hadamard=True)
        v8, v_descale = jax_flash.quantize_fp8(v)
        out = jax_flash.attention(q8, k8, v8, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)

    The largest finite |x| of a scale becomes 448, the largest FP8 number; all is computed in float32. A NaN stays one,
    an infinity becomes 448 or -448, and neither counts for the scale. Where all is 0, or below 5e-36, x8 is 0 and
    descale 1. Call it inside the jit of the attention: XLA then fuses it.

    With `hadamard` each row is first rotated: multiplied with an orthogonal matrix, always the same one for a head dim.
    Scores do not change where both q and k are rotated, and a few channels of outliers, whose rounding errors would be
    most of a score's, are spread over many. Rotate q and k or neither, as where q is not quantised; never v, whose
    channels are those of the output.
    A NaN or an infinity then spreads over the channels of its row.

    Attention of FP8 refuses to be differentiated. A gradient of this function alone is that of its operations: the cast
    passes it on rounded to FP8, which is of little use.

    Args:
      x: queries, keys or values, dense (B, S, H, D) or packed (T, H, D), of any D; float16, bfloat16 or float32.
      granularity: what shares a scale: "tensor" all of x, "batch" a sequence, "head" a head of a sequence.
      cu_seqlens: int32 (B + 1,), for packed x: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]; any values, read
        as `attention` reads them. Needed unless granularity is "tensor". Rows of no sequence count for no scale, and
        are stored in units of 1. Without cu_seqlens all rows count.
      seqused: int32 (B,): only the first seqused[b] rows of each sequence count for its scale.
      hadamard: whether to rotate; the same for q and k.

    Returns:
      x8, float8_e4m3fn of the shape of x, and descale, float32: () for "tensor", (B,) for "batch", (B, H) for "head".
      `attention` takes any of these.

    Raises:
      TypeError, ValueError: an argument is wrong; raised while tracing, names the argument, what was expected and came.

    Source: FlashAttention-3, section 3.3, https://arxiv.org/abs/2407.08608, which calls the rotation incoherent
    processing; its idea is that of QuIP, https://arxiv.org/abs/2307.13304, and QuaRot, https://arxiv.org/abs/2404.00456.
    """
    validate.check_quantization(x, granularity, cu_seqlens, seqused, hadamard)
    x = rotated(x) if hadamard else jnp.asarray(x, jnp.float32)
    largest = jnp.where(jnp.isfinite(x), jnp.abs(x), 0).max(-1)
    if cu_seqlens is not None:
        bounds, segment = (y[0] for y in canonical.segments(jnp.asarray(cu_seqlens)[None], x.shape[0]))
    if seqused is not None:
        row = jnp.arange(x.shape[-3], dtype=jnp.int32)
        if cu_seqlens is None:
            used = row < jnp.asarray(seqused)[:, None]
        else:
            used = row - jnp.pad(bounds, (1, 0))[segment] < jnp.pad(seqused, 1)[segment]
        largest = jnp.where(used[..., None], largest, 0)
    if cu_seqlens is not None:
        # A sequence becomes a dense one of a single row: its largest. Rows of none have indices that are left out.
        sequences = cu_seqlens.shape[0] - 1
        largest = jax.ops.segment_max(largest, segment - 1, sequences, indices_are_sorted=True)[:, None]

    shared = {"tensor": None, "batch": (1, 2), "head": (1,)}[granularity]
    # Reciprocals, for XLA makes products of some quotients and not of others: so jit changes no result.
    unit = largest.max(shared, keepdims=True, initial=0) * (1 / LARGEST)
    unit = jnp.where(unit >= LEAST_UNIT, unit, 1)
    scale = 1 / unit
    if cu_seqlens is not None:
        of_sequence = jnp.broadcast_to(scale, largest.shape)[:, 0]
        scale = jnp.pad(of_sequence, ((1, 1), (0, 0)), constant_values=1)[segment]
    return to_fp8(x * scale[..., None]), unit.squeeze(shared)


def to_fp8(x) -> jax.Array:
    """The nearest float8_e4m3fn of each number: 448 or -448 beyond these, NaN for NaN."""
    return jnp.clip(x, -LARGEST, LARGEST).astype(jnp.float8_e4m3fn)


def rotated(x) -> jax.Array:
    """x (.., D), each row times the same orthogonal matrix, in float32.

    The matrix is diag(signs) @ H / sqrt(n): fixed random signs, then a Walsh-Hadamard matrix for each n channels, n the
    largest power of two that divides D. Before the division its entries are 0, 1 and -1, exact in any dtype, so 16-bit
    x is multiplied by tensor cores without an error but that of adding in float32.
    """
    head_dim = x.shape[-1]
    n = head_dim & -head_dim
    # The legacy generator, whose numbers no version of NumPy may change: keys that were stored must fit later queries.
    signs = np.random.RandomState(0).choice([-1, 1], head_dim)
    blocks: np.ndarray = np.eye(head_dim // n)
    while len(blocks) < head_dim:
        blocks = np.kron(blocks, [[1, 1], [1, -1]])
    matrix = jnp.asarray(signs[:, None] * blocks, x.dtype)
    return jnp.matmul(x, matrix, precision="highest", preferred_element_type=jnp.float32) / n**0.5
