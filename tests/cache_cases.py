"""The shared list of calls over a KV cache, as cases.py is that of `attention`."""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np
from cases import DTYPES

SPARE = 2
"""Pages of a pool, or rows of a cache with cache_batch_idx, that no sequence has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheCase:
    """One call of `attention_with_kv_cache`. `arguments` makes its inputs, always the same ones."""

    id: str
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    """Of the caches; that of q unless given."""
    new_dtype: str | None = None
    """Of k_new and v_new; that of the caches unless given."""
    q_lens: tuple[int, ...] = (5, 5, 5)
    """Query length of each sequence; those of dense q are equal."""
    k_lens: tuple[int, ...] = (37, 96, 11)
    """cache_seqlens."""
    capacity: int = 112
    """Of each sequence."""
    page_size: int | None = None
    """None is a dense cache."""
    batch_idx: bool = False
    leftpad: tuple[int, ...] | None = None
    packed_q: bool = False
    new_len: int | None = None
    """Length of dense k_new."""
    packed_new: bool = False
    rotary: float = 0.0
    """Part of the channels that is rotated; 0 gives no tables."""
    rotary_interleaved: bool = False
    rotary_rows: int = 200
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    head_dim_v: int | None = None
    """That of q and k unless given."""
    causal: bool = True
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    softmax_scale: float | None = None
    sinks: bool = False
    descales: str | None = None
    """None, "tensor" (), "batch" (B,) or "kv_head" (B, Hk)."""
    num_splits: int | None = None
    out_dtype: str | None = None
    return_lse: bool = True

    def __str__(self) -> str:
        return self.id

    def arguments(self) -> dict:
        """The arguments as numpy arrays and Python values; rows of a cache that hold no key that counts are NaN."""
        rng = np.random.default_rng(zlib.crc32(self.id.encode()))
        batch, kv_dtype = len(self.q_lens), self.kv_dtype or self.dtype
        dims = self.head_dim, self.head_dim_v or self.head_dim
        arguments = {
            "q": self._rows(rng, self.q_lens, self.packed_q, self.heads, self.head_dim).astype(DTYPES[self.dtype]),
            "cache_seqlens": np.array(self.k_lens, np.int32),
            "cu_seqlens_q": np.cumsum([0, *self.q_lens]).astype(np.int32) if self.packed_q else None,
            "cache_leftpad": None if self.leftpad is None else np.array(self.leftpad, np.int32),
            "sinks": rng.normal(size=self.heads).astype(np.float32) if self.sinks else None,
            "rotary_interleaved": self.rotary_interleaved,
            "causal": self.causal,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "softmax_scale": self.softmax_scale,
            "num_splits": self.num_splits,
            "out_dtype": self.out_dtype,
            "return_lse": self.return_lse,
        }
        keys = [self._keys(rng, dim) for dim in dims]
        if self.page_size:
            pages = self.capacity // self.page_size
            table = rng.permutation(batch * pages + SPARE)[: batch * pages]
            arguments["page_table"] = table.reshape(batch, pages).astype(np.int32)
            keys = [x.reshape(-1, self.page_size, *x.shape[2:]) for x in keys]
        elif self.batch_idx:
            table = rng.permutation(batch + SPARE)[:batch]
            arguments["cache_batch_idx"] = table.astype(np.int32)
        for name, x in zip(("k_cache", "v_cache"), keys, strict=True):
            cache = x
            if self.page_size or self.batch_idx:
                cache = np.full((len(x) + SPARE, *x.shape[1:]), np.nan, np.float32)
                cache[table] = x
            arguments[name] = cache.astype(DTYPES[kv_dtype])
        if self.new_len is not None or self.packed_new:
            lens = self.q_lens if self.packed_new else (self.new_len,) * batch
            for name, dim in zip(("k_new", "v_new"), dims, strict=True):
                rows = self._rows(rng, lens, self.packed_new, self.kv_heads, dim)
                arguments[name] = rows.astype(DTYPES[self.new_dtype or kv_dtype])
        if self.rotary:
            angles = rng.uniform(-4, 4, (self.rotary_rows, int(self.rotary * self.head_dim) // 2))
            tables = {"rotary_cos": np.cos(angles), "rotary_sin": np.sin(angles)}
            narrow = self.dtype if self.dtype != "float8_e4m3fn" else "float32"
            arguments |= {name: x.astype(DTYPES[narrow]) for name, x in tables.items()}
        if self.descales:
            shape = {"tensor": (), "batch": (batch,), "kv_head": (batch, self.kv_heads)}[self.descales]
            for name in ("q_descale", "k_descale", "v_descale"):
                arguments[name] = np.asarray(rng.uniform(0.5, 1.5, shape), np.float32)
        return {name: value for name, value in arguments.items() if value is not None}

    def _rows(self, rng, lens, packed, heads, dim):
        """Queries or new keys, with three rows of no sequence behind packed ones."""
        if not packed:
            return rng.normal(size=(len(lens), lens[0], heads, dim)).astype(np.float32)
        rows = rng.normal(size=(sum(lens) + 3, heads, dim)).astype(np.float32)
        rows[-3:] = np.nan
        return rows

    def _keys(self, rng, dim):
        """Those of each sequence, (sequences, capacity, ..)."""
        keys = np.full((len(self.k_lens), self.capacity, self.kv_heads, dim), np.nan, np.float32)
        for rows, length, first in zip(keys, self.k_lens, self.leftpad or (0,) * len(keys), strict=True):
            rows[first:length] = rng.normal(size=rows[first:length].shape)
        return keys


_LAYOUTS = {
    "dense": {},
    "indexed": {"batch_idx": True},
    **{f"pages-of-{size}": {"page_size": size, "capacity": -(-112 // size) * size} for size in (1, 4, 7, 16, 128)},
}

LAYOUTS = [
    CacheCase(id=f"{layout}-{dtype}", dtype=dtype, **options)
    for layout, options in _LAYOUTS.items()
    for dtype in ("bfloat16", "float8_e4m3fn")
]

QUERIES = [
    CacheCase(id=f"{'-'.join(map(str, q_lens))}-queries-{name}", q_lens=q_lens, **more)
    for q_lens, name, more in (
        ((1, 1, 1), "pages-of-16", {"page_size": 16, "dtype": "float16"}),
        ((1, 1, 1), "dense-mqa", {"heads": 16, "kv_heads": 1, "head_dim": 128}),
        ((2, 2, 2), "pages-of-4", {"page_size": 4, "heads": 6, "kv_heads": 6, "dtype": "float32"}),
        ((17, 17, 17), "leftpad", {"leftpad": (3, 96, 20), "dtype": "float16"}),
        ((64, 64, 64), "pages-of-7", {"page_size": 7, "heads": 6, "kv_heads": 3}),
        ((1, 1, 1), "many-heads", {"page_size": 16, "heads": 16, "kv_heads": 2, "head_dim": 128, "dtype": "float16"}),
        ((1, 9, 0, 30), "pages-of-16", {"k_lens": (112, 40, 0, 5), "page_size": 16, "packed_q": True}),
        *(((64, 64, 64), f"pages-of-{size}", {"page_size": size}) for size in (8, 16)),
        *(
            ((64, 64, 64), f"fp8-pages-of-{size}", {"page_size": size, "capacity": 128, "dtype": "float8_e4m3fn"})
            for size in (16, 32)
        ),
        ((3, 1, 12, 7), "indexed", {"k_lens": (112, 40, 0, 5), "batch_idx": True, "packed_q": True, "kv_heads": 1}),
    )
]

_ALL = {"window_size": (30, 0), "softcap": 4.0, "sinks": True}
_SHORT, _LONG = (0, 112, 1), (300, 1000, 0, 513)
_WIDE = {"q_lens": (4,) * 3, "k_lens": (1600, 37, 990), "capacity": 1600, "heads": 16, "kv_heads": 2, "num_splits": 1}
_UNEVEN = {"q_lens": (3,) * 40, "k_lens": tuple(2600 * (i * 23 % 40) ** 2 // 1521 for i in range(40)), "capacity": 2608}
FEATURES = [
    CacheCase(id=f"{name}-{dtype}", dtype=dtype, **options)
    for name, dtype, options in (
        ("empty-and-full", "bfloat16", {"k_lens": _SHORT, "page_size": 16}),
        ("empty-and-full-sinks", "float16", {"k_lens": _SHORT, "sinks": True, "causal": False}),
        ("window", "bfloat16", {"window_size": (13, 2), "causal": False, "page_size": 7, "capacity": 112}),
        ("left-window-pad", "float16", {"window_size": (20, -1), "leftpad": (30, 90, 0), "page_size": 4}),
        ("softcap", "bfloat16", {"softcap": 3.0, "softmax_scale": 0.3, "batch_idx": True}),
        ("softcap-window-sinks", "float8_e4m3fn", {"softcap": 4.0, "window_size": (30, 0), "sinks": True}),
        ("eight-rows", "bfloat16", {"heads": 8, "q_lens": (2,) * 3, "head_dim": 192, "head_dim_v": 128, **_ALL}),
        ("eight-rows", "float8_e4m3fn", {"heads": 8, "q_lens": (2,) * 3, "head_dim": 96, "page_size": 16, **_ALL}),
        ("d96", "float16", {"head_dim": 96, "page_size": 16}),
        ("d96", "float8_e4m3fn", {"head_dim": 96, "q_lens": (1,) * 3}),
        ("d192", "float8_e4m3fn", {"head_dim": 192, "page_size": 4}),
        ("d256", "bfloat16", {"head_dim": 256, "page_size": 16}),
        ("d256", "float8_e4m3fn", {"head_dim": 256, "num_splits": 3}),
        ("d40-72", "float16", {"head_dim": 40, "head_dim_v": 72, "page_size": 16, "out_dtype": "float32"}),
        ("d128-64", "float8_e4m3fn", {"head_dim": 128, "head_dim_v": 64, "page_size": 128, "capacity": 128}),
        ("negative-scale", "bfloat16", {"softmax_scale": -0.2, "page_size": 16}),
        ("descales", "float8_e4m3fn", {"descales": "kv_head", "page_size": 16, "leftpad": (0, 5, 10)}),
        ("long", "bfloat16", {"q_lens": (3,) * 4, "k_lens": _LONG, "capacity": 1024, "page_size": 64}),
        ("long-dense", "float16", {"q_lens": (1,) * 4, "k_lens": _LONG, "capacity": 1000, "num_splits": 3}),
        ("long-one-split", "bfloat16", {"q_lens": (1,) * 4, "k_lens": _LONG, "capacity": 1000, "num_splits": 1}),
        ("long", "float8_e4m3fn", {"q_lens": (2,) * 4, "k_lens": _LONG, "capacity": 1008, "page_size": 48}),
        ("uneven", "bfloat16", _UNEVEN | {"num_splits": 3}),
        ("uneven-pages-of-16", "float8_e4m3fn", _UNEVEN | {"num_splits": 2, "page_size": 16}),
        ("uneven-pages-of-1", "float16", _UNEVEN | {"num_splits": 3, "page_size": 1}),
        ("uneven-packed", "float16", _UNEVEN | {"num_splits": 2, "packed_q": True, "q_lens": (1, 5, 0, 3) * 10}),
        ("no-lse", "bfloat16", {"return_lse": False, "page_size": 16}),
        *(
            (f"wide-pages-of-{size}", "bfloat16", {"head_dim": 192, "head_dim_v": 128, "page_size": size, **_WIDE})
            for size in (8, 16)
        ),
    )
]

FP8_KEYS = [
    CacheCase(id=f"{dtype}-over-fp8-{name}", dtype=dtype, kv_dtype="float8_e4m3fn", **more)
    for name, dtype, more in (
        ("pages-of-16", "bfloat16", {"page_size": 16, "descales": "kv_head", "q_lens": (1, 1, 1), "head_dim": 128}),
        ("dense", "float16", {"descales": "batch", "leftpad": (1, 2, 3)}),
        ("indexed", "float32", {"descales": "tensor", "batch_idx": True, "heads": 4, "kv_heads": 4}),
        ("many-pages-of-32", "bfloat16", {"page_size": 32, "capacity": 128, "q_lens": (64,) * 3, "kv_heads": 1}),
        ("appended", "bfloat16", {"descales": "kv_head", "page_size": 4, "new_len": 5, "new_dtype": "bfloat16"}),
        ("appended-turned", "float16", {"descales": "batch", "new_len": 5, "new_dtype": "float16", "rotary": 0.5}),
        ("appended-bits", "bfloat16", {"descales": "tensor", "page_size": 16, "new_len": 3}),
    )
]

APPENDED = [
    CacheCase(id=f"appended-{name}-{dtype}", dtype=dtype, **options)
    for name, dtype, options in (
        ("dense", "bfloat16", {"new_len": 5}),
        ("indexed", "float16", {"new_len": 7, "batch_idx": True, "leftpad": (0, 12, 3)}),
        ("pages-of-1", "bfloat16", {"new_len": 5, "page_size": 1}),
        ("pages-of-7", "float16", {"new_len": 9, "page_size": 7}),
        ("pages-of-128", "float32", {"new_len": 5, "page_size": 128, "capacity": 128}),
        ("past-the-capacity", "bfloat16", {"new_len": 20, "page_size": 16}),
        ("decode-turned", "bfloat16", {"new_len": 1, "q_lens": (1, 1, 1), "page_size": 16, "rotary": 1.0}),
        ("interleaved", "float16", {"new_len": 5, "page_size": 4, "rotary": 1.0, "rotary_interleaved": True}),
        ("half-turned", "float16", {"new_len": 5, "rotary": 0.5, "page_size": 16}),
        ("half-interleaved", "bfloat16", {"new_len": 4, "rotary": 0.5, "rotary_interleaved": True, "batch_idx": True}),
        ("turned-all-alike", "bfloat16", {"new_len": 5, "rotary": 1.0, "causal": False, "page_size": 16}),
        ("short-table", "float32", {"new_len": 5, "rotary": 1.0, "rotary_rows": 40}),
        ("turned", "float8_e4m3fn", {"new_len": 5, "rotary": 1.0, "page_size": 16, "descales": "kv_head"}),
        ("window", "float16", {"new_len": 5, "rotary": 1.0, "causal": False, "window_size": (20, 3), "page_size": 16}),
        ("dense-under-packed-q", "bfloat16", {"new_len": 4, "packed_q": True, "q_lens": (4, 2, 9), "rotary": 1.0}),
    )
] + [
    CacheCase(
        id=f"appended-packed-{name}",
        q_lens=(4, 1, 0, 30),
        k_lens=(20, 111, 50, 0),
        packed_q=True,
        packed_new=True,
        **options,
    )
    for name, options in (
        ("dense", {"dtype": "float16"}),
        ("pages-of-16", {"page_size": 16, "rotary": 0.5}),
        ("fp8", {"page_size": 4, "kv_dtype": "float8_e4m3fn", "new_dtype": "float32", "descales": "kv_head"}),
    )
]

FA3_LENGTHS = (
    *((1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (64, 2048), (16, 20000), (128, 128), (256, 512)),
    (2048, 3577),
)


def _fa3(number: int, q_len: int, k_len: int) -> CacheCase:
    """Of FlashAttention-3's own grid: the features turn with the number, so that neighbours differ in all of them."""
    rng = np.random.default_rng(number)
    packed, appends, page_size = number % 3 == 2, number % 2 == 0, (None, 1, 4, 128)[number % 4]
    q_lens = tuple(rng.integers(1, q_len + 1, 5).tolist()) if packed else (q_len,) * 5
    new_len = None if packed or not appends else max(1, q_len // (1, 3)[number % 4 // 2])
    k_lens = rng.integers(0, k_len - (q_len if appends else 0) + 1, 5)
    dtype, kv_dtype = (("bfloat16", None), ("float16", "float8_e4m3fn"), ("float8_e4m3fn", None))[number // 2 % 3]
    masks = ({}, {"window_size": (k_len // 3, k_len // 5), "causal": False}, {"causal": False}, {"window_size": (9, 0)})
    return CacheCase(
        id=f"fa3-{number}-{q_len}x{k_len}",
        dtype=dtype,
        kv_dtype=kv_dtype,
        new_dtype=dtype if appends and kv_dtype else None,
        q_lens=q_lens,
        k_lens=tuple(k_lens.tolist()),
        capacity=-(-k_len // (page_size or 1)) * (page_size or 1),
        page_size=page_size,
        batch_idx=not page_size and number % 8 < 4,
        leftpad=tuple((k_lens * rng.uniform(0, 0.5, 5)).astype(int).tolist()) if number % 5 == 1 else None,
        packed_q=packed,
        packed_new=packed and appends,
        new_len=new_len,
        rotary=(0.5, 1.0, 0.0)[number // 3 % 3] if appends else 0.0,
        rotary_interleaved=number % 7 < 3,
        rotary_rows=k_len,
        kv_heads=(6, 3, 1)[number // 2 % 3],
        head_dim=128,
        descales="kv_head" if "float8_e4m3fn" in (dtype, kv_dtype) else None,
        num_splits=(1, 3, None)[number % 3],
        **masks[number // 2 % 4],
    )


FA3 = [_fa3(3 * i + turn, *lengths) for i, lengths in enumerate(FA3_LENGTHS) for turn in range(3)]

LONG = [case for case in FA3 if max(case.k_lens) * max(case.q_lens) > 2**18]
"""What NumPy takes long for: run where there is a GPU alone."""

CACHE_CASES = [*(case for case in FA3 if case not in LONG), *LAYOUTS, *QUERIES, *FEATURES, *FP8_KEYS, *APPENDED]
