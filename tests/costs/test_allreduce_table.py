"""Tables of measured all-reduces: what they say between, below and above their sizes."""

from __future__ import annotations

import math

import msgspec
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


def test_times_that_nobody_repeated_are_not_exact() -> None:
    """One test wrote in-place times alone: its table has no jitter, and each would have an interval without width."""
    once = msgspec.structs.replace(table([1000, 4000], [11e-6, 14e-6]), relative_jitter=0.0)
    assert table_sigma(once, 4000) == 0.017
    assert table_sigma(once, 4001) > 0.017
    line = table([10**power for power in range(4, 10)], [10.0 ** (power - 12) for power in range(4, 10)])
    once = msgspec.structs.replace(line, relative_jitter=0.0)  # nothing is missed when a size is left out
    for size in (9_999, 20_000, 10**9 + 1):
        assert table_sigma(once, size) == pytest.approx(0.017, rel=1e-3)


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


CONCAVE = [10.0, 20.0, 30.0, 31.0]  # 10 ms a byte to the left of 2,000 bytes, 1 ms to the right of 4,000


@pytest.mark.parametrize(
    ("seconds", "size", "expected"),
    [
        # At 3,000 the left line says 30, the right one 29, the chord 25: a quarter of the way, in the logarithm.
        (CONCAVE, 3000, 25**0.75 * 29**0.25),
        (CONCAVE, 2200, 21**0.75 * 22**0.25),  # the left line is the lower one
        (CONCAVE, 1500, 15.0),  # no line to the left
        (CONCAVE, 4500, 30.5),  # no line to the right
        ([10.0, 11.0, 30.0, 31.0], 3000, 20.5),  # the left line is below the chord
        (CONCAVE, 7000, 33.0),
        (CONCAVE, 500, 5.0),
        ([10.0, 15.0, 30.0, 31.0], 500, 7.5),
        ([1.0, 15.0, 30.0, 31.0], 500, 0.5),  # the line meets 0 before no bytes: in proportion
    ],
)
def test_between_two_sizes_counts_the_chord_pulled_to_the_lower_line(
    seconds: list[float], size: float, expected: float
) -> None:
    assert table_seconds(table([1000, 2000, 4000, 5000], seconds), size) == pytest.approx(expected)


def test_a_table_of_three_sizes_has_chords_alone() -> None:
    three = table([1000, 2000, 4000], [10.0, 30.0, 31.0])
    assert [table_seconds(three, size) for size in (1500, 3000)] == pytest.approx([20.0, 30.5])


def test_a_table_of_one_size_is_flat_below_and_in_proportion_above() -> None:
    one = table([4096], [3.0])
    assert [table_seconds(one, size) for size in (0, 1024, 4096, 16384)] == pytest.approx([3.0, 3.0, 3.0, 12.0])


def test_a_spike_fades_out_within_a_factor_of_the_square_root_of_two() -> None:
    """Times are 10 µs and 1 ns a byte but for 200 µs at 16,000 bytes."""
    spiky = table([1000, 4000, 16_000, 64_000], [11e-6, 14e-6, 200e-6, 74e-6])
    for factor in (2**0.25, 2**-0.25):  # half of the way
        line = 10e-6 + 16_000 * factor * 1e-9
        assert table_seconds(spiky, 16_000 * factor) == pytest.approx(math.sqrt(200e-6 * line))
    for size in (16_000 * math.sqrt(2), 16_000 / math.sqrt(2)):
        assert table_seconds(spiky, size) == pytest.approx(10e-6 + size * 1e-9)


def test_spikes_at_the_ends_do_not_lead_out_of_the_tables_range() -> None:
    down, up = table([1000, 4000, 64_000], [10.0, 20.0, 5.0]), table([1000, 16_000, 64_000], [50.0, 10.0, 20.0])
    assert table_seconds(down, 16_000) == 20.0  # not 60, where the line of the first two leads
    assert table_seconds(up, 4000) == 10.0  # not 7.5


