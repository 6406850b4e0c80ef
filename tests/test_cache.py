"""Attention over a KV cache against NumPy, and what is promised of caches and index arrays."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_cases import CACHE_CASES, LONG, CacheCase
from conftest import on_each_kernel
from oracle import over_cache
from tolerance import check, run

import jax_flash
from jax_flash import canonical, launch
from jax_flash.spec import CacheCall


def check_call(arguments: dict, results) -> None:
    """Checks all results of a call."""
    plain, *caches = over_cache(arguments)
    results = list(results) if isinstance(results, tuple) else [results]
    if "k_new" in arguments:
        for name, cache, expected in zip("kv", [results.pop(-2), results.pop(-1)], caches, strict=True):
            check_cache(name, cache, expected, exact=name == "v" or "rotary_cos" not in arguments)
    check(plain, *results)


def check_bits(xs, ys):
    """Checks that arrays are the same to the bit, NaN included."""

    def check(x, y):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_array_equal(x.view(f"u{x.itemsize}"), y.view(f"u{y.itemsize}"))

    jax.tree.map(check, xs, ys)


def check_cache(name, cache, expected, exact):
    """Checks a cache, to the bit unless rows were rotated, whose sums of products may be rounded once or twice."""
    assert cache.dtype == expected.dtype
    if exact:
        check_bits(cache, expected)
    else:
        unit = jnp.finfo(cache.dtype).eps
        cache, expected = np.asarray(cache, np.float32), expected.astype(np.float32)
        np.testing.assert_allclose(cache, expected, rtol=unit, atol=unit, err_msg=f"{name}_cache")


@pytest.mark.parametrize(("kernel", "case"), on_each_kernel(CACHE_CASES), indirect=["kernel"])
def test_case(kernel, case):
    arguments = case.arguments()
    check_call(arguments, run(arguments, implementation=kernel))


@pytest.mark.gpu
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_case(case):
    arguments = case.arguments()
    check_call(arguments, run(arguments, implementation="cuda"))


@pytest.mark.parametrize("splits", [1, 3])
def test_bits_depend_on_no_other_sequence(kernel, splits):
    """In a batch of more tiles than a GPU has multiprocessors, whose lengths differ, and in any order of it."""
    batch = 40
    lens = tuple(np.random.default_rng(3).integers(0, 500, batch).tolist())
    options = {"q_lens": (2,) * batch, "k_lens": lens, "capacity": 500, "heads": 10, "kv_heads": 5}
    case = CacheCase(id="many", num_splits=splits, **options)
    arguments = case.arguments() | {"out_dtype": "float32"}
    results = run(arguments, implementation=kernel)
    check_call(arguments, results)
    check_bits(results, run(arguments, implementation=kernel))
    order = np.random.default_rng(4).permutation(batch)
    mixed = arguments | {name: arguments[name][order] for name in ("q", "k_cache", "v_cache", "cache_seqlens")}
    check_bits(run(mixed, implementation=kernel), tuple(x[order] for x in results))


# Index arrays may hold anything.

INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
NONSENSE = {
    "no-length": {"cache_seqlens": INT_MIN},
    "endless": {"cache_seqlens": INT_MAX},
    "past-the-capacity": {"cache_seqlens": 113},
    "leftpad-beyond": {"cache_leftpad": INT_MAX},
    "leftpad-before": {"cache_leftpad": INT_MIN},
    "length-and-leftpad": {"cache_seqlens": -9, "cache_leftpad": 7},
}
NONSENSE_OF_PAGES = NONSENSE | {
    "pages": {"page_table": [INT_MAX, -1, 5, INT_MIN, 23, 24, -3]},
    "no-pages": {"page_table": -1},
    "pages-beyond": {"page_table": 10**6},
}
NONSENSE_OF_ROWS = NONSENSE | {"rows-beyond": {"cache_batch_idx": INT_MAX}, "rows-before": {"cache_batch_idx": -1}}


@pytest.mark.parametrize("appends", [False, True], ids=["", "appends"])
@pytest.mark.parametrize(
    ("layout", "nonsense"),
    [
        *(pytest.param({"page_size": 16}, values, id=f"paged-{name}") for name, values in NONSENSE_OF_PAGES.items()),
        *(pytest.param({"batch_idx": True}, values, id=f"indexed-{name}") for name, values in NONSENSE_OF_ROWS.items()),
    ],
)
def test_nonsense_for_one_sequence(kernel, layout, nonsense, appends):
    """It is read by the same definition everywhere, and the others' results keep their bits."""
    case = CacheCase(id="nonsense", dtype="float16", leftpad=(2, 0, 9), new_len=5 if appends else None, **layout)
    arguments = case.arguments()
    for name in ("k_cache", "v_cache"):
        arguments[name] = np.nan_to_num(arguments[name], nan=3)  # nonsense may lead to any row
    expected = run(arguments, implementation=kernel)
    for name, value in nonsense.items():
        arguments[name][1] = value
    results = run(arguments, implementation=kernel)
    check_call(arguments, results)
    check_bits([x[::2] for x in results[:2]], [x[::2] for x in expected[:2]])


