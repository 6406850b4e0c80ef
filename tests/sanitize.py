"""A small list of CUDA calls for compute-sanitizer; docs/sanitizer.md has the command and what it found.

Each array has an allocation of its own here, so that an access past its end is one that memcheck sees.
"""

from __future__ import annotations

import os

os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"

import jax
import numpy as np
from cache_cases import CacheCase
from cases import LONG, Case
from tolerance import run

INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
PACKED = {
    "packed_q": True,
    "packed_k": True,
    "q_lens": (20, 131, 0, 13),
    "k_lens": (17, 140, 5, 0),
    "tail": 5,
    "front": 2,
}
CASES = [
    Case(id="dense", head_dim=128, causal=True, q_lens=(150, 150), k_lens=(190, 190)),
    Case(id="dense-three-consumers", dtype="float16", head_dim=64, q_lens=(300, 300), k_lens=(270, 270)),
    Case(id="packed", head_dim=96, window_size=(30, 5), sinks=True, softcap=9.0, **PACKED),
    Case(
        id="packed-draws",
        head_dim=64,
        causal=True,
        packed_q=True,
        packed_k=True,
        q_lens=(3, 40) * 40,
        k_lens=(5, 31) * 40,
    ),
    Case(id="seqused", head_dim=40, seqused_q=(30, 0, 11), seqused_k=(29, 53, 2)),
    Case(id="fp8", dtype="float8_e4m3fn", head_dim=128, causal=True, q_lens=(150, 150), k_lens=(190, 190)),
    Case(
        id="fp8-long",
        dtype="float8_e4m3fn",
        heads=12,
        kv_heads=1,
        head_dim=128,
        q_lens=(150, 150),
        k_lens=(2512, 2512),
    ),
    Case(id="fp8-packed", dtype="float8_e4m3fn", head_dim=64, descales="head", **PACKED),
    Case(id="negative-scale", head_dim=64, softmax_scale=-0.1),
    *(case for case in LONG if "window-softcap-sinks" in case.id or case.kv_dtype),
    *(case for case in LONG if "few-queries" in case.id or "many-heads" in case.id),
]


CACHE_CASES = [
    CacheCase(id="cache", leftpad=(5, 0, 11), batch_idx=True, num_splits=3),
    CacheCase(
        id="cache-few",
        q_lens=(1, 1, 1),
        k_lens=(300, 560, 40),
        capacity=560,
        heads=16,
        head_dim=128,
        dtype="float16",
    ),
    CacheCase(
        id="cache-new",
        page_size=16,
        new_len=7,
        rotary=0.5,
        kv_dtype="float8_e4m3fn",
        new_dtype="bfloat16",
        num_splits=9,
    ),
    CacheCase(id="cache-packed", page_size=1, packed_q=True, packed_new=True, rotary=1.0, q_lens=(1, 9, 4), sinks=True),
    CacheCase(id="cache-draws", q_lens=(1,) * 140, k_lens=(40, 9, 70, 112, 0) * 28, num_splits=1),
    *(
        CacheCase(
            id=f"cache-draws-splits-{page_size}",
            dtype=dtype,
            q_lens=(1,) * 40,
            k_lens=(1700, 30, 0, 900) * 10,
            capacity=1700,
            page_size=page_size,
            num_splits=2,
        )
        for page_size, dtype in ((None, "float8_e4m3fn"), (1, "float16"))
    ),
    CacheCase(id="cache-high", q_lens=(11,) * 3, heads=12),
    CacheCase(id="cache-many", page_size=16, q_lens=(64, 64, 64), heads=12, window_size=(30, 0)),
]


def cache_nonsense() -> list[dict]:
    """Arguments whose index arrays lead outside the cache, by which new keys are written too."""
    paged = CACHE_CASES[2].arguments()
    paged["page_table"] = np.resize(np.array([INT_MAX, -1, 3, INT_MIN, 10**6], np.int32), paged["page_table"].shape)
    paged["cache_seqlens"] = np.array([INT_MAX, INT_MIN, 100], np.int32)
    dense = CACHE_CASES[0].arguments()
    dense["cache_batch_idx"] = np.array([INT_MAX, INT_MIN, 1], np.int32)
    dense["cache_leftpad"] = np.array([INT_MIN, INT_MAX, INT_MAX], np.int32)
    return [paged, dense]


def nonsense() -> list[dict]:
    """Arguments whose index arrays lead outside every array; and with one array for both sides."""
    arguments = Case(id="nonsense", head_dim=64, dtype="float8_e4m3fn", **PACKED).arguments()
    arguments["cu_seqlens_q"] = np.array([INT_MIN, INT_MAX, -5, 40, INT_MAX], np.int32)
    arguments["cu_seqlens_k"] = np.array([INT_MAX, 12, INT_MIN, 10**6, -1], np.int32)
    arguments["seqused_q"] = arguments["seqused_k"] = np.array([INT_MAX, INT_MIN, 3, INT_MAX], np.int32)
    both = Case(id="nonsense-both", head_dim=64, dtype="float16", **PACKED | {"k_lens": PACKED["q_lens"]}).arguments()
    both["cu_seqlens_q"] = both["cu_seqlens_k"] = jax.numpy.asarray(arguments["cu_seqlens_q"])
    return [arguments, both]


if __name__ == "__main__":
    cases = [*CASES, *CACHE_CASES]
    calls = [*(case.arguments() for case in cases), *nonsense(), *cache_nonsense()]
    for arguments in calls:
        jax.block_until_ready(run(arguments, implementation="cuda"))
    print(f"{len(calls)} calls ran")
