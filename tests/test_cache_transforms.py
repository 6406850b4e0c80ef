"""attention_with_kv_cache under JAX's transformations, which test_transforms.py tests `attention` under."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_cases import CacheCase
from test_transforms import SIZE, check_equal, check_map, id_of, mapped

import jax_flash

CASE = {"dtype": "float16", "q_lens": (3, 3, 3), "heads": 4, "head_dim": 16, "head_dim_v": 24, "capacity": 24}
PAGES = {"page_size": 4, "k_lens": (9, 20, 3), "leftpad": (1, 0, 2), "sinks": True}
NEW = {"new_len": 2, "rotary": 0.5}
LAYOUTS = {
    "pages": CacheCase(id="pages", **CASE, **PAGES),
    "pages-new": CacheCase(id="pages-new", **CASE, **PAGES, **NEW, kv_dtype="float8_e4m3fn", new_dtype="float16"),
    "indexed": CacheCase(id="indexed", **CASE, batch_idx=True, k_lens=(9, 20, 3), descales="kv_head"),
    "indexed-new": CacheCase(id="indexed-new", **CASE, **NEW, batch_idx=True, k_lens=(9, 23, 0), causal=False),
    "dense": CacheCase(id="dense", **CASE, k_lens=(9, 20, 3), leftpad=(1, 0, 2)),
    "dense-new": CacheCase(id="dense-new", **CASE, **NEW, k_lens=(9, 20, 3)),
    "packed": CacheCase(id="packed", **CASE, **PAGES, packed_q=True, packed_new=True, rotary=1.0),
}


def arrays_of(case: CacheCase) -> dict:
    """The arguments that may be mapped; rows that hold no key are zero, for a map may lead there."""
    arrays = {name: x for name, x in case.arguments().items() if isinstance(x, np.ndarray)}
    return arrays | {name: np.nan_to_num(arrays[name].astype(np.float32)).astype(arrays[name].dtype) for name in CACHES}


CACHES = ("k_cache", "v_cache")


def attend(case: CacheCase, implementation: str):
    options = {name: x for name, x in case.arguments().items() if not isinstance(x, np.ndarray)}
    return lambda arrays: jax_flash.attention_with_kv_cache(**arrays, **options, implementation=implementation)


EVERY_ARGUMENT = [
    (layout, (name,)) for layout, case in LAYOUTS.items() if layout != "dense" for name in arrays_of(case)
]
TOGETHER = [(layout, tuple(arrays_of(case))) for layout, case in LAYOUTS.items()] + [
    ("pages", ("q", "page_table")),
    ("pages", CACHES),
    ("indexed", ("v_cache", "cache_batch_idx")),
    ("packed", ("q", "cu_seqlens_q")),
]


@pytest.mark.parametrize(("layout", "names"), EVERY_ARGUMENT, ids=id_of)
def test_vmap_over_one_argument(kernel, layout, names):
    case = LAYOUTS[layout]
    check_map(attend(case, kernel), *mapped(arrays_of(case), names))


@pytest.mark.parametrize(("layout", "names"), TOGETHER, ids=id_of)
def test_vmap_over_several_arguments(implementation, layout, names):
    case = LAYOUTS[layout]
    check_map(attend(case, implementation), *mapped(arrays_of(case), names))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap_of_vmap(kernel, layout):
    case = LAYOUTS[layout]
    inner, inner_axes = mapped(arrays_of(case), ["q", "cache_seqlens"])
    outer, outer_axes = mapped(inner, ["v_cache", "q"])
    check_map(jax.vmap(attend(case, kernel), in_axes=(inner_axes,)), outer, outer_axes)


@pytest.mark.parametrize("layout", ["pages", "indexed"])
def test_a_cache_that_is_not_mapped_stays_one(kernel, layout):
    case = LAYOUTS[layout]
    index = "page_table" if case.page_size else "cache_batch_idx"
    stacked, axes = mapped(arrays_of(case), ["q", index])
    groups, *rest = stacked["k_cache"].shape
    text = jax.jit(jax.vmap(attend(case, kernel), in_axes=(axes,))).lower(stacked).as_text()
    shape = "x".join(map(str, rest))
    assert f"tensor<{groups}x{shape}x" in text
    assert f"tensor<{SIZE * groups}x{shape}x" not in text


@pytest.mark.parametrize("nonsense", [-1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("layout", ["pages-new", "indexed-new"])
def test_nonsense_leads_to_no_other_element_of_a_map(kernel, layout, nonsense):
    case = LAYOUTS[layout]
    index = "page_table" if case.page_size else "cache_batch_idx"
    arrays = arrays_of(case)
    stacked, axes = mapped(arrays, [index, *CACHES, "k_new"])
    stacked[index] = np.moveaxis(np.stack([np.full_like(arrays[index], nonsense), arrays[index]]), 0, axes[index])
    check_map(attend(case, kernel), stacked, axes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_jit_is_eager(kernel, layout):
    function, arrays = attend(LAYOUTS[layout], kernel), arrays_of(LAYOUTS[layout])
    jitted = jax.jit(function)(arrays)
    check_equal(jitted, function(arrays))
    with jax.disable_jit():
        check_equal(jitted, function(arrays))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_under_strict_rules_and_x64(kernel, layout):
    function, arrays = attend(LAYOUTS[layout], kernel), arrays_of(LAYOUTS[layout])
    expected = jax.jit(function)(arrays)
    with jax.numpy_rank_promotion("raise"):
        check_equal(jax.jit(function)(jax.tree.map(jnp.asarray, arrays)), expected)
    with jax.enable_x64(True):
        results = jax.jit(function)(arrays)
    assert [x.dtype for x in results] == [x.dtype for x in expected]
    check_equal(results, expected)


@pytest.mark.parametrize("layout", ["pages", "packed"])
def test_vmap_over_nothing(implementation, layout):
    case = LAYOUTS[layout]
    arrays = arrays_of(case)
    arrays["q"] = np.zeros((0, *arrays["q"].shape), np.float16)
    axes = dict.fromkeys(arrays) | {"q": 0}
    function = attend(case, implementation)
    results = jax.jit(jax.vmap(function, in_axes=(axes,)))(arrays)
    assert [x.shape for x in results] == [(0, *x.shape) for x in jax.eval_shape(function, arrays_of(case))]


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k_new", "v_new", "rotary_cos", "sinks", "k_descale"])
def test_gradients_are_refused(implementation, name):
    case = CacheCase(id="refused", new_len=5, rotary=1.0, sinks=True, descales="batch", dtype="bfloat16")
    arrays = arrays_of(case)

    def loss(x):
        return attend(case, implementation)(arrays | {name: x})[0].sum()

    with pytest.raises(NotImplementedError, match="attention_with_kv_cache is for inference and has no gradient"):
        jax.eval_shape(jax.grad(loss), arrays[name])
    constant = jax.eval_shape(jax.grad(lambda x: (x * loss(jax.lax.stop_gradient(x))).sum()), arrays[name])
    assert constant.shape == arrays[name].shape
