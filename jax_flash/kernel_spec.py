"""How kernels compute: every compile-time choice, and nothing else. codegen.py writes each field into spec.h.

They hold no sequence length, or each length would compile anew. They are frozen and hashable: the keys of the cache.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ForwardSpec:
    """What the kernels of attention, of many queries and of few, have in common."""

    element: str
    """Dtype of what is multiplied: that of q, or float16 where the kernel widens k and v."""
    widens: bool
    """Whether the kernel widens k and v, which are FP8."""
    converts_q: bool
    """Whether q is bfloat16 then, and converted."""
    out: str
    """Dtype of the output."""
    head_dim: int
    """Of Q and K in shared memory; the operands' own is padded with zeros."""
    head_dim_v: int
    """Of V in shared memory, likewise."""
    tile_m: int
    """Rows of a tile, of Q of one head; in decode.cu of all heads that share keys and values."""
    tile_n: int
    """Keys of a block, which are multiplied at a time."""
    box_keys: int
    """Keys that one TMA copy brings, which lie in one page; and values, unless FP8 ones are multiplied."""
    threads: int
    """Of a CTA."""
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
    page_table: bool
    cache_batch_idx: bool
    cache_leftpad: bool
    lse: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KernelSpec(ForwardSpec):
    """How kernels/forward.cu computes attention of many queries: a producer warpgroup, consumers of 64 rows each."""

    ctas_per_sm: int
    """CTAs that an SM holds at a time."""
    deposits: bool
    """Whether rows may see more keys than an FP8 accumulator adds up well, which is then deposited in Total."""
    transposes: bool
    """Whether two warps of the producer transpose FP8 values; else they come transposed."""
    v_box_keys: int
    """Keys of FP8 values that one TMA copy brings; of those that come transposed, as many bytes lie in a row of shared
    memory."""
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
    producer_registers: int
    """Of a producer thread, and of a consumer's: setmaxnreg."""
    consumer_registers: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSpec(ForwardSpec):
    """How kernels/decode.cu computes attention of few queries: warps that find tiles, load keys, and multiply."""

    query: str
    """Dtype of q in memory."""
    gathers: bool
    """Whether warps copy keys and values one by one instead of TMA, as small pages need."""
    stages: int
    """Buffers, each for a block of keys and their values."""
    cluster: int
    """CTAs that share the keys of a row and join their results by themselves."""
    partial: bool
    """Whether CTAs that share the keys of a row leave their results to the last of them."""
    part_floats: int
    """Numbers that each of those leaves."""
    draws: bool
    """Whether there are more tiles than CTAs, which then draw them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AppendSpec:
    """How kernels/append.cu puts new keys and values into a cache."""

    query: str
    """Dtype of q, of new keys and values, of the cache, and of the tables of cosines and sines."""
    new: str
    cache: str
    table: str
    threads: int
    rotates: bool
    """Whether there are tables."""
    rotary_interleaved: bool
    windowed: bool
    """Whether each row of q has a position of its own."""
    quantises: bool
    """Whether new keys and values are divided by descales."""
    packed_q: bool
    packed_new: bool
    page_table: bool
    cache_batch_idx: bool
