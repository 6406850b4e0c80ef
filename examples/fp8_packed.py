"""FP8 attention over packed sequences of very different lengths, each head of each sequence with a scale of its own."""

import jax
import jax.numpy as jnp
import numpy as np

import jax_flash

HEADS, HEAD_DIM = 16, 128

# 84 sequences lie one after another, 5040 tokens in all: 0, 64, 128, ..., 5040.
lengths = np.array([64, 64, *(38 + i % 5 for i in range(80)), 1680, 32])
cu_seqlens = jnp.asarray(np.concatenate([[0], np.cumsum(lengths)]), jnp.int32)


@jax.jit
def attend(q, k, v, cu_seqlens):
    (q, q_descale), (k, k_descale), (v, v_descale) = (
        jax_flash.quantize_fp8(x, cu_seqlens=cu_seqlens) for x in (q, k, v)
    )
    arguments = {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "q_descale": q_descale,
        "k_descale": k_descale,
        "v_descale": v_descale,
    }
    out = jax_flash.attention(q, k, v, **arguments, max_seqlen_q=1680, max_seqlen_k=1680)
    return out, jax_flash.reference.attention(q, k, v, **arguments, out_dtype=jnp.float32)


seeds = jax.random.split(jax.random.key(0), 3)
q, k, v = (jax.random.normal(seed, (5040, HEADS, HEAD_DIM)) for seed in seeds)
ones = jnp.ones_like(q)

for name, queries, keys in (("random", q, k), ("ones", ones, ones)):
    out, expected = attend(queries, keys, v, cu_seqlens)
    error = np.abs(np.asarray(out, np.float32) - expected).max()
    device = out.device.device_kind
    print(f"q and k {name}: {out.dtype} {out.shape} on {device}: at most {error:.1e} from the reference")
    assert error < 0.05
