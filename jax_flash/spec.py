"""The nouns of the library: the user's call, what is computed from which arrays, its numbers, how a kernel does it.

This module imports nothing of the project, so every other one may use it. `Attention`, `Params` and `KernelSpec` hold
no array: they are frozen and hashable, and serve as static arguments and as cache keys.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

UNBOUNDED = -1


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Call:
    """The arguments of one call of `jax_flash.attention`, in its words, names and defaults."""

    q: Any
    k: Any
    v: Any
    _: dataclasses.KW_ONLY
    causal: bool = False
    window_size: Any = (-1, -1)
    softcap: float = 0.0
    softmax_scale: Any = None
    sinks: Any = None
    q_descale: Any = None
    k_descale: Any = None
    v_descale: Any = None
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    seqused_q: Any = None
    seqused_k: Any = None
    out_dtype: Any = None
    return_lse: bool = False
    implementation: str | None = None

    @property
    def packed_q(self) -> bool:
        """Whether the sequences of q lie one after another, cut by cu_seqlens_q."""
        return self.q.ndim == 3

    @property
    def packed_k(self) -> bool:
        """Whether the sequences of k and v lie one after another, cut by cu_seqlens_k."""
        return self.k.ndim == 3

    @property
    def batch(self) -> int:
        """The number of sequences."""
        return self.cu_seqlens_q.shape[0] - 1 if self.packed_q else self.q.shape[0]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """What is computed: the primitives' one static parameter. It holds no shape, so it survives vmap and sharding."""

    window_left: int = UNBOUNDED
    """Keys a query sees before its own position, or UNBOUNDED."""
    window_right: int = UNBOUNDED
    """Keys a query sees after its own position, or UNBOUNDED; 0 is causal."""
    softcap: float = 0.0
    """score = softcap * tanh(score / softcap); 0 is off."""
    out_dtype: str
    """Dtype of the output: "float16", "bfloat16" or "float32"."""
    return_lse: bool = False
    """Whether the log-sum-exp is wanted; without it that result is empty."""
    max_seqlen_q: int | None = None
    """Rows of the longest packed query sequence, if known, or somewhat more; it changes no result."""
    implementation: str | None = None
    """Who must run it: "cuda" or "cpu"; None takes whoever serves the platform."""


