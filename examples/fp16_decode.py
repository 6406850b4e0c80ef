"""One step of decoding in FP16: a new token attends to the 2048 before it, 8 query heads to each key/value head."""

import jax
import jax.numpy as jnp
import numpy as np

import jax_flash

HEADS, KV_HEADS, HEAD_DIM, MAX_LENGTH = 16, 2, 128, 2048


@jax.jit
def decode(q, k, v, length):
    """Attention of one token to the first `length` rows of k and v; the length may change without a recompilation."""
    return jax_flash.attention(q, k, v, seqused_k=length[None])


keys = jax.random.split(jax.random.key(0), 3)
q = jax.random.normal(keys[0], (1, 1, HEADS, HEAD_DIM), jnp.float16)
k, v = (jax.random.normal(key, (1, MAX_LENGTH, KV_HEADS, HEAD_DIM), jnp.float16) for key in keys[1:])

for length in (MAX_LENGTH, 100):
    out = decode(q, k, v, jnp.int32(length))
    expected = jax_flash.reference.attention(q, k[:, :length], v[:, :length], out_dtype=jnp.float32)
    error = np.abs(np.asarray(out, np.float32) - expected).max()
    print(f"{length} keys, {out.dtype} {out.shape} on {out.device.device_kind}: at most {error:.1e} from the reference")
    assert error < 1e-3
