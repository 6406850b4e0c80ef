"""Where tests run: fixtures of implementations, and the tests that need a GPU, deselected aloud where there is none."""

from __future__ import annotations

import os

# Read when JAX first meets a GPU. Several workers share one, so none may take most of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Nor a CPU's cores, which NumPy's threads wait for by spinning.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Most of what XLA compiles here runs once and is small: to make it fast takes longer than to run it. The examples run
# without these flags.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 --xla_gpu_autotune_level=0"
)

import jax
import pytest

NEEDS_GPU = pytest.StashKey[int]()

CPU, CUDA = "cpu", pytest.param("cuda", marks=pytest.mark.gpu)


def on_each_kernel(cases):
    """Each case on each platform that serves it: CUDA has no float32."""
    cpu = [pytest.param(CPU, case, id=f"cpu-{case}") for case in cases]
    cuda = [
        pytest.param("cuda", case, id=f"cuda-{case}", marks=CUDA.marks) for case in cases if case.dtype != "float32"
    ]
    return cpu + cuda


def _on_its_device(implementation: str):
    device = jax.devices("cuda" if implementation == "cuda" else "cpu")[0]
    with jax.default_device(device):
        yield implementation


@pytest.fixture(params=[CPU, CUDA])
def kernel(request):
    """An implementation with kernels; the test's arrays are made on its device."""
    yield from _on_its_device(request.param)


@pytest.fixture(params=["xla", CPU, CUDA])
def implementation(request):
    """Any implementation; the test's arrays are made on its device."""
    yield from _on_its_device(request.param)


@pytest.fixture
def no_gpu(monkeypatch):
    """As on a machine without a GPU."""
    devices = jax.devices

    def without_cuda(backend=None):
        if backend == "cuda":
            raise RuntimeError("Unknown backend cuda")
        return devices(backend)

    monkeypatch.setattr(jax, "devices", without_cuda)


def has_gpu() -> bool:
    """Whether a GPU of compute capability 9.0 is here."""
    try:
        return jax.devices("cuda")[0].compute_capability == "9.0"
    except RuntimeError:
        return False


def pytest_collection_modifyitems(config, items):
    needs_gpu = [] if has_gpu() else [item for item in items if item.get_closest_marker("gpu")]
    config.stash[NEEDS_GPU] = len(needs_gpu)
    if needs_gpu:
        config.hook.pytest_deselected(items=needs_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def pytest_sessionfinish(session):
    # Under pytest-xdist only the workers collect; each tells the process that writes the summary.
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["needs_gpu"] = session.config.stash[NEEDS_GPU]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    node.config.stash[NEEDS_GPU] = getattr(node, "workeroutput", {}).get("needs_gpu", 0)


def pytest_terminal_summary(terminalreporter, config):
    if count := config.stash.get(NEEDS_GPU, 0):
        terminalreporter.write_line(f"{count} tests need a GPU of compute capability 9.0 and did not run.", yellow=True)
