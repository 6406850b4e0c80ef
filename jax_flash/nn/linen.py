"""Self-attention as a `flax.linen` module."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jax_flash.nn import _common

try:
    from flax import linen
except ModuleNotFoundError as error:
    raise ImportError(_common.NEEDS_FLAX.format(__name__)) from error


class FlashAttention(linen.Module):
    """Multi-head self-attention of dense or packed sequences: query, key, value and out projections around attention.

    Parameters have the names and shapes of `flax.linen.MultiHeadDotProductAttention`, whose checkpoints load as they
    are. On a GPU say dtype=jnp.bfloat16 or jnp.float16, or fp8=True, for its kernels take no float32.

    Attributes:
      num_heads: query heads.
      num_kv_heads: key and value heads, which divides num_heads; num_heads unless given.
      head_dim: features of a head; a multiple of 8 (16 with fp8) up to 256. The features of x over num_heads unless
        given.
      out_features: features of the output; those of x unless given.
      causal: whether a token sees none after it.
      window_size: (left, right): how many tokens before and after it a token sees; -1 or None is all.
      softcap: scores become softcap * tanh(score / softcap); 0 is off.
      use_bias: whether the projections add one.
      dtype: of the computation; what x and the parameters promote to unless given.
      fp8: whether queries, keys and values are quantised to float8_e4m3fn, by `jax_flash.quantize_fp8` with a scale for
        each head of each sequence, queries and keys rotated. Projections stay in dtype. For inference only: there is
        no gradient.
      param_dtype: of the parameters.
      kernel_init: for the weights of the projections.
      bias_init: for their biases.
      implementation: as in `jax_flash.attention`.

    Example:
      layer = jax_flash.nn.linen.FlashAttention(num_heads=8, num_kv_heads=2, causal=True, dtype=jnp.bfloat16)
      x = jnp.ones((4, 1024, 512), jnp.bfloat16)
      variables = layer.init(jax.random.key(0), x)
      y = layer.apply(variables, x)  # (4, 1024, 512)
      packed = layer.apply(variables, x[0], cu_seqlens=jnp.array([0, 600, 1024], jnp.int32))  # (1024, 512)
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    out_features: int | None = None
    causal: bool = False
    window_size: tuple[int | None, int | None] | None = (-1, -1)
    softcap: float = 0.0
    use_bias: bool = True
    dtype: DTypeLike | None = None
    fp8: bool = False
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = _common.KERNEL_INIT
    bias_init: Initializer = _common.BIAS_INIT
    implementation: str | None = None

    @linen.compact
    def __call__(
        self, x: jax.Array, *, cu_seqlens: jax.Array | None = None, seqused: jax.Array | None = None
    ) -> jax.Array:
        """Attention of each sequence of x to itself.

        Args:
          x: dense (B, S, F) or packed (T, F), floating-point.
          cu_seqlens: int32 (B + 1,), for packed x: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].
          seqused: int32 (B,): only the first seqused[b] rows of each sequence count. They are attended to by no other;
            the output of the rest is the bias of the out projection, or 0.

        Returns:
          (B, S, out_features) or (T, out_features), in dtype.

        Raises:
          TypeError, ValueError: a field or an argument is wrong; names it, what was expected and what came.
          NotImplementedError: no kernel here serves it, such as a head_dim that is no multiple of 8, or a gradient is
            asked for with fp8.
        """
        _common.check_arguments(x, cu_seqlens, seqused)
        layers = {
            name: linen.DenseGeneral(
                features=outputs,
                axis=tuple(range(-len(inputs), 0)),
                use_bias=self.use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                name=name,
            )
            for name, (inputs, outputs) in _common.projections(self, x.shape[-1], "features of x").items()
        }
        return _common.self_attention(self, layers, x, cu_seqlens, seqused)
