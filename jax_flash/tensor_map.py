"""How TMA sees the operands of kernels: pure functions of shapes."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TensorMap:
    """How TMA sees one operand, as TensorMapRecord in ffi/cuda.cc: four dims, the innermost first."""

    operand: int
    element_bytes: int
    swizzle_bytes: int
    dims: tuple[int, int, int, int]
    """In elements."""
    strides: tuple[int, int, int]
    """In bytes, of all dims but the innermost."""
    box: tuple[int, int, int, int]
    """What one copy brings, in elements."""

    def flat(self) -> list[int]:
        """All numbers in order."""
        return [self.operand, self.element_bytes, self.swizzle_bytes, *self.dims, *self.strides, *self.box]


def rows(operand: int, shape, size: int, box_rows: int, box_bytes: int = 128) -> TensorMap:
    """An array (groups, rows, heads, columns), in boxes of `box_bytes` of `box_rows` rows of one head."""
    groups, rows, heads, columns = shape
    return TensorMap(
        operand=operand,
        element_bytes=size,
        swizzle_bytes=box_bytes,
        dims=(columns, rows, heads, groups),
        strides=(heads * columns * size, columns * size, rows * heads * columns * size),
        box=(box_bytes // size, box_rows, 1, 1),
    )


def columns(operand: int, shape, box_rows: int, tile_columns: int) -> TensorMap:
    """An FP8 array (groups, heads, columns, rows), in boxes of `box_rows` rows and bytes of `tile_columns` columns."""
    groups, heads, columns, rows = shape
    return TensorMap(
        operand=operand,
        element_bytes=1,
        swizzle_bytes=box_rows,
        dims=(rows, columns, heads, groups),
        strides=(rows, columns * rows, heads * columns * rows),
        box=(box_rows, tile_columns, 1, 1),
    )


def units(operand: int, shape, unit: int, tile_columns: int) -> TensorMap:
    """An FP8 array (groups, rows, heads, columns), in boxes of `unit` rows and `tile_columns`, cut into squares."""
    groups, rows, heads, columns = shape
    return TensorMap(
        operand=operand,
        element_bytes=1,
        swizzle_bytes=unit,
        dims=(unit, rows, heads * columns // unit, groups),
        strides=(heads * columns, unit, rows * heads * columns),
        box=(unit, unit, tile_columns // unit, 1),
    )
