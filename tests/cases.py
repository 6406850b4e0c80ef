"""The shared list of cases, as data: every platform runs the same ones, each in the features and shapes it serves."""

from __future__ import annotations

import dataclasses
import itertools
import zlib

import ml_dtypes
import numpy as np

from jax_flash.__main__ import PACKED_LENGTHS

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}

FA3_LENGTHS = (
    *((1, 1), (64, 128), (128, 192), (256, 256), (239, 1), (799, 3), (113, 203), (113, 128), (128, 217), (113, 211)),
    *((108, 256), (256, 512), (384, 256), (640, 128), (512, 256), (1024, 1024), (1023, 1024), (1024, 1023)),
    *((4096, 4096), (4224, 4224)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call of `attention`. `arguments` makes its inputs, always the same ones."""

    id: str
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    """Of k and v; that of q unless given."""
    q_lens: tuple[int, ...] = (37, 37, 37)
    """Query length of each sequence; those of a dense side are equal."""
    k_lens: tuple[int, ...] = (53, 53, 53)
    packed_q: bool = False
    packed_k: bool = False
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    head_dim_v: int | None = None
    """That of q and k unless given."""
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    softmax_scale: float | None = None
    sinks: bool = False
    descales: str | None = None
    """None, "tensor" (), "batch" (B,), "kv_head" (B, Hk) or "head" (B, Hk) with (B, H) for q."""
    seqused_q: tuple[int, ...] | None = None
    seqused_k: tuple[int, ...] | None = None
    front: int = 0
    """Rows of no sequence before the first one of a packed side."""
    tail: int = 3
    """Rows of no sequence after the last one of a packed side."""
    out_dtype: str | None = None
    return_lse: bool = True
    qk_ones: bool = False
    """Whether q and k are ones."""

    def __str__(self) -> str:
        return self.id

    @property
    def packed(self) -> bool:
        """Whether a side is packed."""
        return self.packed_q or self.packed_k

    def arguments(self) -> dict:
        """The arguments of `attention` as numpy arrays and Python values; unused rows of q, k and v are NaN."""
        rng = np.random.default_rng(zlib.crc32(self.id.encode()))
        batch = len(self.q_lens)
        q, cu_seqlens_q = self._side(rng, self.q_lens, self.packed_q, self.heads, self.head_dim, self.seqused_q)
        k, cu_seqlens_k = self._side(rng, self.k_lens, self.packed_k, self.kv_heads, self.head_dim, self.seqused_k)
        head_dim_v = self.head_dim_v or self.head_dim
        v, _ = self._side(rng, self.k_lens, self.packed_k, self.kv_heads, head_dim_v, self.seqused_k)
        if self.qk_ones:
            q, k = np.ones_like(q), np.ones_like(k)
        kv_dtype = DTYPES[self.kv_dtype or self.dtype]
        arguments = {
            "q": q.astype(DTYPES[self.dtype]),
            "k": k.astype(kv_dtype),
            "v": v.astype(kv_dtype),
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k": cu_seqlens_k,
            "seqused_q": None if self.seqused_q is None else np.array(self.seqused_q, np.int32),
            "seqused_k": None if self.seqused_k is None else np.array(self.seqused_k, np.int32),
            "sinks": rng.normal(size=self.heads).astype(np.float32) if self.sinks else None,
            "causal": self.causal,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "softmax_scale": self.softmax_scale,
            "out_dtype": self.out_dtype,
            "return_lse": self.return_lse,
        }
        if self.descales:
            for name in ("q", "k", "v"):
                heads = self.heads if name == "q" and self.descales == "head" else self.kv_heads
                shape = {"tensor": (), "batch": (batch,)}.get(self.descales, (batch, heads))
                arguments[f"{name}_descale"] = np.asarray(rng.uniform(0.5, 1.5, shape), np.float32)
        return {name: value for name, value in arguments.items() if value is not None}

    def _side(self, rng, lens, packed, heads, head_dim, seqused):
        """Random rows of one side, float32, with its cu_seqlens or None."""
        counts = lens if seqused is None else np.clip(seqused, 0, lens)
        sequences = [rng.normal(size=(length, heads, head_dim)).astype(np.float32) for length in lens]
        for rows, count in zip(sequences, counts, strict=True):
            rows[count:] = np.nan
        if not packed:
            return np.stack(sequences), None
        front, tail = (np.full((rows, heads, head_dim), np.nan, np.float32) for rows in (self.front, self.tail))
        boundaries = np.cumsum([self.front, *lens]).astype(np.int32)
        return np.concatenate([front, *sequences, tail]), boundaries


def _drawn(length: int, count: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(max(1, length - 20), length + 1, count).tolist())


def _fa3(index: int, q_len: int, k_len: int, packed: bool) -> Case:
    """The features turn with the index, so that neighbours in the list differ in all of them."""
    count = (7 if packed else 3) if q_len < 1000 else 2
    q_lens, k_lens = (q_len,) * count, (k_len,) * count
    if packed:
        q_lens, k_lens = _drawn(q_len, count, index), list(_drawn(k_len, count, index + 100))
        k_lens[4::5] = [0] * len(k_lens[4::5])
    dtype = ("bfloat16", "float8_e4m3fn", "float16")[index % 3]
    masks = ({}, {"causal": True}, {"window_size": (k_len // 3, k_len // 5)}, {"causal": True, "window_size": (19, -1)})
    return Case(
        id=f"{'packed' if packed else 'dense'}-{q_len}x{k_len}",
        dtype=dtype,
        q_lens=q_lens,
        k_lens=tuple(k_lens),
        packed_q=packed,
        packed_k=packed,
        heads=(6, 4, 5)[index % 3],
        kv_heads=(2, 4, 5)[index % 3] if index % 2 else 1,
        head_dim=(64, 128, 96, 192, 256)[index % 5] if q_len < 1000 else 64,
        descales="kv_head" if dtype == "float8_e4m3fn" else None,
        **masks[(index // 2 + packed) % 4],
    )


FA3 = [
    _fa3(index, q_len, k_len, packed) for packed in (False, True) for index, (q_len, k_len) in enumerate(FA3_LENGTHS)
]

EXAMPLES = [
    Case(
        id=f"example-fp8-packed-{kind}",
        dtype="float8_e4m3fn",
        q_lens=PACKED_LENGTHS,
        k_lens=PACKED_LENGTHS,
        packed_q=True,
        packed_k=True,
        tail=0,
        heads=16,
        kv_heads=16,
        head_dim=128,
        descales="head",
        return_lse=False,
        qk_ones=kind == "ones",
    )
    for kind in ("ones", "random")
] + [
    Case(
        id="example-fp16-causal",
        dtype="float16",
        q_lens=(512, 512),
        k_lens=(512, 512),
        heads=16,
        kv_heads=16,
        head_dim=128,
        causal=True,
        return_lse=False,
    ),
    Case(
        id="example-fp16-decode",
        dtype="float16",
        q_lens=(1,),
        k_lens=(2048,),
        heads=16,
        kv_heads=2,
        head_dim=128,
        return_lse=False,
    ),
]

HEAD_DIMS = [
    Case(id=f"{dtype}-d{head_dim}-{head_dim_v}", dtype=dtype, head_dim=head_dim, head_dim_v=head_dim_v, causal=True)
    for dtype, dims in {
        "bfloat16": ((8, 8), (64, 64), (128, 128), (256, 256), (64, 256), (192, 128)),
        "float16": ((40, 40), (72, 72), (160, 160), (40, 96), (256, 64)),
        "float32": ((64, 64), (96, 96), (192, 192), (8, 72), (128, 40)),
        "float8_e4m3fn": (
            *((16, 16), (48, 48), (64, 64), (112, 112), (128, 128), (192, 192), (256, 256)),
            *((64, 128), (48, 256), (192, 128)),
        ),
    }.items()
    for head_dim, head_dim_v in dims
]

_RAGGED = {"q_lens": (31, 5, 0, 77), "k_lens": (43, 0, 29, 131)}
_EVEN = {"q_lens": (45, 45, 45, 45), "k_lens": (67, 67, 67, 67)}
_LAYOUTS = {
    "dense": _EVEN,
    "packed": {**_RAGGED, "packed_q": True, "packed_k": True, "front": 4},
    "packed-q": {"q_lens": _RAGGED["q_lens"], "k_lens": _EVEN["k_lens"], "packed_q": True},
    "packed-k": {"q_lens": _EVEN["q_lens"], "k_lens": _RAGGED["k_lens"], "packed_k": True},
}
_USED = {"seqused_q": (30, 3, 20, 41), "seqused_k": (23, 40, 0, 66)}
_FEATURES = {
    "plain": {},
    "causal-used": {"causal": True, **_USED},
    "window-sinks": {"window_size": (11, 3), "sinks": True},
    "right-window-used-sinks": {"window_size": (-1, 2), "sinks": True, **_USED},
    "softcap-scale-descales": {"softcap": 2.5, "softmax_scale": 0.31, "descales": "head"},
    "all": {
        "causal": True,
        "window_size": (17, 5),
        "softcap": 4.0,
        "sinks": True,
        "descales": "batch",
        "softmax_scale": 0.2,
        "out_dtype": "float32",
        **_USED,
    },
}

FEATURES = [
    Case(
        id=f"{layout}-{feature}-{dtype}",
        dtype=dtype,
        heads=heads,
        kv_heads=kv_heads,
        head_dim_v=80,
        **(_LAYOUTS[layout] | _FEATURES[feature]),
    )
    for ((layout, feature), (dtype, heads, kv_heads)) in zip(
        itertools.product(_LAYOUTS, _FEATURES),
        itertools.cycle(
            [("bfloat16", 6, 2), ("float8_e4m3fn", 4, 4), ("float32", 6, 3), ("float16", 5, 1), ("float8_e4m3fn", 6, 2)]
        ),
        strict=False,
    )
]

# Several blocks of keys, and tiles of queries, in each sequence: what the features above do in the middle of a row.
_LONG = {
    "dense": {"q_lens": (301, 301), "k_lens": (620, 620), "seqused_q": (300, 170), "seqused_k": (403, 620)},
    "packed": {
        **{"q_lens": (280, 0, 131), "k_lens": (590, 43, 700), "packed_q": True, "packed_k": True, "front": 5},
        **{"seqused_q": (270, 9, 131), "seqused_k": (401, 30, 699)},
    },
}

LONG = [
    Case(id=f"long-{layout}-{feature}-{dtype}", dtype=dtype, head_dim=dim, **more, **options)
    for layout, more in _LONG.items()
    for dtype, dim in (("bfloat16", 128), ("float16", 64), ("float8_e4m3fn", 128))
    for feature, options in {
        "sinks": {"sinks": True, "descales": "head"},
        "causal-softcap": {"causal": True, "softcap": 2.5, "softmax_scale": 0.2},
        "window-softcap-sinks": {"window_size": (333, 40), "softcap": 4.0, "sinks": True, "softmax_scale": -0.2},
    }.items()
]

# Causal, with more tiles than a GPU has multiprocessors: packed, where CTAs draw them, and with more keys and values
# than the L2 cache holds, a few tiles to each head, which its neighbours share, and many.
LONG += [
    Case(
        id="long-packed-tiles",
        q_lens=(700, 33, 0, 1100, 260),
        k_lens=(650, 40, 90, 1100, 300),
        packed_q=True,
        packed_k=True,
        heads=24,
        kv_heads=8,
        head_dim=128,
        causal=True,
    ),
    Case(id="long-few-tiles", q_lens=(300,) * 4, k_lens=(1500,) * 4, heads=21, kv_heads=21, head_dim=128, causal=True),
    Case(id="long-sections", q_lens=(1200,) * 2, k_lens=(1500,) * 2, heads=13, kv_heads=13, head_dim=128, causal=True),
]

# Queries that see more FP8 keys than an accumulator takes: few, whose values the kernel transposes,
# and of many heads, whose values XLA transposes.
_MANY_KEYS = {"dtype": "float8_e4m3fn", "k_lens": (2416,) * 3, "seqused_k": (2416, 1300, 2001), "descales": "kv_head"}
LONG += [
    Case(id="long-few-queries-d128", q_lens=(150,) * 3, head_dim=128, causal=True, **_MANY_KEYS),
    Case(id="long-few-queries-d256", q_lens=(150, 0, 79), head_dim=256, packed_q=True, softcap=3.0, **_MANY_KEYS),
    Case(id="long-many-heads-d256", q_lens=(150,) * 3, heads=14, kv_heads=1, head_dim=256, causal=True, **_MANY_KEYS),
]

LONG += [
    Case(id=f"long-{name}-over-fp8", dtype=dtype, kv_dtype="float8_e4m3fn", descales="head", **_LONG[layout], **more)
    for name, dtype, layout, more in (
        ("dense", "bfloat16", "dense", {"head_dim": 128, "causal": True, "softmax_scale": -0.2}),
        ("packed", "float16", "packed", {"head_dim": 64, "causal": True}),
        ("window", "bfloat16", "packed", {"head_dim": 256, "head_dim_v": 192, "window_size": (333, 40), "sinks": True}),
        ("softcap", "bfloat16", "dense", {"head_dim": 96, "softcap": 4.0, "softmax_scale": 0.2}),
    )
]

SCALES = [
    Case(id=f"{dtype}-scale-{scale}", dtype=dtype, softmax_scale=scale, causal=True, k_lens=(150, 150, 150), **more)
    for dtype, scale, more in (
        ("bfloat16", -0.1, {"head_dim": 128}),
        ("float16", -0.3, {"softcap": 3.0, "sinks": True}),
        ("float32", -0.2, {"packed_k": True}),
        ("float8_e4m3fn", -0.1, {"descales": "head"}),
        ("bfloat16", 0.0, {"packed_q": True}),
        ("float32", 0.0, {}),
        ("float8_e4m3fn", 0.0, {}),
    )
]

# As models use it, with small scores alone and with a few that are not; the least, served everywhere; the most, by no
# CUDA kernel.
SOFTCAPS = [
    Case(id="bfloat16-usual-softcap", q_lens=(333, 333), k_lens=(700, 700), softcap=30.0, softmax_scale=0.26),
    Case(id="float16-usual-softcap", dtype="float16", q_lens=(333, 333), k_lens=(700, 700), softcap=20.0, causal=True),
    Case(id="bfloat16-least-softcap", softcap=1e-30, softmax_scale=10.0, causal=True),
    Case(id="float32-least-softcap", dtype="float32", softcap=1e-30, softmax_scale=10.0, causal=True),
    Case(id="float32-most-softcap", dtype="float32", softcap=1e30, softmax_scale=0.3, sinks=True),
]

# As good as unbounded, and not to be added to a position in 32 bits.
WINDOWS = [
    Case(id=f"{dtype}-window-{left}-{right}", dtype=dtype, window_size=(left, right), packed_k=dtype == "float16")
    for dtype, left, right in (
        ("bfloat16", 2**31 - 1, 3),
        ("float16", 5, 2**31 - 1),
        ("float32", 2**31 - 20, 2**40),
        ("float8_e4m3fn", 2**40, 2**31 - 20),
    )
]

OUT_DTYPES = [
    Case(id=f"{dtype}-to-{out_dtype}", dtype=dtype, out_dtype=out_dtype, descales=descales, return_lse=False)
    for dtype, out_dtype, descales in (
        ("float16", "bfloat16", None),
        ("bfloat16", "float32", "tensor"),
        ("float32", "float16", "batch"),
        ("float8_e4m3fn", "float16", "tensor"),
        ("float8_e4m3fn", "float32", "kv_head"),
        ("float8_e4m3fn", None, None),
    )
]

# As servers keep keys and values; head dims are then those of the dtype of q.
FP8_KEYS = [
    Case(id=f"{dtype}-over-fp8-{name}", dtype=dtype, kv_dtype="float8_e4m3fn", **more)
    for name, dtype, more in (
        ("dense", "bfloat16", {"causal": True, "descales": "head", "softmax_scale": 0.2}),
        ("packed", "float16", {**_LAYOUTS["packed"], **_USED, "window_size": (17, 5), "descales": "kv_head"}),
        ("packed-k", "bfloat16", {**_LAYOUTS["packed-k"], "sinks": True, "softcap": 4.0, "descales": "batch"}),
        ("decode", "float16", {"q_lens": (1, 1), "k_lens": (300, 300), "seqused_k": (270, 33), "head_dim": 128}),
        ("d40-72", "bfloat16", {"head_dim": 40, "head_dim_v": 72, "out_dtype": "float32"}),
        ("dense", "float32", {"causal": True, "heads": 4, "kv_heads": 1, "descales": "tensor"}),
    )
]

CASES = [*EXAMPLES, *FA3, *HEAD_DIMS, *FEATURES, *LONG, *SCALES, *SOFTCAPS, *WINDOWS, *OUT_DTYPES, *FP8_KEYS]