@pytest.mark.parametrize("nonsense", [[3, 0, 40, 5], [INT_MIN, 7, INT_MAX, 9], [INT_MAX] * 4])
def test_nonsense_cu_seqlens(kernel, nonsense):
    case = CacheCase(id="cu", dtype="float16", page_size=16, packed_q=True, packed_new=True, q_lens=(4, 9, 2))
    arguments = case.arguments() | {"cu_seqlens_q": np.array(nonsense, np.int32)}
    arguments |= {name: np.nan_to_num(arguments[name]) for name in ("q", "k_new", "v_new")}
    check_call(arguments, run(arguments, implementation=kernel))


def test_sequences_may_share_pages(kernel):
    """As those do that begin with the same prompt."""
    arguments = CacheCase(id="shared", page_size=16, k_lens=(37, 96, 50)).arguments()
    arguments["page_table"][2, :2] = arguments["page_table"][0, :2] = arguments["page_table"][1, :2]
    check_call(arguments, run(arguments, implementation=kernel))


@pytest.mark.parametrize("layout", [{"page_size": 7}, {"batch_idx": True}, {}], ids=["paged", "indexed", "dense"])
def test_what_other_sequences_hold_changes_no_bit(kernel, layout):
    case = CacheCase(id="others", leftpad=(2, 0, 9), new_len=5, rotary=1.0, **layout)
    first = case.arguments()
    second = case.arguments()
    index = second.get("page_table", second.get("cache_batch_idx", np.arange(3)))[1]
    for name in ("k_cache", "v_cache"):
        second[name][index] = np.inf
    for name in ("q", "k_new", "v_new"):
        second[name][1] *= 3
    second["cache_seqlens"][1] = 50
    results = [run(arguments, implementation=kernel)[:2] for arguments in (first, second)]
    for x, y in zip(*results, strict=True):
        np.testing.assert_array_equal(x[::2], y[::2])
        assert not np.array_equal(x[1], y[1])


def test_int_length_is_that_of_all(kernel):
    arguments = CacheCase(id="int", dtype="float16", k_lens=(40, 40, 40), new_len=5, page_size=16).arguments()
    array = run(arguments, implementation=kernel)
    number = run(arguments | {"cache_seqlens": 40}, implementation=kernel)
    check_bits(array, number)
    arguments |= {name: np.nan_to_num(arguments[name], nan=3) for name in ("k_cache", "v_cache")}
    endless = run(arguments | {"cache_seqlens": 10**20}, implementation=kernel)
    check_call(arguments | {"cache_seqlens": np.full(3, 112, np.int32)}, endless)


