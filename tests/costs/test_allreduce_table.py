"""Tables of measured all-reduces: what they say between, below and above their sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptsim.costs.allreduce_table import fit_segments, rising_points, table_seconds, table_sigma
from ptsim.hardware.spec import AllReduceTable


def table(sizes: list[int], seconds: list[float]) -> AllReduceTable:
    return AllReduceTable(
        num_gpus=8, num_nodes=1, size_bytes=tuple(sizes), seconds=tuple(seconds), relative_jitter=0.02, source="test"
    )


def two_protocols(size: float) -> float:
    """10 µs + bytes / (1 GB/s), and from 100 kB on 60 µs + bytes / (2 GB/s): they meet at 100 kB."""
    return min(10e-6 + size / 1e9, 60e-6 + size / 2e9)


POWERS = [2**k for k in range(6, 27)]


def test_one_protocol_is_met_exactly_between_and_beyond() -> None:
    line = table([1000, 4000, 64000], [11e-6, 14e-6, 74e-6])
    for size in (1, 500, 2000, 30000, 640000):
        assert table_seconds(line, size) == pytest.approx(10e-6 + size / 1e9)


def test_below_a_table_of_large_messages_time_goes_on_falling_and_is_less_sure() -> None:
    large = table([2**25, 2**26], [180e-6, 400e-6])  # 40 µs less than nothing at 0 bytes
    assert table_seconds(large, 2**24) == pytest.approx(90e-6)
    assert table_sigma(large, 2**20) > table_sigma(large, 2**24) > table_sigma(large, 2**25)


def test_every_other_size_is_recovered_across_a_protocol_switch() -> None:
    kept = table(POWERS[::2], [two_protocols(size) for size in POWERS[::2]])
    for size in POWERS[1::2]:
        assert table_seconds(kept, size) == pytest.approx(two_protocols(size), rel=0.15)


def test_a_spike_stays_in_its_place() -> None:
    sizes, seconds = [1024, 4096, 16384, 65536, 262144], [10e-6, 12e-6, 300e-6, 40e-6, 120e-6]
    spiky = table(sizes, seconds)
    assert rising_points(tuple(seconds)) == [0, 1, 3, 4]
    assert table_seconds(spiky, 16384) == pytest.approx(300e-6)
    assert table_seconds(spiky, 32768) < 40e-6


def test_sigma_is_the_jitter_at_a_measured_size_and_more_between() -> None:
    kept = table(POWERS[::2], [two_protocols(size) for size in POWERS[::2]])
    assert table_sigma(kept, POWERS[2]) == 0.02
    assert table_sigma(kept, POWERS[3]) > 0.02


def test_a_step_in_the_neighbourhood_widens_the_interval_where_it_is() -> None:
    times = [1e-5 * 1.1**k for k in range(len(POWERS))]
    times[8:] = [3 * time for time in times[8:]]  # another protocol from the ninth size on
    stepped = table(POWERS, times)
    near, far = (table_sigma(stepped, 1.4 * POWERS[k]) for k in (7, 2))
    assert near > 2 * far


def test_beyond_the_table_every_halving_and_doubling_widens_the_interval() -> None:
    sizes = [2**k for k in range(20, 31)]
    kept = table(sizes, [two_protocols(size) for size in sizes])
    below = [table_sigma(kept, sizes[0] / 2**k) for k in range(1, 8)]
    above = [table_sigma(kept, sizes[-1] * 2**k) for k in range(1, 8)]
    assert below == sorted(below)
    assert above == sorted(above)
    assert below[-1] > 0.5
    assert above[-1] > 0.5


def test_segments_find_the_lines_and_where_they_meet() -> None:
    first, second = fit_segments(POWERS, [two_protocols(size) for size in POWERS])
    assert first.latency_s == pytest.approx(10e-6, rel=0.02)
    assert first.seconds_per_byte == pytest.approx(1e-9, rel=0.02)
    assert second.latency_s == pytest.approx(60e-6, rel=0.02)
    assert second.seconds_per_byte == pytest.approx(0.5e-9, rel=0.02)
    assert second.from_bytes == 131072  # the first power of two above 100 kB


def test_a_line_needs_two_points() -> None:
    with pytest.raises(ValueError, match="two"):
        fit_segments([1024], [1e-5])


@given(
    st.lists(st.floats(1e-6, 1e-1), min_size=2, max_size=12),
    st.integers(1, 2**34),
)
def test_any_table_gives_a_positive_time_within_its_range(times: list[float], size: int) -> None:
    sizes = [2 ** (10 + 2 * k) for k in range(len(times))]
    seconds = table_seconds(table(sizes, times), size)
    assert seconds > 0
    if sizes[0] <= size <= sizes[-1]:
        assert min(times) * 0.999 <= seconds <= max(times) * 1.001
