"""attention under JAX's transformations. vmap is tested against a loop, over every argument alone and all together."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from test_gradients import DIFFERENTIABLE

import jax_flash

SIZE = 2
CASE = {"dtype": "float16", "q_lens": (9, 9, 9), "k_lens": (14, 14, 14), "heads": 4, "head_dim": 16, "head_dim_v": 24}
USED = {"seqused_q": (4, 9, 6), "seqused_k": (14, 3, 8)}
SOFTMAX = {"sinks": True, "softmax_scale": 0.3, "descales": "kv_head"}
LAYOUTS = {
    "dense": Case(id="dense", **CASE, **USED, **SOFTMAX),
    "packed": Case(id="packed", **CASE, **SOFTMAX, packed_q=True, packed_k=True),
    "packed-q": Case(id="packed-q", **CASE, **SOFTMAX, packed_q=True, seqused_k=(14, 3, 8)),
    "packed-k": Case(id="packed-k", **CASE, **USED, packed_k=True, causal=True),
}


def arrays_of(case: Case) -> dict:
    """The arguments that may be mapped, in arrays."""
    arguments = {name: np.asarray(x) for name, x in case.arguments().items() if isinstance(x, (np.ndarray, float))}
    arguments.pop("softcap")
    if "softmax_scale" in arguments:
        arguments["softmax_scale"] = arguments["softmax_scale"].astype(np.float32)
    return arguments


def attend(case: Case, implementation: str, **more):
    options = {"causal": case.causal, "return_lse": True, "implementation": implementation} | more
    return lambda arrays: jax_flash.attention(**arrays, **options)


def mapped(arrays: dict, names) -> tuple[dict, dict]:
    """The arrays with `names` stacked SIZE times, each a little different and along another axis; and the axes."""
    stacked, axes = dict(arrays), dict.fromkeys(arrays)
    for turn, name in enumerate(names):
        x = arrays[name]
        step = np.asarray(1 if x.dtype == np.int32 else 0.25, x.dtype)
        axes[name] = turn % (x.ndim + 1)
        stacked[name] = np.stack([x + index * step for index in range(SIZE)], axes[name])
    return stacked, axes


def one(stacked: dict, axes: dict, index: int) -> dict:
    """The arrays of one index of the mapped axes."""
    return {name: x if axes[name] is None else np.take(x, index, axes[name]) for name, x in stacked.items()}


def check_map(function, stacked, axes):
    """vmap of a function is the loop over it."""
    results = jax.jit(jax.vmap(function, in_axes=(axes,)))(stacked)
    function = jax.jit(function)
    expected = [function(one(stacked, axes, index)) for index in range(SIZE)]
    check_equal(results, jax.tree.map(lambda *xs: np.stack(xs), *expected))


def check_equal(results, expected):
    def check(path, x, y):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=4e-3, atol=4e-3, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, results, expected)


def loss_of(function):
    """A scalar of (out, lse) to differentiate."""

    def loss(floats, others):
        out, lse = function(others | floats)
        return (out.astype(jnp.float32) ** 2).sum() + jnp.where(jnp.isneginf(lse), 0, jnp.sin(lse)).sum()

    return loss


def gradient_of(function):
    """Gradients of a scalar of (out, lse) in all arguments that have one."""

    def gradient(arrays):
        floats = {name: x for name, x in arrays.items() if name in DIFFERENTIABLE}
        return jax.grad(loss_of(function))(floats, {name: x for name, x in arrays.items() if name not in floats})

    return gradient


EVERY_ARGUMENT = [(layout, (name,)) for layout, case in LAYOUTS.items() for name in arrays_of(case)]
TOGETHER = [(layout, tuple(arrays_of(case))) for layout, case in LAYOUTS.items()] + [
    ("dense", ("k", "v")),
    ("packed", ("q", "cu_seqlens_k")),
    ("packed-q", ("cu_seqlens_q", "seqused_k", "sinks")),
    ("packed-k", ("q", "seqused_q")),
]


def id_of(value):
    return value if isinstance(value, str) else "+".join(value)


@pytest.mark.parametrize(("layout", "names"), EVERY_ARGUMENT, ids=id_of)
def test_vmap_over_one_argument(kernel, layout, names):
    case = LAYOUTS[layout]
    check_map(attend(case, kernel), *mapped(arrays_of(case), names))


@pytest.mark.parametrize(("layout", "names"), TOGETHER, ids=id_of)
def test_vmap_over_several_arguments(implementation, layout, names):
    case = LAYOUTS[layout]
    check_map(attend(case, implementation), *mapped(arrays_of(case), names))


@pytest.mark.parametrize(("layout", "names"), TOGETHER, ids=id_of)
def test_vmap_of_gradient(kernel, layout, names):
    """Gradients of one element of the map must not land in another."""
    case = LAYOUTS[layout]
    check_map(gradient_of(attend(case, kernel)), *mapped(arrays_of(case), names))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap_of_vmap(kernel, layout):
    case = LAYOUTS[layout]
    function = attend(case, kernel)
    inner, inner_axes = mapped(arrays_of(case), ["q", "k"])
    outer, outer_axes = mapped(inner, ["v", "q"])
    check_map(jax.vmap(function, in_axes=(inner_axes,)), outer, outer_axes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_vmap(kernel, layout):
    """An argument that is not mapped gets the sum of the gradients of all elements."""
    case = LAYOUTS[layout]
    function = attend(case, kernel)
    stacked, axes = mapped(arrays_of(case), ["q", "v"])
    result = jax.jit(gradient_of(jax.vmap(function, in_axes=(axes,))))(stacked)
    each = [jax.jit(gradient_of(function))(one(stacked, axes, index)) for index in range(SIZE)]
    expected = {
        name: sum(x[name].astype(jnp.float32) for x in each)
        if axes[name] is None
        else np.stack([x[name] for x in each], axes[name])
        for name in result
    }
    check_equal(result, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_jit_is_eager(implementation, layout):
    case = LAYOUTS[layout]
    function, arrays = attend(case, implementation), arrays_of(case)
    check_equal(jax.jit(function)(arrays), function(arrays))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_remat(kernel, layout):
    case = LAYOUTS[layout]
    function, arrays = attend(case, kernel), arrays_of(case)
    check_equal(jax.jit(gradient_of(jax.checkpoint(function)))(arrays), jax.jit(gradient_of(function))(arrays))


def test_scan_over_layers(kernel):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 11, 4, 16)), jnp.float16)
    scales = jnp.asarray([0.3, 0.2, 0.5], jnp.float32)

    def layer(x, scale):
        return jax_flash.attention(x, x, x, causal=True, softmax_scale=scale, implementation=kernel), None

    def scanned(x, scales):
        return jax.lax.scan(layer, x, scales)[0].astype(jnp.float32).sum()

    def unrolled(x, scales):
        for scale in scales:
            x, _ = layer(x, scale)
        return x.astype(jnp.float32).sum()

    results = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(x, scales) for f in (scanned, unrolled))
    check_equal(*results)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eval_shape(implementation, layout):
    case = LAYOUTS[layout]
    out, lse = jax.eval_shape(attend(case, implementation, out_dtype="bfloat16"), arrays_of(case))
    assert out.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    assert (out.shape, lse.shape) == (((30, 4, 24), (4, 30)) if case.packed_q else ((3, 9, 4, 24), (3, 4, 9)))


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_donated_inputs(kernel):
    case = LAYOUTS["dense"]
    function, arrays = attend(case, kernel), arrays_of(case)
    expected = jax.jit(function)(arrays)
    check_equal(jax.jit(function, donate_argnums=0)(jax.tree.map(jnp.array, arrays)), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_traced_softmax_scale(implementation, layout):
    case = LAYOUTS[layout]
    function, arrays = attend(case, implementation), arrays_of(case)
    arrays.pop("softmax_scale", None)
    traced = jax.jit(lambda scale: function(arrays | {"softmax_scale": scale}))(0.125)
    check_equal(traced, jax.jit(lambda: function(arrays | {"softmax_scale": 0.125}))())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap_over_nothing(implementation, layout):
    case = LAYOUTS[layout]
    arrays = arrays_of(case)
    arrays["q"] = np.zeros((*arrays["q"].shape[:2], 0, *arrays["q"].shape[2:]), np.float16)
    axes = dict.fromkeys(arrays) | {"q": 2}
    function = attend(case, implementation)
    out, lse = jax.jit(jax.vmap(function, in_axes=(axes,)))(arrays)
    assert (out.shape, lse.shape) == tuple((0, *x.shape) for x in jax.eval_shape(function, arrays_of(case)))
    gradients = jax.jit(jax.vmap(gradient_of(function), in_axes=(axes,)))(arrays)
    assert {x.shape[0] for x in gradients.values()} == {0}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_jit(kernel, layout):
    case = LAYOUTS[layout]
    function, arrays = gradient_of(attend(case, kernel)), arrays_of(case)
    with jax.disable_jit():
        result = function(arrays)
    check_equal(result, jax.jit(function)(arrays))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_under_x64(kernel, layout):
    case = LAYOUTS[layout]
    function, arrays = gradient_of(attend(case, kernel)), arrays_of(case)
    with jax.enable_x64(True):
        result = jax.jit(function)(arrays)
    check_equal(result, jax.jit(function)(arrays))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_are_not_promoted(implementation, layout):
    case = LAYOUTS[layout]
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(gradient_of(attend(case, implementation)), arrays_of(case))


def test_vmap_without_lse(kernel):
    q, k, v = (
        jax.random.normal(key, (3, 2, 17, 4, 32), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3)
    )
    attend = functools.partial(jax_flash.attention, implementation=kernel)
    expected = jnp.stack([attend(*one) for one in zip(q, k, v, strict=True)])
    np.testing.assert_array_equal(jax.vmap(attend)(q, k, v), expected)
