"""Causal self-attention in FP16, and its gradients, as a training step uses it."""

import jax
import jax.numpy as jnp

import jax_flash

BATCH, LENGTH, HEADS, HEAD_DIM = 2, 512, 16, 128


def loss(attention):
    """A function whose gradient pulls the attended values towards a target."""

    def of(q, k, v, target):
        out = attention(q, k, v, causal=True)
        return jnp.square(out.astype(jnp.float32) - target).sum(), out

    return jax.jit(jax.value_and_grad(of, argnums=(0, 1, 2), has_aux=True))


keys = jax.random.split(jax.random.key(0), 4)
shape = (BATCH, LENGTH, HEADS, HEAD_DIM)
q, k, v, target = (jax.random.normal(key, shape, jnp.float16) for key in keys)

(_, out), gradients = loss(jax_flash.attention)(q, k, v, target)
(_, expected), expected_gradients = loss(jax_flash.reference.attention)(q, k, v, target)


def error(x, y):
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.abs(x - y).max() / jnp.abs(y).max()


print(f"{out.dtype} {out.shape} on {out.device.device_kind}: at most {error(out, expected):.1e} of the largest value off")
errors = [error(x, y) for x, y in zip(gradients, expected_gradients, strict=True)]
print(f"gradients of q, k, v: at most {max(errors):.1e} of the largest value off")
assert max(error(out, expected), *errors) < 0.01
