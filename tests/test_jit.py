"""The compiler and its cache on disk: whatever is wrong with the cache costs time and nothing else."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from jax_flash import jit

SOURCE = 'extern "C" __global__ void empty() {}'
RACERS = 8


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and nothing in memory."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("JAX_FLASH_CACHE_DIR", str(folder))
    monkeypatch.setattr(jit, "_memory", {})
    return folder


@pytest.fixture
def builds(monkeypatch):
    """The sources that were compiled, in order."""
    sources = []
    build = jit._build

    def recorded(source):
        sources.append(source)
        return build(source)

    monkeypatch.setattr(jit, "_build", recorded)
    return sources


def forget():
    """What the next process would know: the disk alone."""
    jit._memory.clear()


def test_kernel_is_built_once(cache, builds):
    first = jit.compile(SOURCE)
    assert jit.compile(SOURCE) is first
    forget()
    assert jit.compile(SOURCE) == first
    assert builds == [SOURCE]
    assert first.cubin.startswith(b"\x7fELF")
    assert first.registers > 0
    assert first.spill_bytes == 0
    assert not first.serialized


DAMAGES = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[:-1],
    "no-cubin": lambda content: content.split(b"\n", 1)[0],
    "flipped-bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "not-json": lambda content: b"{" + content,
    "other-json": lambda content: b"[]\n" + content,
    "no-log": lambda content: content.replace(b'"log"', b'"gol"'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_rebuilt(cache, builds, damage):
    kernel = jit.compile(SOURCE)
    (file,) = cache.iterdir()
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    for _ in range(2):  # the first finds the damage, the second a sound file
        forget()
        assert jit.compile(SOURCE).cubin == kernel.cubin
    assert len(builds) == 2
    assert list(cache.iterdir()) == [file]


def check_built_each_time(builds):
    kernel = jit.compile(SOURCE)
    forget()
    assert jit.compile(SOURCE).cubin == kernel.cubin
    assert len(builds) == 2


def test_folder_that_cannot_be_made_costs_only_time(cache, builds):
    cache.write_text("a file where the folder should be")  # root may write to any folder, but not below a file
    check_built_each_time(builds)


def test_full_disk_costs_only_time(cache, builds, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    check_built_each_time(builds)
    assert list(cache.iterdir()) == []


def test_processes_race_on_an_empty_cache(cache):
    program = f"""
from jax_flash import jit
input(jit.cache_folder())
print(len(jit.compile({SOURCE!r}).cubin))
"""
    command = [sys.executable, "-c", program]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    racers = [subprocess.Popen(command, text=True, **pipes) for _ in range(RACERS)]
    for racer in racers:  # when all are ready, all may start
        assert racer.stdout.read(len(str(cache))) == str(cache)
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    results = [racer.communicate() for racer in racers]
    kernel = jit.compile(SOURCE)
    assert results == [(f"{len(kernel.cubin)}\n", "")] * RACERS
    (file,) = cache.iterdir()
    assert file.read_bytes().endswith(kernel.cubin)


def test_key_changes_with_whatever_shapes_the_cubin(cache, builds, monkeypatch):
    for source in (SOURCE, SOURCE + "\n"):
        jit.compile(source)
    monkeypatch.setattr(jit, "compiler_version", lambda: "another")
    jit.compile(SOURCE)
    monkeypatch.setattr(jit, "_OPTIONS", [*jit._OPTIONS, b"--use_fast_math"])
    jit.compile(SOURCE)
    assert len(builds) == len(list(cache.iterdir())) == 4


def test_failing_compile_shows_the_log(cache):
    with pytest.raises(jit.CompileError, match=r'(?s)NVRTC could not compile.*identifier "missing" is undefined'):
        jit.compile('extern "C" __global__ void broken() { missing(); }')
    assert not cache.exists()


def test_missing_nvrtc_says_how_to_install_it(monkeypatch):
    assert jit.why_no_nvrtc() is None
    jit.compiler_version.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert "pip install '.[cuda13]'" in jit.why_no_nvrtc()


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"JAX_FLASH_CACHE_DIR": "/kernels", "XDG_CACHE_HOME": "/cache"}, "/kernels"),
        ({"XDG_CACHE_HOME": "/cache"}, "/cache/jax_flash"),
        ({"HOME": "/home/someone"}, "/home/someone/.cache/jax_flash"),
    ],
)
def test_cache_folder(monkeypatch, variables, folder):
    for name in ("JAX_FLASH_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(jit.cache_folder()) == folder