@pytest.mark.parametrize(
    ("seconds", "kept"),
    [
        ((10.0, 9.8, 11.0), [0, 1, 2]),  # 2 % less is forgiven
        ((10.0, 9.7, 11.0), [0, 2]),  # 3.1 % are not
        ((5.0, 9.0, 6.0), [0, 2]),  # of two runs as long the one that ends lower
        ((1.0, 2.0, 9.0, 3.0, 4.0), [0, 1, 3, 4]),
    ],
)
def test_spikes_are_what_the_longest_rising_run_leaves_out(seconds: tuple[float, ...], kept: list[int]) -> None:
    assert rising_points(seconds) == kept


@pytest.mark.parametrize(
    ("sizes", "size", "parts"),
    [
        # Nothing can be left out of two sizes: half of 0.2. 0.14 a halving and 0.17 a doubling.
        ([4096, 8192], 4096, ()),
        ([4096, 8192], 5000, (0.1,)),
        ([4096, 8192], 1024, (0.1, 0.14 * 2)),
        ([4096, 8192], 0, (0.1, 0.14 * 2)),  # at 1 KiB times hardly depend on the size any more
        ([4096, 8192], 32768, (0.1, 0.17 * 2)),
        ([1024, 8192], 256, (0.1,)),
        ([2048, 8200], 256, (0.1, 0.14)),
    ],
)
def test_the_parts_of_sigma_by_hand(sizes: list[int], size: float, parts: tuple[float, ...]) -> None:
    assert table_sigma(table(sizes, [10.0, 20.0]), size) == pytest.approx(math.hypot(0.02, *parts))


@pytest.mark.parametrize(("size", "near"), [(1500, math.log(1.5)), (2500, math.log(1.5)), (4000, 0.0)])
def test_sigma_counts_what_interpolation_misses_when_a_neighbour_is_left_out(size: float, near: float) -> None:
    """Without 2,000 bytes, 30 s, the chord says 20 s there. Gaps of the table itself are half as wide."""
    common, beyond = 0.5 * math.log(1.5) / 1.645 / 2, 0.17 * math.log2(size / 3000) if size > 3000 else 0.0
    found = table_sigma(table([1000, 2000, 3000], [10.0, 30.0, 30.0]), size)
    assert found == pytest.approx(math.hypot(0.02, common, 0.8 * near, beyond))


@pytest.mark.parametrize(
    ("sizes", "seconds", "latency", "per_byte"),
    [
        ([1000, 2000, 3000], [11.0, 12.0, 13.0], 10.0, 1e-3),
        # α would be -3. By relative squares through 0: Σ x/y / Σ x²/y² = (2 + 4/5) / (4 + 16/25), which misses by less
        # than a constant.
        ([2, 4], [1.0, 5.0], 0.0, 2.8 / 4.64),
        # The slope would be negative. Σ 1/y / Σ 1/y² = (1/4 + 1/2) / (1/16 + 1/4).
        ([1, 2], [4.0, 2.0], 2.4, 0.0),
    ],
)
def test_a_line_has_neither_a_negative_latency_nor_a_negative_slope(
    sizes: list[int], seconds: list[float], latency: float, per_byte: float
) -> None:
    (line,) = fit_segments(sizes, seconds)
    assert line.from_bytes == sizes[0]
    assert (line.latency_s, line.seconds_per_byte) == pytest.approx((latency, per_byte))


@pytest.mark.parametrize(("off", "number"), [(0.02, 1), (0.08, 2)])
def test_a_time_that_is_two_per_cent_off_is_no_protocol(off: float, number: int) -> None:
    """Of eight sizes, with noise of 1 %: what another line gains is at most 8 ln(1 + 0.02² / (8 · 0.01²)) = 3.2.

    Its three numbers cost 3 ln 8 = 6.2. For 8 % it gains up to 8 ln 9 = 17.6, for a third line nothing is left.
    """
    sizes = [4**i for i in range(5, 13)]
    times = [1e-5 + size / 1e9 for size in sizes]
    times[3] *= 1 + off
    assert len(fit_segments(sizes, times)) == number


def test_no_more_segments_than_asked_for() -> None:
    times = [two_protocols(size) for size in POWERS]
    assert [len(fit_segments(POWERS, times, most=most)) for most in (1, 2, 3)] == [1, 2, 2]
