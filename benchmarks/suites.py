"""What is measured: suites as data. A row is one problem; which libraries run it is decided in libraries.py."""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics

from jax_flash.__main__ import PACKED_LENGTHS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One forward problem on random normal inputs."""

    dtype: str
    q_lengths: tuple[int, ...]
    """Query length of each sequence."""
    kv_lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    causal: bool = False
    window: int | None = None
    """Keys that a query sees before its own position; None is all."""
    softcap: float = 0.0
    packed: bool = False
    """Whether the sequences lie one after another, cut by cu_seqlens."""
    kv_dtype: str | None = None
    """Of k and v; that of q unless given."""
    kv_cache: bool = False
    """Whether k and v lie in a cache with room for the longest sequence, and an array says how long each is."""
    page_size: int | None = None
    """Of a cache in pages."""

    @property
    def flops(self) -> float:
        """2 H (D + Dv) for each pair of query and key, of which a causal mask over a square leaves half."""
        pairs = sum(map(self._pairs, self.q_lengths, self.kv_lengths))
        return 2 * self.heads * (self.head_dim + self.head_dim_v) * pairs

    def _pairs(self, q_length: int, kv_length: int) -> float:
        if self.window is not None:
            positions = range(kv_length - q_length, kv_length)
            after = (0 if self.causal else kv_length - 1 - position for position in positions)
            return sum(min(p, self.window) + 1 + a for p, a in zip(positions, after, strict=True))
        return q_length * (kv_length - q_length / 2) if self.causal else q_length * kv_length

    @property
    def bytes(self) -> int:
        """Of q and of k and v that count, read once; the output, of 16 bits at least, is written on top."""
        sizes = {"float32": 4, "float8_e4m3fn": 1}
        queries = sum(self.q_lengths) * self.heads * self.head_dim
        keys = sum(self.kv_lengths) * self.kv_heads * (self.head_dim + self.head_dim_v)
        return sizes.get(self.dtype, 2) * queries + sizes.get(self.kv_dtype or self.dtype, 2) * keys

    @property
    def plain(self) -> bool:
        """Whether it is self-attention of sequences of one length, and has no feature but a causal mask."""
        same = len({*self.q_lengths, *self.kv_lengths}) == 1 and self.heads == self.kv_heads
        features = self.packed or self.softcap or self.window or self.kv_dtype or self.kv_cache
        return same and self.head_dim == self.head_dim_v and not features

    def __str__(self) -> str:
        dims = str(self.head_dim) if self.head_dim == self.head_dim_v else f"{self.head_dim}/{self.head_dim_v}"
        words = [self.dtype, *([f"over {self.kv_dtype}"] if self.kv_dtype else []), f"D{dims}"]
        if self.packed:
            words.append(f"packed {len(self.q_lengths)}x{min(self.q_lengths)}-{max(self.q_lengths)}")
        elif self.q_lengths == self.kv_lengths:
            words.append(f"S{self.q_lengths[0]}")
        else:
            lengths = "-".join(map(str, sorted({min(self.kv_lengths), max(self.kv_lengths)})))
            words.append(f"B{len(self.q_lengths)} {self.q_lengths[0]}x{lengths}")
        if self.heads != self.kv_heads:
            words.append(f"H{self.heads}:{self.kv_heads}")
        if self.window is not None:
            words.append(f"window {self.window}")
        if self.softcap:
            words.append(f"softcap {self.softcap:g}")
        if self.kv_cache:
            words.append("cache" if self.page_size is None else f"cache in pages of {self.page_size}")
        return " ".join([*words, "causal" if self.causal else "full"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """Rows, and in what unit their table is written."""

    rows: tuple[Row, ...]
    unit: str = "TFLOP/s"
    """Or "µs" or "TB/s"."""


TOKENS = 16384


def dense(dtype: str, batch: int, length: int, heads: int, head_dim: int, **options) -> Row:
    """Self-attention of `batch` sequences of one length; `options` are further fields of Row."""
    defaults = {
        "q_lengths": (length,) * batch,
        "kv_lengths": (length,) * batch,
        "kv_heads": heads,
        "head_dim_v": head_dim,
    }
    return Row(dtype=dtype, heads=heads, head_dim=head_dim, **(defaults | options))


def packed(dtype: str, lengths: tuple[int, ...], heads: int, head_dim: int, **options) -> Row:
    """Self-attention of sequences of those lengths, packed."""
    return dense(dtype, 1, 0, heads, head_dim, q_lengths=lengths, kv_lengths=lengths, packed=True, **options)


def grid(dtype: str, head_dims, lengths, causal=(False, True)) -> list[Row]:
    """B S = 16 384 tokens, H D = 2048, as in FlashAttention-3's own benchmark."""
    return [
        dense(dtype, TOKENS // s, s, 2048 // d, d, causal=c)
        for d, s, c in itertools.product(head_dims, lengths, causal)
    ]


UNEVEN = (4000, 150, 900, 2600, 64, 3100, 1300, 420, 1800, 610, 1440)
"""Lengths of the packed rows: 16 384 tokens."""


def features(dtype: str) -> list[Row]:
    """What is not in the grid, at head dim 128 where it is not about head dims."""
    masks = (False, True)
    return [
        *(dense(dtype, 2, 8192, 32, 128, kv_heads=8, causal=c) for c in masks),
        *(packed(dtype, UNEVEN, 16, 128, causal=c) for c in masks),
        dense(dtype, 1, TOKENS, 16, 128, causal=True, window=1024),
        *(dense(dtype, 2, 8192, 2048 // d, d, causal=c, softcap=30.0) for d in (64, 128, 256) for c in masks),
        *(dense(dtype, 2, 8192, 16, d, causal=c) for d in (96, 192) for c in masks),
        *(dense(dtype, 2, 8192, 16, 192, head_dim_v=128, causal=c) for c in masks),
    ]


def few_queries(dtype: str) -> list[Row]:
    """Queries at the end of long sequences: causal or not, they see nearly all keys."""
    shapes = ((64, 32, 32), (128, 16, 16), (256, 8, 8), (128, 32, 8))
    return [dense(dtype, 16, 4096, h, d, q_lengths=(256,) * 16, kv_heads=hk) for d, h, hk in shapes]


def over_fp8() -> list[Row]:
    """16-bit queries over FP8 keys and values: self-attention, and queries at the end of a long cache."""
    options = {"kv_dtype": "float8_e4m3fn"}
    return [
        *(
            dense("bfloat16", TOKENS // s, s, 16, 128, causal=c, **options)
            for s, c in ((512, False), (2048, False), (2048, True), (8192, False))
        ),
        dense("bfloat16", 16, 8192, 32, 128, kv_heads=8, q_lengths=(128,) * 16, **options),
    ]


def decode(dtype: str, batch: int, kv_length: int, heads: int, kv_heads: int, **options) -> Row:
    """One query token a sequence over a KV cache; `options` are further fields of Row."""
    defaults = {"q_lengths": (1,) * batch, "kv_heads": kv_heads, "kv_cache": True}
    return dense(dtype, batch, kv_length, heads, 128, **(defaults | options))


LARGE_CACHES = ((64, 2048, 16, 2), (64, 8192, 32, 8), (4, 65536, 32, 8), (128, 4096, 64, 8), (1, 131072, 32, 8))
"""Batch, length, heads and kv heads."""

RAGGED = tuple(random.Random(0).sample([100 + 32668 * i // 63 for i in range(64)], k=64))
"""Lengths of the sequences in one cache: from 100 to 32 768 at even distances, shuffled."""


def decodes() -> list[Row]:
    """16-bit and FP8 caches, pages, uneven lengths beside even ones of as many keys, and a few query tokens."""
    fp8 = "float8_e4m3fn"
    return [
        *(decode("float16", *shape) for shape in ((1, 2048, 16, 2), *LARGE_CACHES)),
        *(decode("float16", *shape, kv_dtype=fp8) for shape in LARGE_CACHES),
        *(decode(fp8, *shape) for shape in LARGE_CACHES),
        *(decode("float16", 64, 8192, 32, 8, page_size=size) for size in (1, 16, 64, 256)),
        *(decode("float16", 64, 8192, 32, 8, page_size=size, kv_dtype=fp8) for size in (1, 16, 64)),
        decode("float16", 64, 0, 32, 8, kv_lengths=RAGGED),
        decode("float16", 64, round(statistics.mean(RAGGED)), 32, 8),
        decode("float16", 64, 8192, 32, 8, q_lengths=(4,) * 64, causal=True),
    ]


LENGTHS = (512, 2048, 8192, 16384)
SUITES = {
    "forward": Suite(
        rows=(
            *grid("bfloat16", (64, 128, 256), LENGTHS),
            *grid("float16", (64, 128, 256), (2048, 8192)),
            *features("bfloat16"),
            *few_queries("bfloat16"),
        )
    ),
    "fp8": Suite(
        rows=(
            *grid("float8_e4m3fn", (64, 128, 256), LENGTHS),
            *features("float8_e4m3fn"),
            *few_queries("float8_e4m3fn"),
            *over_fp8(),
        )
    ),
    "decode": Suite(unit="TB/s", rows=tuple(decodes())),
    "cases": Suite(
        unit="µs",
        rows=(
            packed("float8_e4m3fn", (60,) * 84, 16, 128),
            packed("float8_e4m3fn", PACKED_LENGTHS, 16, 128),
            dense("float16", 2, 512, 16, 128, causal=True),
            decode("float16", 1, 2048, 16, 2),
        ),
    ),
    "cpu": Suite(
        rows=(
            dense("float32", 2, 2048, 8, 64, causal=True),
            dense("float32", 2, 2048, 8, 64),
            dense("bfloat16", 2, 2048, 8, 64, causal=True),
            dense("float32", 3, 512, 8, 128, causal=True),
        )
    ),
}