class Operands(NamedTuple):
    """The arrays of one call, in the order of the primitives and of the FFI calls. An absent one is empty: shape (0,).

    G is the number of groups: a dense group is one sequence, a packed group holds several, cut by cu_seqlens. B is the
    number of sequences in all groups. Where a leading 1 is allowed, it stands for the same values in every sequence.
    """

    q: Any
    """(G, Sq, H, D): float16, bfloat16, float32 or float8_e4m3fn."""
    k: Any
    """(G', Sk, Hk, D), the dtype of q or float8_e4m3fn."""
    v: Any
    """(G', Sk, Hk, Dv), the dtype of k."""
    scale: Any
    """float32 (B or 1, H or 1): softmax scale times the descales of q and k; a score is scale * (q . k)."""
    v_scale: Any
    """float32 (B or 1, Hk or 1): the descale of v."""
    sinks: Any
    """float32 (B or 1, H), or absent."""
    cu_seqlens_q: Any
    """int32 (G, B / G + 1), or absent when q is dense."""
    cu_seqlens_k: Any
    """int32 (G', B / G' + 1), or absent when k and v are dense."""
    seqused_q: Any
    """int32 (B,), or absent."""
    seqused_k: Any
    """int32 (B,), or absent."""

    def has(self, name: str) -> bool:
        """Whether the operand of that name is present."""
        return getattr(self, name).size > 0

    def widened(self) -> Operands:
        """The same with k and v in the dtype of q: numbers of FP8 are exact in any other."""
        return self._replace(k=self.k.astype(self.q.dtype), v=self.v.astype(self.q.dtype))

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        if self.has("cu_seqlens_q"):
            groups, boundaries = self.cu_seqlens_q.shape
            return groups * (boundaries - 1)
        return self.q.shape[0]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    """The numbers that cross the FFI: field for field the list in kernels/params.h, which says what each one means."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    q_groups: int
    q_rows: int
    kv_groups: int
    kv_rows: int
    scale_batch_stride: int
    scale_head_stride: int
    v_scale_batch_stride: int
    v_scale_head_stride: int
    sinks_batch_stride: int
    window_left: int
    window_right: int
    softcap: float

    @classmethod
    def of(cls, attention: Attention, operands: Operands) -> Params:
        """The numbers of one call; `operands` may be arrays, tracers or avals."""
        q_groups, q_rows, heads, head_dim = operands.q.shape
        kv_groups, kv_rows, kv_heads, head_dim_v = operands.v.shape
        scale_batch, scale_heads = operands.scale.shape
        v_scale_batch, v_scale_heads = operands.v_scale.shape
        sinks_batch = operands.sinks.shape[0] if operands.has("sinks") else 1
        return cls(
            batch=operands.batch,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            q_groups=q_groups,
            q_rows=q_rows,
            kv_groups=kv_groups,
            kv_rows=kv_rows,
            scale_batch_stride=scale_heads if scale_batch > 1 else 0,
            scale_head_stride=1 if scale_heads > 1 else 0,
            v_scale_batch_stride=v_scale_heads if v_scale_batch > 1 else 0,
            v_scale_head_stride=1 if v_scale_heads > 1 else 0,
            sinks_batch_stride=heads if sinks_batch > 1 else 0,
            window_left=attention.window_left,
            window_right=attention.window_right,
            softcap=attention.softcap,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KernelSpec:
    """How a kernel computes: every compile-time choice, and nothing else. codegen.py writes each field into spec.h.

    It holds no sequence length, or each length would compile anew.
    """

    element: str
    """Dtype of what is multiplied: that of q, or float16 where the kernel widens k and v."""
    widens: bool
    """Whether two warps of the producer widen k and v, which are FP8 under a 16-bit q."""
    converts_q: bool
    """Whether q is bfloat16 then, which consumers convert."""
    out: str
    """Dtype of the output."""
    head_dim: int
    """Of Q and K in shared memory; the operands' own is padded with zeros by TMA."""
    head_dim_v: int
    """Of V in shared memory, likewise."""
    tile_m: int
    """Query rows of a CTA; 64 for each consumer warpgroup."""
    tile_n: int
    """Keys of one step of the main loop."""
    ctas_per_sm: int
    """CTAs that an SM holds at a time."""
    deposits: bool
    """Whether rows may see more keys than an FP8 accumulator adds up well, which is then deposited in Total."""
    transposes: bool
    """Whether two warps of the producer transpose FP8 values; else they come transposed."""
    v_box_keys: int
    """Keys of V that one TMA copy brings; of transposed FP8 values, as many bytes lie in a row of shared memory."""
    q_stages: int
    """Buffers for Q."""
    k_stages: int
    """Buffers for K."""
    v_stages: int
    """Buffers for V."""
    ping_pong: bool
    """Whether consumer warpgroups take turns to issue their products."""
    overlap: int
    """Eighths of a step's exponentials that come before the wait for PV; most of the others follow it."""
    integer_max: bool
    """Whether positive maxima are found by comparing floats as integers, three at a time."""
    threads: int
    """Of a CTA: a producer warpgroup and the consumers."""
    producer_registers: int
    """Of a producer thread, and of a consumer's: setmaxnreg."""
    consumer_registers: int
    shared_bytes: int
    key_alignment: int
    """Rows that a block of keys begins at a multiple of: 16 for packed FP8, whose V is laid out in units of 16 keys."""
    window_left: bool
    """Whether the window is bounded on the left; the bound itself is in Params."""
    window_right: bool
    softcap: bool
    sinks: bool
    packed_q: bool
    packed_k: bool
    seqused_q: bool
    seqused_k: bool
    lse: bool
