"""Partial results of the same queries over disjoint keys, joined into one. Plain jnp, which jit fuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_flash import validate


def merge(out_a: jax.Array, lse_a: jax.Array, out_b: jax.Array, lse_b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention over the keys of a and those of b, from the results of each; differentiable in all four.

        shared = jax_flash.attention(q, prefix_k, prefix_v, return_lse=True)
        own = jax_flash.attention(q, k, v, causal=True, return_lse=True)
        out, lse = jax_flash.merge(*shared, *own)

    Computed in float32. Where a query saw no key in one of them, lse -inf, the result is that of the other exactly,
    whatever out holds there; where in neither, it is 0 and -inf. Sinks must have been given to one of them only.

    Args:
      out_a: (B, Sq, H, Dv) or packed (T, H, Dv); float16, bfloat16 or float32.
      lse_a: float32 (B, H, Sq) or (H, T): the log-sum-exp that came with out_a.
      out_b: of the shape of out_a.
      lse_b: of the shape of lse_a.

    Returns:
      out, of the dtype that those of out_a and out_b promote to, and lse, float32.

    Raises:
      TypeError, ValueError: an argument is wrong; raised while tracing, names the argument, what was expected and came.
    """
    validate.check_partial_results(out_a, lse_a, out_b, lse_b)
    seen_a, seen_b = lse_a != -jnp.inf, lse_b != -jnp.inf
    seen = seen_a | seen_b
    top = jax.lax.stop_gradient(jnp.where(seen, jnp.maximum(lse_a, lse_b), 0))

    def weight(lse, seen):
        """Relative to the larger; what is not seen is finite in the inner `where`, so that no gradient is NaN."""
        return jnp.where(seen, jnp.exp(jnp.where(seen, lse, top) - top), 0)

    weight_a, weight_b = weight(lse_a, seen_a), weight(lse_b, seen_b)
    total = jnp.where(seen, weight_a + weight_b, 1)
    out = _part(out_a, seen_a, weight_a / total) + _part(out_b, seen_b, weight_b / total)
    lse = jnp.where(seen, top + jnp.log(total), -jnp.inf)
    return out.astype(jnp.promote_types(out_a.dtype, out_b.dtype)), lse


def _part(out, seen, share):
    seen, share = (jnp.swapaxes(x, -1, -2)[..., None] for x in (seen, share))  # (.., H, rows) as (.., rows, H, 1)
    return jnp.where(seen, out.astype(jnp.float32), 0) * share
