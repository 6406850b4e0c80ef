"""The definition against NumPy in float64, which shares no computation with it."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import FEATURES, Case
from test_attention import NONSENSE
from tolerance import run

import jax_flash
from jax_flash import canonical, reference
from jax_flash.spec import CacheCall, Call

SMALL = [case for case in FEATURES if case.dtype == "float32"] + [
    Case(id=f"{layout}-{feature}", dtype=dtype, heads=4, head_dim=24, head_dim_v=16, **shape, **options)
    for layout, shape in {
        "dense": {"q_lens": (9, 9, 9), "k_lens": (14, 14, 14)},
        "packed": {"q_lens": (9, 0, 13), "k_lens": (14, 5, 0), "packed_q": True, "packed_k": True, "front": 2},
        "packed-q": {"q_lens": (9, 3, 13), "k_lens": (14, 14, 14), "packed_q": True},
        "packed-k": {"q_lens": (9, 9, 9), "k_lens": (14, 0, 3), "packed_k": True, "front": 5},
    }.items()
    for feature, dtype, options in (
        ("window", "float32", {"window_size": (4, 2), "seqused_q": (5, 2, 9), "seqused_k": (10, 20, 1)}),
        ("all", "float16", {"causal": True, "softcap": 1.5, "sinks": True, "descales": "head", "softmax_scale": 0.4}),
        ("fp8", "float8_e4m3fn", {"window_size": (-1, 3), "descales": "kv_head", "out_dtype": "float32"}),
        ("left-window", "bfloat16", {"window_size": (3, -1), "descales": "batch", "sinks": True}),
    )
]


def check_float(arguments, out, lse):
    expected_out, expected_lse = oracle.attention(arguments)
    tolerance = {"float16": 2e-3, "bfloat16": 1.5e-2, "float32": 1e-5}[out.dtype.name]
    np.testing.assert_allclose(np.asarray(out, np.float64), expected_out, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_reference_is_the_oracle(case):
    arguments = case.arguments()
    check_float(arguments, *run(arguments, implementation="xla"))


@pytest.mark.parametrize("case", SMALL[:6], ids=str)
def test_blocks_change_nothing(case, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_SCORES", 1000)
    arguments = case.arguments()
    check_float(arguments, *run(arguments, implementation="xla"))


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_nonsense_index_arrays_by_definition(nonsense):
    case = Case(id="n", dtype="float32", packed_q=True, packed_k=True, q_lens=(20, 20, 13), k_lens=(17, 13, 23), tail=0)
    arguments = case.arguments() | {
        "cu_seqlens_q": np.array(NONSENSE["up-and-down"], np.int32),
        "cu_seqlens_k": np.array(NONSENSE[nonsense], np.int32),
        "seqused_k": np.array([2**31 - 1, -1, 7], np.int32),
        "causal": True,
    }
    check_float(arguments, *run(arguments, implementation="xla"))


def test_float64_under_x64():
    case = Case(id="x64", dtype="float32", q_lens=(9, 9), k_lens=(14, 14), sinks=True, softcap=2.0)
    arguments = case.arguments()
    with jax.enable_x64(True):
        attention, operands = canonical.canonical(Call(**arguments))
        as_float64 = operands._replace(**{name: jnp.asarray(arguments[name], jnp.float64) for name in "qkv"})
        gradient = jax.grad(lambda q: reference.forward(attention, as_float64._replace(q=q))[0].sum())(as_float64.q)
        out, lse = reference.attention(**arguments)
    assert gradient.dtype == np.float64
    check_float(arguments, out, lse)


def test_attention_xla_is_the_reference():
    arguments = Case(id="same", packed_q=True, packed_k=True, causal=True, head_dim=7, head_dim_v=300).arguments()
    for x, y in zip(run(arguments, implementation="xla"), reference.attention(**arguments), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("function", "call"), [(jax_flash.attention, Call), (jax_flash.attention_with_kv_cache, CacheCall)]
)
def test_calls_have_the_arguments_and_defaults_of_the_functions(function, call):
    public, own = (inspect.signature(x).parameters.values() for x in (function, call))
    assert {x.name: (x.kind, x.default) for x in public} == {x.name: (x.kind, x.default) for x in own}
    positional = [[x.name for x in side if x.kind is x.POSITIONAL_OR_KEYWORD] for side in (public, own)]
    assert positional[0] == positional[1]


def test_sequence_index():
    case = Case(id="i", packed_q=True, q_lens=(3, 0, 2), k_lens=(4, 4, 4), front=1, tail=2, seqused_k=(2, 9, 0))
    _, operands = canonical.canonical(Call(**case.arguments()))
    q_index, k_index = reference.sequence_index(operands)
    assert q_index.tolist() == [[-1, 0, 0, 0, 2, 2, -1, -1]]
    assert k_index.tolist() == [[0, 0, -1, -1], [1, 1, 1, 1], [-1, -1, -1, -1]]


@pytest.mark.parametrize("case", [case for case in SMALL if case.dtype in ("float32", "bfloat16")], ids=str)
def test_backward_is_the_gradient_of_forward(case, monkeypatch):
    attention, operands = canonical.canonical(Call(**case.arguments()))
    scores = operands.q.shape[0] * operands.q.shape[1] * operands.q.shape[2] * operands.k.shape[0] * operands.k.shape[1]
    monkeypatch.setattr(reference, "BLOCK_SCORES", scores // 3)
    rng = np.random.default_rng(0)
    dout = jnp.asarray(rng.normal(size=(*operands.q.shape[:3], operands.v.shape[3])), attention.out_dtype)
    dlse = jnp.asarray(rng.normal(size=(*operands.q.shape[:1], operands.q.shape[2], operands.q.shape[1])), jnp.float32)

    @jax.jit
    def both(operands, dout, dlse):
        def forward(q, k, v):
            return reference.forward(attention, operands._replace(q=q, k=k, v=v))

        (out, lse), gradient = jax.vjp(forward, *operands[:3])
        delta = jnp.einsum("gqhd,gqhd->ghq", dout.astype(jnp.float32), out.astype(jnp.float32)) - dlse
        q_used = reference.sequence_index(operands)[0] >= 0
        poisoned = jnp.where(q_used[..., None, None], dout, jnp.nan).astype(dout.dtype)
        return reference.backward(attention, operands, poisoned, lse, delta), gradient((dout, dlse))

    tolerance = 1e-5 if case.dtype == "float32" else 3e-2
    for name, result, truth in zip("qkv", *both(operands, dout, dlse), strict=True):
        assert result.dtype == truth.dtype
        result, truth = (np.asarray(x, np.float32) for x in (result, truth))
        np.testing.assert_allclose(result, truth, rtol=tolerance, atol=tolerance, err_msg=f"d{name}")


def test_memory_is_linear():
    length = 16384
    x = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.bfloat16)

    def loss(q, k, v):
        return reference.attention(q, k, v, causal=True).astype(jnp.float32).sum()

    memory = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * length**2 * 4 / 8
