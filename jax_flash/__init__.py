"""FlashAttention-class attention for JAX, over arrays or a KV cache; definitions in `reference`, Flax in `nn`."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

# In a clone `python -m jax_flash` finds these sources first, and the compiled module lies with the installed ones.
__path__ = pkgutil.extend_path(__path__, __name__)

from jax_flash import reference
from jax_flash.api import attention, attention_with_kv_cache
from jax_flash.merge import merge
from jax_flash.quantize import quantize_fp8

__all__ = ["__version__", "attention", "attention_with_kv_cache", "merge", "nn", "quantize_fp8", "reference"]


def __getattr__(name: str) -> Any:
    # What few programs use and takes time to import: nn imports flax.
    if name == "nn":
        return importlib.import_module("jax_flash.nn")
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("jax-flash")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
