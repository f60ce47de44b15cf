"""Of how many GPUs are the bandwidths in the rows of a test, as far as their digits tell?"""

from __future__ import annotations

from collections.abc import Iterator

from ptsim.hardware.nccl_log.section import Row, Times

ROUNDED = 0.005  # GB/s, by which a printed bandwidth may be off
_RATIO_OFF = 0.03  # by which busbw / algbw may differ from that of the ranks, whatever was rounded


def bus_factor(num_gpus: int) -> float:
    """The ratio busbw / algbw of an all-reduce over so many GPUs. Source: nccl-tests, doc/PERFORMANCE.md."""
    return 2 * (num_gpus - 1) / num_gpus


def implied_ranks(algbw: float, busbw: float) -> int | None:
    """The n of busbw / algbw = 2(n-1)/n; None where two printed digits do not decide."""
    if algbw < 1:
        return None
    ratio = busbw / algbw
    return round(2 / (2 - ratio)) if ratio < 1.97 else None


def agrees(num: int, algbw: float, busbw: float) -> bool:
    """Whether the bandwidths are those of so many ranks, as far as their digits tell.

    People may have rounded to one.
    """
    off = _rounding(algbw, busbw, one=not _second_digit(algbw, busbw))
    return algbw >= 1 and abs(bus_factor(num) - busbw / algbw) <= min(
        _RATIO_OFF, (1 + bus_factor(num)) * off / algbw + 1e-6
    )


def fits(rows: list[Row], num: int, *, by_hand: bool = False) -> bool:
    """Whether all bandwidths are those of so many GPUs, as far as their digits tell.

    `by_hand`: people may have rounded to one.
    """
    if num < 1:  # as a launcher may say
        return False
    one = by_hand and rounded_by_hand(rows)
    factor = bus_factor(num)
    for times in _measured(rows):
        off = _rounding(times.algbw, times.busbw, one=one)
        if abs(times.busbw - factor * times.algbw) > off * (1 + factor) + 1e-9:
            return False
    return True


def rounded_by_hand(rows: list[Row]) -> bool:
    """Whether no bandwidth has a second digit, which nccl-tests prints."""
    return not any(_second_digit(times.algbw, times.busbw) for times in _measured(rows))


def _rounding(algbw: float, busbw: float, *, one: bool) -> float:
    """GB/s by which either may be off: two digits are printed, one from 1000 GB/s on, or `one` is left of them."""
    return ROUNDED * (10 if one or max(algbw, busbw) >= 1000 else 1)


def _second_digit(algbw: float, busbw: float) -> bool:
    return any(round(10 * rate, 6) % 1 for rate in (algbw, busbw))


def _measured(rows: list[Row]) -> Iterator[Times]:
    """Out of place and in place, in turn."""
    return (times for row in rows for times in (row.out_of_place, row.in_place) if times is not None)
