"""Causal self-attention in FP16 and its gradients, as a training step uses them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jax_flash

BATCH, LENGTH, HEADS, HEAD_DIM = 2, 512, 16, 128


@functools.partial(jax.jit, static_argnames="attention")
def step(q, k, v, target, *, attention):
    """What causal attention gives, and the gradients that would bring it closer to `target`."""

    def loss(q, k, v):
        out = attention(q, k, v, causal=True)
        return jnp.square(out.astype(jnp.float32) - target).sum(), out

    (_, out), (dq, dk, dv) = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return {"out": out, "dq": dq, "dk": dk, "dv": dv}


keys = jax.random.split(jax.random.key(0), 4)
shape = (BATCH, LENGTH, HEADS, HEAD_DIM)
arrays = [jax.random.normal(key, shape, jnp.float16) for key in keys]

results = step(*arrays, attention=jax_flash.attention)
expected = step(*arrays, attention=jax_flash.reference.attention)

for name, x in results.items():
    device = x.device.device_kind
    x, y = np.asarray(x, np.float32), np.asarray(expected[name], np.float32)
    error = np.abs(x - y).max() / np.abs(y).max()
    print(f"{name} {x.shape} on {device}: at most {error:.1e} of the largest value from the reference")
    assert error < 0.01
