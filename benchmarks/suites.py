"""What is measured: suites as data. A row is one problem; which libraries run it is decided in libraries.py."""

from __future__ import annotations

import dataclasses
import itertools


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One forward problem: self-attention of random normal inputs."""

    dtype: str
    batch: int
    length: int
    heads: int
    head_dim: int
    causal: bool

    @property
    def flops(self) -> float:
        """4 B H S² D, halved when causal."""
        return 4 * self.batch * self.heads * self.length**2 * self.head_dim * (0.5 if self.causal else 1.0)

    def __str__(self) -> str:
        return f"{self.dtype} D{self.head_dim} S{self.length} {'causal' if self.causal else 'full'}"


def _tokens_16k(dtype, head_dims, lengths) -> list[Row]:
    """B S = 16 384 tokens, H D = 2048, as in FlashAttention-3's own benchmark."""
    return [
        Row(dtype=dtype, batch=16384 // s, length=s, heads=2048 // d, head_dim=d, causal=causal)
        for d, s, causal in itertools.product(head_dims, lengths, (False, True))
    ]


SUITES = {
    "forward": _tokens_16k("bfloat16", (64, 128, 256), (512, 2048, 8192, 16384)),
    "fp8": _tokens_16k("float8_e4m3fn", (64, 128, 256), (512, 2048, 8192, 16384)),
    "cpu": [
        Row(dtype="float32", batch=2, length=2048, heads=8, head_dim=64, causal=True),
        Row(dtype="float32", batch=2, length=2048, heads=8, head_dim=64, causal=False),
        Row(dtype="bfloat16", batch=2, length=2048, heads=8, head_dim=64, causal=True),
        Row(dtype="float32", batch=3, length=512, heads=8, head_dim=128, causal=True),
    ],
}