@pytest.mark.parametrize(
    "case",
    [
        CacheCase(id="no-queries", q_lens=(0, 0, 0), new_len=5, page_size=16),
        CacheCase(id="nothing-new", new_len=0, rotary=1.0),
        CacheCase(id="no-capacity", capacity=0, k_lens=(0, 0, 0), new_len=4, rotary=1.0),
        CacheCase(id="no-sequences", q_lens=(), k_lens=(), packed_q=True, packed_new=True, page_size=16),
    ],
    ids=str,
)
def test_nothing_to_do(implementation, case):
    arguments = case.arguments()
    check_call(arguments, run(arguments, implementation=implementation))


@pytest.mark.parametrize("options", [{"page_size": 16}, {"batch_idx": True}, {"leftpad": (0, 1, 2)}], ids=str)
def test_cpu_handler_refuses_the_gradient_of_a_cache(options):
    """canonical.over_cache does it for users."""
    attention, operands, _ = canonical.over_cache(CacheCall(**CacheCase(id="refused", **options).arguments()))
    lse = jnp.zeros((3, 6, 5), jnp.float32)
    backward = jax.jit(functools.partial(launch.backward_cpu, attention))
    with pytest.raises(Exception, match="a cache has no gradient"):
        jax.block_until_ready(backward(operands, operands.q, lse, lse))


# Caches are updated in place where they may be.


@pytest.mark.parametrize(
    "options",
    [
        {"page_size": 16},
        {"page_size": 16, "rotary": 1.0, "kv_dtype": "float8_e4m3fn", "new_dtype": "bfloat16"},
        {"batch_idx": True, "dtype": "float16"},
        {"rotary": 0.5, "dtype": "float8_e4m3fn"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_donated_caches_are_not_copied(kernel, options):
    case = CacheCase(id="donated", capacity=16384, q_lens=(1, 1, 1), new_len=1, **options)
    arguments = case.arguments()
    caches = {name: jnp.asarray(arguments.pop(name)) for name in ("k_cache", "v_cache")}
    before = jax.tree.map(np.array, caches)

    def step(caches, others):
        options = arguments | others | {"implementation": kernel}
        return jax_flash.attention_with_kv_cache(**options, **caches)

    others = {name: x for name, x in arguments.items() if isinstance(x, np.ndarray)}
    kept = jax.jit(step)(caches, others)
    check_bits(caches, before)

    compiled = jax.jit(step, donate_argnums=0).lower(caches, others).compile()
    memory = compiled.memory_analysis()
    bytes_of_each = [x.nbytes for x in caches.values()]
    assert memory.alias_size_in_bytes >= sum(bytes_of_each)
    assert memory.temp_size_in_bytes < min(bytes_of_each) / 4
    check_bits(compiled(caches, others), kept)


def test_scan_over_tokens(kernel):
    """A loop that carries the caches gives what attention over all tokens does."""
    q, k, v = (np.asarray(x, np.float16) for x in np.random.default_rng(0).normal(size=(3, 2, 9, 4, 16)))
    table = jnp.asarray([[3, 0, 5], [1, 4, 2]], jnp.int32)

    def step(carry, token):
        length, *caches = carry
        out, *caches = jax_flash.attention_with_kv_cache(
            token[0], *caches, *token[1:], cache_seqlens=length, page_table=table, implementation=kernel
        )
        return (length + 1, *caches), out

    pool = jnp.full((6, 4, 4, 16), jnp.nan, jnp.float16)
    tokens = [jnp.swapaxes(x, 0, 1)[:, :, None] for x in (q, k, v)]
    _, out = jax.jit(lambda pool, tokens: jax.lax.scan(step, (jnp.zeros(2, jnp.int32), pool, pool), tokens))(
        pool, tokens
    )
    expected = jax_flash.attention(q, k, v, causal=True, implementation=kernel)
    np.testing.assert_allclose(jnp.swapaxes(out[:, :, 0], 0, 1), expected, atol=2e-3)
