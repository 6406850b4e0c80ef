"""The order of tiles: divisions, every tile once, even loads of CTAs, the numbers that the kernel declares."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import random
import re

import jax
import jax.numpy as jnp
import pytest

from jax_flash import cuda, order
from jax_flash.kernel_spec import KernelSpec
from jax_flash.spec import UNBOUNDED, Attention, Operands, Params


def quotient(divisor: order.Divisor, x: int) -> int:
    """As the kernel divides, with numbers of its widths."""
    assert divisor.multiplier < 1 << 32
    assert divisor.shift < 33
    return x * divisor.multiplier >> (31 + divisor.shift)


@pytest.mark.parametrize("value", [1, 2, 3, 7, 132, 641, 2**20, 2**30 - 1, 2**30 + 1, 2**31 - 1])
def test_divisor(value):
    numbers = {0, 1, 2**31 - 1, *(random.Random(value).randrange(2**31) for _ in range(100))}
    numbers |= {x for x in (value - 1, value, 2**31 // value * value - 1) if x < 2**31}
    for x in numbers:
        assert quotient(order.Divisor.of(value), x) == x // value


def kernel_tiles(rounds: order.Rounds, m_blocks: int, cta: int) -> list[tuple[int, int]]:
    """The tiles (pair, block of rows) of a CTA, as kernels/schedule.cuh finds them."""
    tiles = []
    for round_ in range(rounds.rounds):
        turned = rounds.turns and round_ % 2
        number = (round_ >> rounds.mirrors) * rounds.ctas + (rounds.ctas - 1 - cta if turned else cta)
        if cta >= rounds.ctas or number >= rounds.numbers:
            break
        section, in_section = divmod(number, rounds.section.value)
        if rounds.mirrors and round_ % 2:
            in_section = 2 * rounds.section.value - 1 - in_section
        run = rounds.last_run if section == rounds.last_section else rounds.run
        outer, inner = divmod(in_section, run.value)
        pair, m_block = (outer, inner) if rounds.by_pair else (inner, outer)
        rises = section % 2 == rounds.rising
        tiles.append(
            (rounds.first_pair + section * rounds.per_section + pair, m_block if rises else m_blocks - 1 - m_block)
        )
    return tiles


def call(head_dim: int, length: int, batch: int, heads: int, causal: bool) -> tuple[KernelSpec, Params]:
    """The best kernel of a call, and its numbers."""
    rows = jax.ShapeDtypeStruct((batch, length, heads, head_dim), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    operands = Operands(rows, rows, rows, scale, scale, *[jax.ShapeDtypeStruct((0,), jnp.int32)] * 8)
    attention = Attention(window_right=0 if causal else UNBOUNDED, out_dtype="bfloat16")
    return cuda.kernel_specs(attention, operands)[0], Params.of(attention, operands)


def tiles_of_ctas(spec, params, ctas: int) -> list[list[tuple[int, int]]]:
    """What each CTA works on, in order."""
    m_blocks = -(-params.q_rows // spec.tile_m)
    found = order.Order.of(spec, params, min(ctas, m_blocks * params.batch * params.heads))
    assert all(0 <= number < 1 << 32 for number in found.flat())
    return [[t for part in found.parts for t in kernel_tiles(part, m_blocks, cta)] for cta in range(ctas)]


SHAPES = [
    (head_dim, length, batch, heads)
    for head_dim, (length, batch, heads) in itertools.product(
        (64, 128, 256),
        [
            (2048, 1, 24),
            (512, 32, 16),
            (512, 2, 16),
            (640, 7, 5),
            (1536, 10, 8),
            (2048, 8, 16),
            (2000, 3, 11),
            (8192, 2, 16),
            (100, 3, 2),
        ],
    )
]


@pytest.mark.parametrize("ctas", [132, 114, 7])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("head_dim", "length", "batch", "heads"), SHAPES)
def test_every_tile_once(head_dim, length, batch, heads, causal, ctas):
    spec, params = call(head_dim, length, batch, heads, causal)
    tiles = list(itertools.chain(*tiles_of_ctas(spec, params, ctas)))
    m_blocks = -(-length // spec.tile_m)
    assert sorted(tiles) == list(itertools.product(range(batch * heads), range(m_blocks)))


@pytest.mark.parametrize("causal", [False, True])
def test_pages_do_not_change_the_order(causal):
    spec, params = call(128, 8192, 4, 16, causal)
    paged = dataclasses.replace(params, kv_rows=16, kv_groups=4 * 512 + 3, max_pages=512)
    assert order.Order.of(spec, paged, 132) == order.Order.of(spec, params, 132)


@pytest.mark.parametrize(("max_seqlen_q", "searched"), [(None, True), (512, False), (513, True)])
def test_long_packed_sequences_are_looked_for_unless_a_hint_rules_them_out(max_seqlen_q, searched):
    spec, params = call(128, 8192, 2, 16, causal=False)
    assert order.LONG_TILES * spec.tile_m == 512
    found = order.Order.of(spec, params, 132, max_seqlen_q)
    assert (params.q_rows > found.long_rows) == searched


LOADS = [
    *((dim, s, 16384 // s, 2048 // dim, 1.05) for dim in (64, 128, 256) for s in (512, 2048, 4096, 8192)),
    # Few rounds, which nothing makes quite even.
    *((128, 2048, 1, 24, 1.12), (128, 1024, 1, 40, 1.12), (128, 1280, 2, 28, 1.12), (128, 1536, 2, 40, 1.12)),
    *((96, 2048, 8, 16, 1.12), (256, 1280, 2, 8, 1.12)),
]


@pytest.mark.parametrize(("head_dim", "length", "batch", "heads", "most"), LOADS)
def test_loads_are_even(head_dim, length, batch, heads, most):
    """Under a causal mask no CTA has more than so many times the mean of blocks to see, or the longest tile."""
    spec, params = call(head_dim, length, batch, heads, True)
    loads = [sum(m_block + 1 for _, m_block in tiles) for tiles in tiles_of_ctas(spec, params, 132)]
    longest = -(-length // spec.tile_m)
    mean = sum(loads) / len(loads)
    assert max(loads) <= most * max(mean, longest)


def test_kernel_structs_have_the_same_fields():
    """kernels/order.cuh declares what Python passes, in the same order."""
    text = (pathlib.Path(order.__file__).parent / "kernels" / "order.cuh").read_text()
    for noun in (order.Divisor, order.Rounds, order.Order):
        body = text.split(f"struct {noun.__name__} {{")[1].split("}")[0]
        assert tuple(re.findall(r"^  \w+ (\w+)(?:\[kParts\])?;", body, re.MULTILINE)) == noun._fields
