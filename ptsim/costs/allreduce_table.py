"""What a measured table of all-reduce times says about sizes between, below and above its own.

A collective library switches protocols as messages grow, so time over size is a row of lines α + bytes / β with steps
where they meet. Between two sizes of the table the time is the chord in linear coordinates, pulled a quarter of the way
towards the lower of the two neighbouring lines where those meet above the chord. Beyond the last size the last line
goes on, and below the first the first line, of which nothing is left but bytes / β where α would be negative.

Chosen on the runs of traces/public with every other size left out. Median run: log-log interpolation 6.3 % off, chords
2.8 %, this 2.9 %, the full pull 3.5 %; mean over systems: chords 3.7 %, this 3.3 %, the full pull 4.3 %
(`analysis/check_allreduce.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from ptsim.costs.times import Z90
from ptsim.hardware.spec import AllReduceTable, AlphaBeta

_PULL = 0.25
_TOLERANCE = 0.03  # how far a larger message may be faster before a point counts as a spike
_LATENCY_BOUND = 1024  # below it times hardly depend on the size
# Chosen so that about 90 % of left-out sizes are inside the 90 % interval: inner ones, and those below and above.
_SHARE_OF_NEAR, _SHARE_OF_COMMON = 0.8, 0.5
_PER_HALVING, _PER_DOUBLING = 0.14, 0.17
_UNKNOWN_MISS = 0.2  # of a table of one or two sizes
_UNKNOWN_JITTER = 0.017  # where nothing was repeated: 9 in 10 runs of traces/public have less, half of them below 0.007
_SPIKE_REACH = math.log(2) / 2  # a spike (Polaris at 128 KiB) speaks for sizes within a factor of √2


def table_seconds(table: AllReduceTable, message_bytes: float) -> float:
    """The time of one all-reduce of `message_bytes` according to the table."""
    sizes, seconds = table.size_bytes, table.seconds
    kept = rising_points(seconds)
    time = _between([sizes[i] for i in kept], [seconds[i] for i in kept], message_bytes)
    if message_bytes <= sizes[-1]:
        time = min(time, max(seconds))  # the last point may be a spike downwards
    if message_bytes >= sizes[0]:
        time = max(time, min(seconds))  # and the first one upwards
    for i in set(range(len(sizes))) - set(kept):
        distance = abs(math.log(max(message_bytes, 1.0) / sizes[i]))
        if distance < _SPIKE_REACH:
            share = 1 - distance / _SPIKE_REACH
            time = math.exp(share * math.log(seconds[i]) + (1 - share) * math.log(time))
    return time


def table_sigma(table: AllReduceTable, message_bytes: float) -> float:
    """Standard deviation of ln(time): the jitter at a size of the table, more between sizes, and more with distance.

    Between two sizes count what interpolation misses when either of them is left out, and half of what it misses over
    the whole table. Beyond the table's sizes every halving and doubling adds its part, but not below 1 KiB, where times
    hardly depend on the size. On the runs of traces/public with each size left out in turn 72 % were inside the 90 %
    interval before the neighbours counted, and 89 % are now (`analysis/check_allreduce.py`).
    """
    sizes, seconds, jitter = table.size_bytes, table.seconds, table.relative_jitter or _UNKNOWN_JITTER
    if message_bytes in sizes:
        return jitter
    common = _SHARE_OF_COMMON * _common_miss(sizes, seconds)
    if message_bytes < sizes[0]:
        halvings = max(math.log2(sizes[0] / max(message_bytes, _LATENCY_BOUND)), 0.0)
        return math.hypot(jitter, common, _PER_HALVING * halvings)
    if message_bytes > sizes[-1]:
        return math.hypot(jitter, common, _PER_DOUBLING * math.log2(message_bytes / sizes[-1]))
    i = max(k for k in range(len(sizes)) if sizes[k] <= message_bytes)
    misses = _left_out_misses(sizes, seconds)
    near = max((misses[k] for k in (i, i + 1) if k in misses), default=0.0)
    return math.hypot(jitter, common, _SHARE_OF_NEAR * near)


def _common_miss(sizes: tuple[int, ...], seconds: tuple[float, ...]) -> float:
    """Standard deviation of what interpolation misses over the whole table; real gaps are half as wide."""
    misses = sorted(_left_out_misses(sizes, seconds).values())
    return misses[round(0.9 * (len(misses) - 1))] / Z90 / 2 if misses else _UNKNOWN_MISS


@functools.lru_cache(maxsize=256)
def _left_out_misses(sizes: tuple[int, ...], seconds: tuple[float, ...]) -> dict[int, float]:
    """|ln(interpolated / measured)| of every inner size, left out of the table."""
    misses = {}
    for i in range(1, len(sizes) - 1):
        rest = [k for k in range(len(sizes)) if k != i]
        guess = _between([sizes[k] for k in rest], [seconds[k] for k in rest], sizes[i])
        misses[i] = abs(math.log(guess / seconds[i]))
    return misses


@functools.lru_cache(maxsize=256)
def rising_points(seconds: tuple[float, ...]) -> list[int]:
    """Indices of the longest run of times that rise (3 % forgiven): what is left out are spikes, not the law."""
    best: list[list[int]] = []
    for i, time in enumerate(seconds):
        before = [chain for j, chain in enumerate(best) if seconds[j] <= time * (1 + _TOLERANCE)]
        best.append([*max(before, key=len, default=[]), i])
    return max(best, key=lambda chain: (len(chain), -seconds[chain[-1]]))


def _between(sizes: Sequence[float], seconds: Sequence[float], size: float) -> float:
    last = len(sizes) - 1
    if last == 0:
        return seconds[0] if size <= sizes[0] else seconds[0] * size / sizes[0]
    if size <= sizes[0]:
        line = seconds[0] - (sizes[0] - size) * max(_slope(sizes, seconds, 0), 0.0)
        return max(line, seconds[0] * size / sizes[0])
    if size >= sizes[last]:
        return seconds[last] + (size - sizes[last]) * max(_slope(sizes, seconds, last - 1), 0.0)
    i = max(k for k in range(last) if sizes[k] <= size)
    chord = seconds[i] + (size - sizes[i]) * _slope(sizes, seconds, i)
    if not 0 < i < last - 1:
        return chord
    left = seconds[i] + (size - sizes[i]) * max(_slope(sizes, seconds, i - 1), 0.0)
    right = seconds[i + 1] - (sizes[i + 1] - size) * max(_slope(sizes, seconds, i + 1), 0.0)
    meeting = min(left, right, max(seconds[i], seconds[i + 1]))
    if meeting <= chord:
        return chord
    return float(chord ** (1 - _PULL) * meeting**_PULL)


def _slope(sizes: Sequence[float], seconds: Sequence[float], i: int) -> float:
    return (seconds[i + 1] - seconds[i]) / (sizes[i + 1] - sizes[i])


def fit_segments(sizes: Sequence[float], seconds: Sequence[float], *, most: int = 4) -> tuple[AlphaBeta, ...]:
    """The α–β lines that the times follow, one per protocol segment.

    Change points are found by dynamic programming over relative squared error; a further segment must lower the
    Bayesian information criterion. α and 1/β are not negative.

    Args:
        sizes: message bytes, rising.
        seconds: time of each.
        most: segments at most.

    Raises:
        ValueError: fewer than two points.
    """
    num = len(sizes)
    if num < 2:
        raise ValueError(f"{num} point(s); a line needs two")
    cost: dict[tuple[int, int], tuple[float, float, float]] = {
        (i, j): _line(sizes[i:j], seconds[i:j]) for i in range(num) for j in range(i + 2, num + 1)
    }
    # plan[k][j]: lowest error of the first j points in k segments, and where the last one starts
    plan: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for _ in range(min(most, num // 2)):
        row: dict[int, tuple[float, int]] = {}
        for j in range(2, num + 1):
            options = [(plan[-1][i][0] + cost[i, j][0], i) for i in range(j - 1) if i in plan[-1] and (i, j) in cost]
            if options:
                row[j] = min(options)
        plan.append(row)
    floor = num * 1e-4  # 1 % noise: below it another segment explains nothing

    def criterion(k: int) -> float:
        return num * math.log((plan[k][num][0] + floor) / num) + 3 * k * math.log(num)

    k = min((k for k in range(1, len(plan)) if num in plan[k]), key=criterion)
    found: list[AlphaBeta] = []
    end = num
    while k:
        start = plan[k][end][1]
        _, latency, per_byte = cost[start, end]
        found.append(AlphaBeta(from_bytes=int(sizes[start]), latency_s=latency, seconds_per_byte=per_byte))
        end, k = start, k - 1
    return tuple(reversed(found))


def _line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, float]:
    """(relative squared error, α, seconds per byte) of the best line with both terms not negative."""
    weights = [1 / time**2 for time in seconds]
    total = sum(weights)
    mean_x = sum(w * x for w, x in zip(weights, sizes, strict=True)) / total
    mean_y = sum(w * y for w, y in zip(weights, seconds, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, x in zip(weights, sizes, strict=True))
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, x, y in zip(weights, sizes, seconds, strict=True)) / spread
    lines = [(mean_y - slope * mean_x, slope), (mean_y, 0.0)]
    squares = sum(w * x * x for w, x in zip(weights, sizes, strict=True))
    lines.append((0.0, sum(w * x * y for w, x, y in zip(weights, sizes, seconds, strict=True)) / squares))
    return min(
        (sum(((a + b * x) / y - 1) ** 2 for x, y in zip(sizes, seconds, strict=True)), a, b)
        for a, b in lines
        if a >= 0 and b >= 0
    )
