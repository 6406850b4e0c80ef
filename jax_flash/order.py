"""In which order the CTAs of a grid work on tiles: the numbers of kernels/order.cuh.

Pure functions of the call and the grid; no JAX, no GPU. What a CTA would have to divide by is known here, and so it
begins with a few multiplications. docs/design.md tells how the orders were found.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from jax_flash import heuristics
from jax_flash.kernel_spec import KernelSpec
from jax_flash.spec import Params

L2_BYTES = 8 << 20
"""Of keys and values that are worked on together, and stay in the L2 cache: Q and the output pass through it too."""

FEW_BLOCKS = 16
"""With more tiles to a pair, a tile's own loads count, and even loads of CTAs, which sections of many rounds give."""

MIRRORED = 2.5
"""CTAs get two tiles of each pair if that keeps no more pairs in work than so many times those that L2_BYTES hold."""

LONG_TILES = 4
"""Packed sequences of more tiles come first: begun last, few CTAs would compute them while all others wait."""


class Divisor(NamedTuple):
    """A divisor of numbers below 2**31: x // value == x * multiplier >> 31 + shift."""

    value: int
    multiplier: int
    shift: int

    @classmethod
    def of(cls, value: int) -> Divisor:
        """The divisor of that value, which is positive."""
        shift = (value - 1).bit_length()
        return cls(value, -(-(1 << 31 + shift) // value), shift)


class Rounds(NamedTuple):
    """Some pairs of sequence and head, whose tiles CTAs take round after round.

    The pairs come in sections, which are worked on one after another. Their tiles are numbered through: CTA c takes
    number c of every round.
    """

    rounds: int
    ctas: int
    """That take part in a round."""
    numbers: int
    """That stand for a tile; the last round may have fewer than CTAs."""
    turns: bool
    """Whether every other round goes from the last CTA to the first."""
    mirrors: bool
    """Whether numbers stand for two tiles: the n-th of a section, then, in another round, the n-th from its end."""
    first_pair: int
    per_section: int
    """Pairs of a section."""
    last_section: int
    by_pair: bool
    """Whether the tiles of a pair, and not of a block of rows, come one after another."""
    rising: int
    """Blocks of rows come from the first to the last in sections whose number has this remainder by 2; 2: in none."""
    section: Divisor
    """By the numbers of a section."""
    run: Divisor
    """By the tiles of one pair, or of one block of rows, that come one after another."""
    last_run: Divisor
    """The same in the last section."""

    @classmethod
    def of(
        cls,
        pairs: int,
        m_blocks: int,
        ctas: int,
        *,
        per_section: int,
        first_pair: int = 0,
        mirrors: bool = False,
        by_pair: bool = False,
        alternates: bool = False,
    ) -> Rounds:
        """The rounds of so many pairs, of m_blocks tiles each.

        `alternates`: sections go from the longest tile to the shortest and back in turn, of a single one the rounds.
        """
        sections = -(-pairs // per_section)
        numbers = pairs * m_blocks >> mirrors
        last_section = sections - 1
        widths = (per_section, pairs - last_section * per_section)
        run, last_run = (Divisor.of(m_blocks if by_pair else width) for width in widths)
        return cls(
            rounds=-(-numbers // ctas) << mirrors,
            ctas=ctas,
            numbers=numbers,
            turns=alternates and sections == 1,
            mirrors=mirrors,
            first_pair=first_pair,
            per_section=per_section,
            last_section=last_section,
            by_pair=by_pair,
            rising=sections % 2 if alternates else 2,
            section=Divisor.of(per_section * m_blocks >> mirrors),
            run=run,
            last_run=last_run,
        )


NO_ROUNDS = Rounds.of(1, 1, 1, per_section=1)._replace(rounds=0)


class Order(NamedTuple):
    """What kernels/order.cuh declares under this name, field for field, as are the others."""

    parts: tuple[Rounds, Rounds]
    """One after the other."""
    heads: Divisor
    heads_of_kv: Divisor
    """Query heads that share keys and values."""
    fitting_rows: int
    """Rows of keys and values, of one query head, that stay in the L2 cache together."""
    long_rows: int
    """Packed sequences of more rows come first."""

    @classmethod
    def of(cls, spec: KernelSpec, params: Params, ctas: int, max_seqlen_q: int | None = None) -> Order:
        """The order of a call; packed queries have no rounds, but what follows from lengths that the kernel reads.

        It looks for long sequences before others, unless `max_seqlen_q` says that there are none.
        """
        size = 1 if spec.widens else heuristics.element_bytes(spec.element)  # in the L2 cache
        row_bytes = (params.head_dim + params.head_dim_v) * size
        fitting_rows = min(L2_BYTES * params.heads // (row_bytes * params.kv_heads), 2**30)
        parts = NO_ROUNDS, NO_ROUNDS
        if not spec.packed_q:
            pairs = params.batch * params.heads
            m_blocks = -(-params.q_rows // spec.tile_m)
            keys = params.kv_rows * max(1, params.max_pages)
            fitting = max(1, fitting_rows // max(1, keys))
            parts = (unequal if spec.window_right else equal)(pairs, m_blocks, ctas, fitting)
        long_rows = LONG_TILES * spec.tile_m
        if max_seqlen_q is not None and max_seqlen_q <= long_rows:
            long_rows = params.q_rows
        divisors = Divisor.of(params.heads), Divisor.of(params.heads // params.kv_heads)
        return cls(parts, *divisors, fitting_rows, long_rows)

    def flat(self) -> list[int]:
        """All numbers in order."""
        return list(_flat(self))


def _flat(numbers: tuple) -> Iterator[int]:
    for number in numbers:
        if isinstance(number, tuple):
            yield from _flat(number)
        else:
            yield int(number)


def equal(pairs: int, m_blocks: int, ctas: int, fitting: int) -> tuple[Rounds, Rounds]:
    """Rounds of tiles of one length; so many pairs fit the L2 cache."""
    # Where fewer fit, CTAs that share keys and values had better be neighbours, as they are without sections.
    per_section = min(fitting, pairs) if fitting >= ctas // 3 else 1
    return Rounds.of(pairs, m_blocks, ctas, per_section=per_section), NO_ROUNDS


def unequal(pairs: int, m_blocks: int, ctas: int, fitting: int) -> tuple[Rounds, Rounds]:
    """Rounds under a mask that makes a tile the longer the later its rows are; so many pairs fit the L2 cache.

    Every CTA should get its share of long tiles.
    """
    in_round = max(1, ctas // m_blocks)
    if m_blocks <= FEW_BLOCKS and fitting <= in_round:
        if 2 * in_round <= MIRRORED * fitting:
            return mirrored(pairs, m_blocks, ctas)
        # Neighbours share keys and values. At most a tenth of the CTAs may have nothing to do.
        per_section = even_section(pairs, in_round)
        sections = -(-pairs // per_section)
        used = per_section * m_blocks
        if used <= ctas and (sections == 1 or 10 * pairs * m_blocks >= 9 * sections * ctas):
            return Rounds.of(pairs, m_blocks, used, per_section=per_section, by_pair=True, alternates=True), NO_ROUNDS
    per_section = even_section(pairs, max(fitting, in_round))
    return Rounds.of(pairs, m_blocks, ctas, per_section=per_section, alternates=True), NO_ROUNDS


def even_section(pairs: int, width: int) -> int:
    """About so many pairs, that make one section or an even number of them; of many sections one does not matter."""
    per_section = min(pairs, width)
    sections = -(-pairs // per_section)
    while sections % 2 == 1 and sections > 1 and per_section < 2 * width:
        per_section = -(-pairs // (sections - 1))
        sections = -(-pairs // per_section)
    return per_section


def mirrored(pairs: int, m_blocks: int, ctas: int) -> tuple[Rounds, Rounds]:
    """Two tiles of a pair to each CTA, whose lengths add up to the same; then what is left, about one to three rounds.

    Of less than a round the whole difference between two tiles would remain. An odd number of tiles goes by two pairs
    together. There are no more CTAs than tiles.
    """
    per_section = 1 + m_blocks % 2
    section = per_section * m_blocks // 2
    double_rounds = (pairs * m_blocks // ctas - 1) // 2
    first_pairs = double_rounds * ctas // section * per_section
    rest = pairs - first_pairs
    then = Rounds.of(
        rest,
        m_blocks,
        ctas,
        first_pair=first_pairs,
        per_section=rest,
        by_pair=rest * m_blocks == ctas,
        alternates=True,
    )
    if first_pairs == 0:
        return then, NO_ROUNDS
    return Rounds.of(first_pairs, m_blocks, ctas, per_section=per_section, mirrors=True), then
