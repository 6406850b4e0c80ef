"""KernelSpec to CUDA C++: one self-contained source text, with spec.h and wgmma.h generated for this kernel alone."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable

from jax_flash.kernel_spec import AppendSpec, DecodeSpec, KernelSpec

_ELEMENTS = {"float16": "Float16", "bfloat16": "BFloat16", "float8_e4m3fn": "Float8E4M3", "float32": "Float32"}
_WGMMA_TYPES = {"float16": "f16", "bfloat16": "bf16", "float8_e4m3fn": "e4m3"}
_KERNELS = pathlib.Path(__file__).parent / "kernels"
_INCLUDE = re.compile(r'^#include "([^"]+)"$', re.MULTILINE)


def source(entry: str, spec: KernelSpec | DecodeSpec | AppendSpec) -> str:
    """The text of kernels/`entry` with every include expanded, each once: NVRTC needs no include path."""
    generated: dict[str, Callable] = {"spec.h": _spec_header, "wgmma.h": _wgmma_header}
    seen: set[str] = set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = generated[name](spec) if name in generated else (_KERNELS / name).read_text()
        text = text.replace("#pragma once\n", "\n")  # lines keep their numbers
        position, parts = 0, [f'#line 1 "{name}"\n']
        for match in _INCLUDE.finditer(text):
            line = text.count("\n", 0, match.end()) + 2
            parts += [text[position : match.start()], expand(match[1]), f'#line {line} "{name}"']
            position = match.end()
        return "".join([*parts, text[position:]])

    return expand(entry)


def _spec_header(spec: KernelSpec | DecodeSpec | AppendSpec) -> str:
    lines = []
    for name, value in dataclasses.asdict(spec).items():
        camel = "".join(word.capitalize() for word in name.split("_"))
        if isinstance(value, str):
            lines.append(f"using {camel} = {_ELEMENTS[value]};")
        elif isinstance(value, bool):
            lines.append(f"constexpr bool k{camel} = {str(value).lower()};")
        else:
            lines.append(f"constexpr int k{camel} = {value};")
    return '#include "hopper/types.cuh"\nnamespace jax_flash::spec {\n' + "\n".join(lines) + "\n}\n"


def _wgmma_header(spec: KernelSpec) -> str:
    return (
        '#include "hopper/types.cuh"\nnamespace jax_flash {\n'
        + _wgmma(spec, "ss", spec.tile_n)
        + _wgmma(spec, "rs", spec.head_dim_v)
        + "}\n"
    )


def _wgmma(spec: KernelSpec, sources: str, n: int) -> str:
    """One wgmma of 64 rows and n columns; A from shared memory ("ss": S = Q Kᵀ) or from registers ("rs": O += P V).

    `accumulate` is false where the product replaces the accumulator.
    """
    element = _WGMMA_TYPES[spec.element]
    is_fp8 = element == "e4m3"
    count = n // 2
    accumulators = ", ".join(f"%{i}" for i in range(count))
    if sources == "ss":
        template, parameters = "u32 kHighA, u32 kHighB", "u32 a, u32 b"
        operand_a, inputs = "a", '"r"(a), "n"(kHighA), "r"(b), "n"(kHighB), "r"((int)accumulate)'
        setup = f"mov.b64 a, {{%{count}, %{count + 1}}};\\nmov.b64 b, {{%{count + 2}, %{count + 3}}};\\n"
        predicate = count + 4
        transposes = "" if is_fp8 else ", 0, 0"
    else:
        template, parameters = "u32 kHighB", "const u32 (&a)[4], u32 b"
        operand_a = f"{{{', '.join(f'%{count + i}' for i in range(4))}}}"
        inputs = '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kHighB), "r"((int)accumulate)'
        setup = f"mov.b64 b, {{%{count + 4}, %{count + 5}}};\\n"
        predicate = count + 6
        transposes = "" if is_fp8 else ", 1"
    k = 32 if is_fp8 else 16
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""
template <{template}>
__device__ __forceinline__ void wgmma_{sources}(float (&d)[{count}], {parameters}, bool accumulate) {{
  asm volatile(
      "{{\\n.reg .pred p;\\n.reg .b64 a, b;\\nsetp.ne.b32 p, %{predicate}, 0;\\n{setup}"
      "wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{element}.{element} "
      "{{{accumulators}}}, {operand_a}, b, p, 1, 1{transposes};\\n}}"
      : {outputs}
      : {inputs});
}}
"""
