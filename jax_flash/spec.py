"""The nouns of the library: the user's call, what is computed from which arrays, its numbers.

This module imports nothing of the project, so every other one may use it. `Attention` and `Params` hold no array: they
are frozen and hashable, and serve as static arguments.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

UNBOUNDED = -1


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Request:
    """What a user asks for in either function: of which queries, what they see, how, and which results.

    `Call` and `CacheCall` say of which keys. All three use the words, names and defaults of the public functions.
    """

    q: Any
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
    max_seqlen_q: int | None = None
    out_dtype: Any = None
    return_lse: bool = False
    implementation: str | None = None

    @property
    def kv(self) -> dict[str, Any]:
        """Keys and values, by the names that the user knows them by."""
        raise NotImplementedError

    @property
    def kv_heads(self) -> int:
        """The number of heads of keys and values."""
        return next(iter(self.kv.values())).shape[-2]

    @property
    def packed_q(self) -> bool:
        """Whether the sequences of q lie one after another, cut by cu_seqlens_q."""
        return self.q.ndim == 3

    @property
    def batch(self) -> int:
        """The number of sequences."""
        return self.cu_seqlens_q.shape[0] - 1 if self.packed_q else self.q.shape[0]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Call(Request):
    """The arguments of one call of `jax_flash.attention`."""

    k: Any
    v: Any
    _: dataclasses.KW_ONLY
    cu_seqlens_k: Any = None
    max_seqlen_k: int | None = None
    seqused_q: Any = None
    seqused_k: Any = None

    @property
    def kv(self) -> dict[str, Any]:
        return {"k": self.k, "v": self.v}

    @property
    def packed_k(self) -> bool:
        """Whether the sequences of k and v lie one after another, cut by cu_seqlens_k."""
        return self.k.ndim == 3


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class CacheCall(Request):
    """The arguments of one call of `jax_flash.attention_with_kv_cache`."""

    k_cache: Any
    v_cache: Any
    k_new: Any = None
    v_new: Any = None
    _: dataclasses.KW_ONLY
    cache_seqlens: Any
    page_table: Any = None
    cache_batch_idx: Any = None
    cache_leftpad: Any = None
    rotary_cos: Any = None
    rotary_sin: Any = None
    rotary_interleaved: bool = False
    causal: bool = True
    num_splits: int | None = None

    @property
    def kv(self) -> dict[str, Any]:
        return {"k_cache": self.k_cache, "v_cache": self.v_cache}

    @property
    def capacity(self) -> int:
        """Keys that a sequence may have."""
        return self.k_cache.shape[1] * (1 if self.page_table is None else self.page_table.shape[1])

    @property
    def packed_new(self) -> bool:
        """Whether the sequences of k_new and v_new lie one after another, cut by cu_seqlens_q."""
        return self.k_new is not None and self.k_new.ndim == 3


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
    num_splits: int | None = None
    """Parts that the keys of a sequence are split into, which work side by side; None chooses."""
    rotary_interleaved: bool = False
    """Whether an append rotates channels 2i and 2i + 1 as a pair; else i of the first half and of the second."""
    implementation: str | None = None
    """Who must run it: "cuda" or "cpu"; None takes whoever serves the platform."""

    @property
    def windowed(self) -> bool:
        """Whether a query's position says what it sees."""
        return (self.window_left, self.window_right) != (UNBOUNDED, UNBOUNDED)


class Operands(NamedTuple):
    """The arrays of one call, in the order of the primitives and of the FFI calls. An absent one is empty: shape (0,).

    G is the number of groups: a dense group is one sequence, a packed group holds several, cut by cu_seqlens. B is the
    number of sequences in all groups. Where a leading 1 is allowed, it stands for the same values in every sequence.
    """

    q: Any
    """(G, Sq, H, D): float16, bfloat16, float32 or float8_e4m3fn."""
    k: Any
    """(G', Sk, Hk, D), the dtype of q or float8_e4m3fn; with a page table a pool: G' pages of Sk rows."""
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
    page_table: Any
    """int32 (B, pages of a sequence), or absent: key j of sequence b is row j % Sk of page page_table[b, j // Sk]."""
    cache_batch_idx: Any
    """int32 (B,), or absent: the group of k and v that a sequence's keys lie in, where they are dense."""
    cache_leftpad: Any
    """int32 (B,), or absent: the first keys of a sequence that do not count, though they have positions."""

    def has(self, name: str) -> bool:
        """Whether the operand of that name is present."""
        return getattr(self, name).size > 0

    @property
    def capacity(self) -> int:
        """Keys that a sequence may have."""
        return self.k.shape[1] * (self.page_table.shape[1] if self.has("page_table") else 1)

    def widened(self) -> Operands:
        """The same with k and v in the dtype of q: numbers of FP8 are exact in any other."""
        return self._replace(k=self.k.astype(self.q.dtype), v=self.v.astype(self.q.dtype))

    def after(self, append: tuple[Any, Any, Any]) -> Operands:
        """The same with what an append made of q, k and v."""
        q, k, v = append
        return self._replace(q=q, k=k, v=v)

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        if self.has("cu_seqlens_q"):
            groups, boundaries = self.cu_seqlens_q.shape
            return groups * (boundaries - 1)
        return self.q.shape[0]


class Append(NamedTuple):
    """The arrays that put new keys and values into a cache, in the order of the primitive. An absent one is empty.

    The rows of each sequence follow the keys that it has, row j at position cache_seqlens + j; they and q are first
    rotated by their positions, if there are tables. Groups, B and a leading 1 mean what they do in Operands.
    """

    q: Any
    """(G, Sq, H, D), as in Operands."""
    k_new: Any
    """(G'', S, Hk, D), the dtype of k_cache; or float16, bfloat16 or float32 where that is float8_e4m3fn."""
    v_new: Any
    """(G'', S, Hk, Dv), the dtype of k_new."""
    k_cache: Any
    """(G', rows, Hk, D), k of Operands."""
    v_cache: Any
    """(G', rows, Hk, Dv), v of Operands."""
    cache_seqlens: Any
    """int32 (B,): the keys that a sequence has before; they count up to the capacity."""
    cu_seqlens_q: Any
    """int32 (G, B / G + 1), or absent when q is dense."""
    cu_seqlens_new: Any
    """int32 (G'', B / G'' + 1), or absent when k_new and v_new are dense."""
    page_table: Any
    """As in Operands; what would be written to a page outside the pool is dropped."""
    cache_batch_idx: Any
    """As in Operands; what would be written to a group that there is none of is dropped."""
    rotary_cos: Any
    """(B or 1, positions, up to D / 2): float16, bfloat16 or float32; absent where nothing is rotated."""
    rotary_sin: Any
    """The like of rotary_cos."""
    k_descale: Any
    """float32 (B or 1, Hk or 1), what one unit of k_cache is worth; absent unless k_new has another dtype."""
    v_descale: Any
    """float32 (B or 1, Hk or 1), likewise."""

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return self.cache_seqlens.shape[0]

    @property
    def capacity(self) -> int:
        """Keys that a sequence may have."""
        return self.k_cache.shape[1] * (self.page_table.shape[1] if self.page_table.size else 1)


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
    max_pages: int

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
            max_pages=operands.page_table.shape[1] if operands.has("page_table") else 0,
        )
