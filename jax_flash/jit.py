"""CUDA C++ text to cubin, by NVRTC, with a cache on disk. Needs neither a GPU nor a driver nor a CUDA toolkit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import tempfile

_OPTIONS = [b"--gpu-architecture=sm_90a", b"--std=c++17", b"--ptxas-options=-v"]
_SPILL = re.compile(r"(\d+) bytes spill (?:stores|loads)")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SERIALIZED = re.compile(r"C751[012]|wgmma.*serializ", re.IGNORECASE)


class CompileError(RuntimeError):
    """NVRTC refused a kernel; the message holds its log."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """A compiled kernel."""

    cubin: bytes
    log: str
    """What NVRTC and ptxas reported."""

    @property
    def registers(self) -> int:
        """Registers a thread holds at launch."""
        return max(map(int, _REGISTERS.findall(self.log)), default=0)

    @property
    def spill_bytes(self) -> int:
        """Bytes of registers that ptxas stored to and loaded from local memory."""
        return sum(map(int, _SPILL.findall(self.log)))

    @property
    def serialized(self) -> bool:
        """Whether ptxas made wgmma wait after each instruction (its notes C7510 to C7512)."""
        return bool(_SERIALIZED.search(self.log))

    @property
    def clean(self) -> bool:
        """Whether ptxas kept all values in registers and all wgmma asynchronous."""
        return self.spill_bytes == 0 and not self.serialized


def why_no_nvrtc() -> str | None:
    """Why kernels cannot be compiled here, or None."""
    try:
        compiler_version()
    except Exception as error:  # the bindings raise types of their own when a shared library is missing
        return (
            f"NVRTC, which compiles the kernels, cannot be used ({type(error).__name__}: {error}). "
            "Install jax_flash with its extra cuda13, or cuda12, as your jax: pip install '.[cuda13]'."
        )
    return None


def compile(source: str) -> Kernel:
    """The kernel of a source text: from this process, from the disk, or from NVRTC."""
    key = hashlib.sha256(b"\0".join([source.encode(), *_OPTIONS, compiler_version().encode()])).hexdigest()
    return _load_or_build(key, source)


def cache_folder() -> pathlib.Path:
    """Where cubins are kept: $JAX_FLASH_CACHE_DIR, or jax_flash in the user's cache folder."""
    if folder := os.environ.get("JAX_FLASH_CACHE_DIR"):
        return pathlib.Path(folder)
    try:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        return pathlib.Path(tempfile.gettempdir()) / f"jax_flash-{os.getuid()}"
    return pathlib.Path(base) / "jax_flash"


_memory: dict[str, Kernel] = {}


def _load_or_build(key: str, source: str) -> Kernel:
    kernel = _memory.get(key) or _read(key)
    if kernel is None:
        kernel = _build(source)
        _publish(key, kernel)
    _memory[key] = kernel
    return kernel


@functools.cache
def compiler_version() -> str:
    """Of NVRTC, as "13.0"; raises whatever keeps it from being used."""
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"nvrtcVersion returned {status}")
    return f"{major}.{minor}"


def _build(source: str) -> Kernel:
    from cuda.bindings import nvrtc

    def call(function, *arguments):
        status, *results = function(*arguments)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"{function.__name__} failed on a kernel of jax_flash: {status}")
        return results[0] if results else None

    program = call(nvrtc.nvrtcCreateProgram, source.encode(), b"jax_flash.cu", 0, [], [])
    try:
        status, *_ = nvrtc.nvrtcCompileProgram(program, len(_OPTIONS), _OPTIONS)
        text = bytearray(call(nvrtc.nvrtcGetProgramLogSize, program))
        call(nvrtc.nvrtcGetProgramLog, program, text)
        log = text.decode(errors="replace").rstrip("\0 \n")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"NVRTC could not compile a kernel of jax_flash: {status}\n{log}")
        cubin = bytearray(call(nvrtc.nvrtcGetCUBINSize, program))
        call(nvrtc.nvrtcGetCUBIN, program, cubin)
        return Kernel(cubin=bytes(cubin), log=log)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


# A cache file is one line of JSON, with the checksum of what follows, then the cubin.


def _read(key: str) -> Kernel | None:
    try:
        header, cubin = (cache_folder() / key).read_bytes().split(b"\n", 1)
        entry = json.loads(header)
        if entry["sha256"] == hashlib.sha256(cubin).hexdigest():
            return Kernel(cubin=cubin, log=entry["log"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing, unreadable or damaged: built again
    return None


def _publish(key: str, kernel: Kernel) -> None:
    """Writes to a file of our own and renames it, so that a reader sees all or nothing; a lost race is harmless."""
    entry = json.dumps({"sha256": hashlib.sha256(kernel.cubin).hexdigest(), "log": kernel.log})
    with contextlib.suppress(OSError):  # a full or read-only disk costs time, nothing else
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(entry.encode() + b"\n" + kernel.cubin)
            os.replace(name, folder / key)
        except OSError:
            os.unlink(name)
            raise
