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

    Two are printed, one from 1000 GB/s on; people round to one, too.
    """
    two = max(algbw, busbw) < 1000 and any(round(10 * rate, 6) % 1 for rate in (algbw, busbw))
    rounded = ROUNDED * (1 if two else 10)
    return algbw >= 1 and abs(bus_factor(num) - busbw / algbw) <= min(
        _RATIO_OFF, (1 + bus_factor(num)) * rounded / algbw + 1e-6
    )


def fits(rows: list[Row], num: int, *, by_hand: bool = False) -> bool:
    """Whether all bandwidths are those of so many GPUs, as far as two printed digits tell, one from 1000 GB/s on.

    `by_hand`: people may have rounded to one.
    """
    if num < 1:  # as a launcher may say
        return False
    one = by_hand and rounded_by_hand(rows)
    factor = bus_factor(num)
    for times in _measured(rows):
        rounded = ROUNDED * (10 if one or max(times.algbw, times.busbw) >= 1000 else 1)
        if abs(times.busbw - factor * times.algbw) > rounded * (1 + factor) + 1e-9:
            return False
    return True


def rounded_by_hand(rows: list[Row]) -> bool:
    """Whether no bandwidth has a second digit, which nccl-tests prints."""
    return not any(round(10 * rate, 6) % 1 for times in _measured(rows) for rate in (times.algbw, times.busbw))


def _measured(rows: list[Row]) -> Iterator[Times]:
    """Out of place and in place, in turn."""
    return (times for row in rows for times in (row.out_of_place, row.in_place) if times is not None)
