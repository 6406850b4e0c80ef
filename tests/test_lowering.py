"""Lowering for a platform that is not here: a kernel is compiled and its call written without a GPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case

import jax_flash
from jax_flash import canonical, jit, launch, primitive
from jax_flash.spec import Call

CUDA_CALL = "jax_flash_cuda_launch"
CPU_CALL = "jax_flash_cpu_forward"


@pytest.fixture(autouse=True)
def nothing_yet(no_gpu):
    """No GPU, and no warning given yet."""
    primitive._warn_reference.cache_clear()


def lowered(platform: str, case: Case, **more) -> str:
    """The module that calls `attention` with a case's arguments, as text."""
    arguments = case.arguments() | more
    arrays = {name: x for name, x in arguments.items() if isinstance(x, np.ndarray)}
    static = {name: x for name, x in arguments.items() if name not in arrays}
    function = jax.jit(lambda arrays: jax_flash.attention(**arrays, **static))
    return function.trace(arrays).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_cuda_calls_a_kernel(dtype, packed):
    lengths = (9000, 9000)  # more tiles than a GPU has multiprocessors
    case = Case(id="cuda", dtype=dtype, packed_q=packed, packed_k=packed, causal=True, q_lens=lengths, k_lens=lengths)
    text = lowered("cuda", case)
    assert text.count(f"custom_call @{CUDA_CALL}") == 1
    assert CPU_CALL not in text
    # Packed queries alone count what CTAs draw, in one more result.
    assert ("counters = 2 : i64" in text) == packed
    assert ("tensor<1xi32>" in text) == packed


def test_cuda_differentiates_what_it_computed():
    case = Case(id="gradient", causal=True, return_lse=False)
    arrays = {name: case.arguments()[name] for name in ("q", "k", "v")}
    gradient = jax.jit(jax.grad(lambda arrays: jax_flash.attention(**arrays, causal=True).astype(jnp.float32).sum()))
    text = gradient.trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(f"custom_call @{CUDA_CALL}") == 1


def test_cpu_calls_its_handler():
    text = lowered("cpu", Case(id="cpu", causal=True))
    assert text.count(f"custom_call @{CPU_CALL}") == 1
    assert CUDA_CALL not in text


def test_float32_runs_as_plain_jnp_on_cuda():
    with pytest.warns(UserWarning, match="runs as plain jnp here: the CUDA kernels take .*, not float32"):
        text = lowered("cuda", Case(id="float32", dtype="float32"))
    assert "jax_flash" not in text.replace("jit_jax_flash", "")


def test_large_softcap_runs_as_plain_jnp_on_cuda():
    with pytest.warns(UserWarning, match="runs as plain jnp here: .* take a softcap of at most 10000, not 10001"):
        assert CUDA_CALL not in lowered("cuda", Case(id="softcap", softcap=10001.0))
    assert CUDA_CALL in lowered("cuda", Case(id="softcap", softcap=10000.0))


@pytest.mark.parametrize(("length", "served"), [(2**29 - 8, True), (2**29, False)])
def test_rows_are_counted_in_32_bits(length, served):
    x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.bfloat16)
    attention, operands = canonical.canonical(Call(**Case(id="small").arguments()))
    reason = launch.why_not_served(attention, operands._replace(k=x, v=x))
    assert reason is None if served else "are 536870912 or more" in reason


def test_missing_nvrtc_runs_as_plain_jnp_on_cuda(monkeypatch):
    monkeypatch.setattr(jit, "why_no_nvrtc", lambda: "NVRTC is missing.")
    with pytest.warns(UserWarning, match="runs as plain jnp here: NVRTC is missing"):
        assert CUDA_CALL not in lowered("cuda", Case(id="no-nvrtc"))


@pytest.mark.parametrize(("named", "platform"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_named_implementation_refuses_another_platform(monkeypatch, named, platform):
    monkeypatch.setattr(launch, "why_no_cuda", lambda: None)
    with pytest.raises(NotImplementedError, match=f"'{named}' cannot run here: .* compiled for platform {platform}"):
        lowered(platform, Case(id="named"), implementation=named)


def test_float32_is_refused_where_cuda_is_named(monkeypatch):
    monkeypatch.setattr(launch, "why_no_cuda", lambda: None)
    with pytest.raises(NotImplementedError, match=r"'cuda' cannot run here: the CUDA kernels take .*, not float32"):
        lowered("cuda", Case(id="float32", dtype="float32"), implementation="cuda")


def test_too_many_rows_by_vmap_are_refused_where_cuda_is_named(monkeypatch):
    monkeypatch.setattr(launch, "why_no_cuda", lambda: None)
    x = jax.ShapeDtypeStruct((2**10, 1, 2**19, 1, 8), jnp.bfloat16)
    attend = jax.jit(jax.vmap(functools.partial(jax_flash.attention, implementation="cuda")))
    with pytest.raises(NotImplementedError, match=r"'cuda' cannot run here: .* are 536870912 or more"):
        jax.export.export(attend, platforms=["cuda"])(x, x, x)


def test_other_gpus_are_named_by_their_capability(monkeypatch):
    class Ampere:
        compute_capability = "8.0"

    monkeypatch.setattr(launch.jax, "devices", lambda platform: [Ampere()])
    assert "compute capability 8.0; the kernels need 9.0" in launch.why_no_cuda()
    with pytest.warns(UserWarning, match="runs as plain jnp here: the GPU has compute capability 8.0"):
        assert CUDA_CALL not in lowered("cuda", Case(id="ampere"))
