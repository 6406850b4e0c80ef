"""Self-attention as a `flax.nnx` module."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jax_flash.nn import _common

try:
    from flax import nnx
except ModuleNotFoundError as error:
    raise ImportError(_common.NEEDS_FLAX.format(__name__)) from error


class FlashAttention(nnx.Module):
    """Multi-head self-attention of dense or packed sequences: query, key, value and out projections around attention.

    Parameters have the names and shapes of `flax.nnx.MultiHeadAttention`, whose checkpoints load as they are. On a GPU
    say dtype=jnp.bfloat16 or jnp.float16, or fp8=True, for its kernels take no float32.

    Args:
      num_heads: query heads.
      in_features: features of x.
      rngs: of the initial parameters.
      num_kv_heads: as in `jax_flash.nn.linen.FlashAttention`; so are all that follow.

    Raises:
      TypeError, ValueError: an argument is wrong; names it, what was expected and what came.
      NotImplementedError: no kernel here serves it, such as float8_e4m3fn as dtype.

    Example:
      layer = jax_flash.nn.nnx.FlashAttention(8, 512, num_kv_heads=2, causal=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
      x = jnp.ones((4, 1024, 512), jnp.bfloat16)
      y = layer(x)  # (4, 1024, 512)
      packed = layer(x[0], cu_seqlens=jnp.array([0, 600, 1024], jnp.int32))  # (1024, 512)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        rngs: nnx.Rngs,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        out_features: int | None = None,
        causal: bool = False,
        window_size: tuple[int | None, int | None] | None = (-1, -1),
        softcap: float = 0.0,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        fp8: bool = False,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = _common.KERNEL_INIT,
        bias_init: Initializer = _common.BIAS_INIT,
        implementation: str | None = None,
    ):
        self.in_features = in_features
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.out_features = out_features
        self.causal = causal
        self.window_size = window_size
        self.softcap = softcap
        self.dtype = dtype
        self.fp8 = fp8
        self.implementation = implementation

        shapes = _common.projections(self, in_features, "in_features")

        def linear(name):
            inputs, outputs = shapes[name]
            return nnx.LinearGeneral(
                inputs,
                outputs,
                axis=tuple(range(-len(inputs), 0)),
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                bias_init=bias_init,
                rngs=rngs,
            )

        self.query = linear("query")
        self.key = linear("key")
        self.value = linear("value")
        self.out = linear("out")

    def __call__(
        self, x: jax.Array, *, cu_seqlens: jax.Array | None = None, seqused: jax.Array | None = None
    ) -> jax.Array:
        """Attention of each sequence of x to itself: `jax_flash.nn.linen.FlashAttention.__call__` says all.

        Args:
          x: dense (B, S, in_features) or packed (T, in_features), floating-point.
          cu_seqlens: int32 (B + 1,), for packed x.
          seqused: int32 (B,).

        Returns:
          (B, S, out_features) or (T, out_features), in dtype.
        """
        _common.check_arguments(x, cu_seqlens, seqused)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must have in_features, {self.in_features}, features, got shape {x.shape}.")
        layers = {"query": self.query, "key": self.key, "value": self.value, "out": self.out}
        return _common.self_attention(self, layers, x, cu_seqlens, seqused)
