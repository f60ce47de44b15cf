from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import warnings
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings

from ptsim.errors import FileFormatError, NewerVersionError
from ptsim.trace import io
from ptsim.trace.io import TraceWriter, read_records, read_trace
from ptsim.trace.io import write_trace as write_whole_trace
from ptsim.trace.schema import (
    SCHEMA_VERSION,
    AnyRecord,
    Architecture,
    End,
    Epoch,
    Profile,
    Reconfiguration,
    Run,
)
from tests.strategies import values_of
from tests.traces import CPU, dense_trace, residual_network, shrinking_records, shrinking_trace, write_trace


def broken(path: Path, line: int, edit: Any) -> Path:
    """A trace whose 1-based `line` was edited: `edit` changes the decoded object, or replaces the text."""
    file = shrinking_trace(path / "trace.jsonl")
    lines = file.read_text().splitlines()
    if callable(edit):
        record = json.loads(lines[line - 1])
        edit(record)
        lines[line - 1] = json.dumps(record)
    else:
        lines[line - 1] = edit
    file.write_text("\n".join(lines) + "\n")
    return file


def line_of(kind: type, nth: int = 0) -> int:
    """1-based line of the nth record of a kind in the default trace."""
    return [i for i, record in enumerate(shrinking_records(), start=1) if isinstance(record, kind)][nth]


class TestRoundTrip:
    @pytest.mark.slow
    @given(values_of(Run | Architecture | Profile | Epoch | Reconfiguration | End))
    @settings(max_examples=100, deadline=None)
    def test_decoding_an_encoded_record_gives_it_back(self, record: AnyRecord) -> None:
        assert msgspec.json.decode(msgspec.json.encode(record), type=AnyRecord) == record

    def test_reading_gives_the_records_that_were_written(self, tmp_path: Path) -> None:
        records = shrinking_records()
        file = write_trace(tmp_path, records)
        assert [record for _, record in read_records(file)] == records
        assert [number for number, _ in read_records(file)] == list(range(1, len(records) + 1))

    def test_a_trace_sorts_its_records(self, tmp_path: Path) -> None:
        records = shrinking_records()
        trace = read_trace(write_trace(tmp_path, records))
        assert trace.run == records[0]
        assert trace.end == records[-1]
        assert list(trace.epochs) == [r for r in records if isinstance(r, Epoch)]
        assert list(trace.profiles) == [r for r in records if isinstance(r, Profile)]
        assert list(trace.reconfigurations) == [r for r in records if isinstance(r, Reconfiguration)]
        assert list(trace.networks) == [r.id for r in records if isinstance(r, Architecture)]
        assert trace.network_of(trace.epochs[0]).id == trace.epochs[0].architecture
        assert trace.complete
        assert not trace.truncated

    def test_a_run_folder_means_the_trace_inside(self, tmp_path: Path) -> None:
        file = dense_trace(tmp_path, device=CPU)
        assert file == tmp_path / "trace.jsonl"
        assert read_trace(tmp_path).path == file

    def test_ids_survive_reading(self, tmp_path: Path) -> None:
        trace = read_trace(shrinking_trace(tmp_path))
        assert all(network.id == key for key, network in trace.networks.items())


class TestCrashes:
    def test_a_torn_last_line_is_dropped_with_a_warning_that_names_file_and_line(self, tmp_path: Path) -> None:
        file = shrinking_trace(tmp_path, truncated=True)
        last = len(shrinking_records())
        with pytest.warns(UserWarning, match=rf"{re.escape(str(file))}:{last}: dropped an incomplete last line"):
            trace = read_trace(file)
        assert trace.truncated
        assert trace.end is None
        assert not trace.complete
        assert len(trace.epochs) == 6

    def test_a_warning_of_something_else_while_a_trace_is_read_is_none_of_the_trace(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file, decode = shrinking_trace(tmp_path), io.decode_json

        def noisy(*given: Any, **named: Any) -> Any:
            warnings.warn("unclosed file", ResourceWarning, stacklevel=2)  # as garbage collection may at any moment
            return decode(*given, **named)

        monkeypatch.setattr(io, "decode_json", noisy)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            assert not read_trace(file).truncated

    @pytest.mark.parametrize("lost", [1, 2, 17])
    def test_any_number_of_lost_bytes_loses_one_line_at_most(self, tmp_path: Path, lost: int) -> None:
        file = shrinking_trace(tmp_path)
        file.write_bytes(file.read_bytes()[:-lost])
        with pytest.warns(UserWarning, match="incomplete last line"):
            assert len(list(read_records(file))) == len(shrinking_records()) - 1

    def test_appending_after_a_crash_replaces_the_torn_line(self, tmp_path: Path) -> None:
        file = shrinking_trace(tmp_path, truncated=True)
        records = shrinking_records()
        with TraceWriter(file, append=True) as writer:
            writer.write(records[-1])
        assert [record for _, record in read_records(file)] == records

    @pytest.mark.parametrize("version", range(1, SCHEMA_VERSION + 1))
    def test_a_trace_of_an_older_schema_that_is_gone_on_with_becomes_one_of_todays(
        self, tmp_path: Path, version: int
    ) -> None:
        """New lines have today's fields: a reader of the old schema must hear that, not of an unknown field."""
        file = shrinking_trace(tmp_path)
        head = f'{{"record":"run","schema_version":{version},'.encode()
        content = re.sub(rb'^{"record":"run","schema_version":\d,', head, file.read_bytes())
        content = content[: content.rindex(b"\n", 0, -1) + 1]  # without its end
        file.write_bytes(content)
        keep = {"keep_bytes": len(content), "keep_sha256": hashlib.sha256(content).hexdigest()}
        for _ in range(2):  # the second time the checkpoint still knows the old head: the run was killed meanwhile
            with TraceWriter(file, append=True, **keep) as writer:
                writer.write(shrinking_records()[-1])
            assert [record for _, record in read_records(file)] == shrinking_records()
            assert writer.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
            assert writer.num_bytes == len(file.read_bytes())
        other = keep | {"keep_sha256": hashlib.sha256(content.replace(b"resnet14", b"resnet15")).hexdigest()}
        with pytest.raises(FileFormatError, match="the trace of another run"):
            TraceWriter(file, append=True, **other)

    def test_a_write_that_the_disk_refuses_halfway_leaves_no_hole(self, tmp_path: Path) -> None:
        """A limit on the size of files stands for the full disk; it lets a part of the line through."""
        records, before = shrinking_records(), resource.getrlimit(resource.RLIMIT_FSIZE)
        with TraceWriter(tmp_path / "trace.jsonl") as writer:
            for record in records[:3]:
                writer.write(record)
            resource.setrlimit(resource.RLIMIT_FSIZE, (writer.num_bytes + 50, before[1]))
            try:
                with pytest.raises(OSError, match="File too large"):
                    writer.write(records[3])
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            writer.write(records[-1])
            assert writer.sha256 == hashlib.sha256(writer.path.read_bytes()).hexdigest()
        assert [record for _, record in read_records(writer.path)] == [*records[:3], records[-1]]

    def test_a_trace_of_a_newer_schema_keeps_its_head(self, tmp_path: Path) -> None:
        file = shrinking_trace(tmp_path)
        newer = file.read_bytes().replace(b'"schema_version":%d' % SCHEMA_VERSION, b'"schema_version":9')
        file.write_bytes(newer)
        with TraceWriter(file, append=True):
            assert file.read_bytes() == newer

    def test_appending_to_a_trace_that_is_all_torn_starts_it_again(self, tmp_path: Path) -> None:
        file = tmp_path / "trace.jsonl"
        file.write_bytes(b'{"record":"ru')
        records = shrinking_records()
        with TraceWriter(file, append=True) as writer:
            for record in records:
                writer.write(record)
        assert [record for _, record in read_records(file)] == records

    def test_a_run_that_was_interrupted_is_not_complete(self, tmp_path: Path) -> None:
        trace = read_trace(shrinking_trace(tmp_path, status="interrupted", recorded_epochs=3))
        assert trace.end is not None
        assert trace.end.status == "interrupted"
        assert not trace.complete

    def test_a_new_trace_never_overwrites_another(self, tmp_path: Path) -> None:
        file = shrinking_trace(tmp_path)
        with pytest.raises(FileExistsError):
            TraceWriter(file)

    def test_every_record_is_on_disk_when_write_returns(self, tmp_path: Path) -> None:
        file = tmp_path / "trace.jsonl"
        writer = TraceWriter(file)
        for number, record in enumerate(shrinking_records(), start=1):
            writer.write(record)
            assert file.read_bytes().count(b"\n") == number
        writer.close()

    def test_a_record_that_could_not_be_read_back_is_not_written(self, tmp_path: Path) -> None:
        records = shrinking_records()
        epoch = next(record for record in records if isinstance(record, Epoch))
        file = tmp_path / "trace.jsonl"
        with TraceWriter(file) as writer:
            writer.write(records[0])
            with pytest.raises(ValueError, match=r"train_loss"):
                writer.write(msgspec.structs.replace(epoch, train_loss=float("nan")))
        assert len(list(read_records(file))) == 1


class TestWrongFiles:
    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileFormatError, match=r"nowhere: no trace here"):
            read_trace(tmp_path / "nowhere")

    def test_a_folder_without_a_trace_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileFormatError, match="no trace here"):
            read_trace(tmp_path)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\n",
            b"epoch,loss\n1,2.3\n",
            b'{"foo": 1}\n',
            b"\x80\x04\x95\n\n",
            b"[1, 2]\n",
            b'{"record": "epoch", "schema_version": 1}\n',
            b'{"record": "run"}\n',
        ],
    )
    def test_a_foreign_file_is_refused_in_one_sentence(self, tmp_path: Path, content: bytes) -> None:
        file = tmp_path / "other.txt"
        file.write_bytes(content)
        with pytest.raises(FileFormatError) as caught:
            read_trace(file)
        assert str(file) in caught.value.message
        assert "\n" not in caught.value.message

    def test_a_newer_version_is_refused_and_says_what_to_do(self, tmp_path: Path) -> None:
        file = broken(tmp_path, 1, lambda record: record.update(schema_version=SCHEMA_VERSION + 1, brand_new_field=1))
        with pytest.raises(NewerVersionError, match=rf":1: schema version {SCHEMA_VERSION + 1} is newer") as caught:
            read_trace(file)
        assert caught.value.hint == "update ptsim"

    def test_a_version_below_one_is_refused(self, tmp_path: Path) -> None:
        file = broken(tmp_path, 1, lambda record: record.update(schema_version=0))
        with pytest.raises(FileFormatError, match="'schema_version' is 0"):
            read_trace(file)

    @pytest.mark.parametrize(
        ("kind", "edit", "field"),
        [
            (Epoch, lambda r: r["time"].update(wall_s="fast"), r"\$\.time\.wall_s"),
            (Epoch, lambda r: r["time"].update(wall_s=-1.0), r"\$\.time\.wall_s"),
            (Epoch, lambda r: r.pop("num_iterations"), "num_iterations"),
            (Epoch, lambda r: r.update(num_iterations=0), r"\$\.num_iterations"),
            (Epoch, lambda r: r.update(batch_per_gpu=0), r"\$\.batch_per_gpu"),
            (Epoch, lambda r: r.update(batch_per_gpu=1.5), r"\$\.batch_per_gpu"),
            (Epoch, lambda r: r.update(surprise=1), "surprise"),
            (Run, lambda r: r.update(precision="fp8"), r"\$\.precision"),
            (Run, lambda r: r["device"].update(kind="tpu"), r"\$\.device\.kind"),
            (Architecture, lambda r: r["network"]["layers"][3].update(kind="wormhole"), r"layers\[.*\]\.kind"),
            (Profile, lambda r: r["layers"][0].update(forward_s=None), r"layers\[.*\]\.forward_s"),
            (Profile, lambda r: r.update(step_s=0.0), "'step_s' is 0, expected more"),
            (Profile, lambda r: r.update(step_s=1e-320), "the parts of the step take"),
            (Profile, lambda r: r.update(regularizer_s=2.0**31), "the parts of the step take"),
            (Epoch, lambda r: r["time"].update(dict.fromkeys(r["time"], 0.0)), "'wall_s' is 0, expected more"),
            (Epoch, lambda r: r["time"].update(exposed_communication_s=-3e9), "'exposed_communication_s' is -3e"),
            (Epoch, lambda r: r["step"].update(p10_s=1e-320), "are no times of steps of one epoch"),
            (Epoch, lambda r: r["step"].update(median_s=2 * r["step"]["p90_s"]), "do not rise"),
            (Epoch, lambda r: r["step"].update(p10_s=2 * r["step"]["median_s"]), "do not rise"),
            (Epoch, lambda r: r.update(num_images=16_385), "'num_images' is 16385, expected at most 16384 in 78"),
            (Epoch, lambda r: r["time"].update(forward_s=2.1 * r["time"]["wall_s"]), "the parts of the epoch take"),
            (Epoch, lambda r: r["densities"][0].update(layer="nowhere"), "'densities' names the layer 'nowhere'"),
            (Epoch, lambda r: r.update(channel_maxima={"nowhere": [1.0]}), "'channel_maxima' names the layer"),
            (Profile, lambda r: r["layers"][0].update(layer="nowhere"), "'layers' names the layer 'nowhere'"),
            (Profile, lambda r: r.update(step_low_s=1.1 * r["step_s"]), "'step_s' is .*, expected between step_low_s"),
            (Profile, lambda r: r.update(step_high_s=0.9 * r["step_s"]), "'step_s' is .*, expected between step_low_s"),
            (Profile, lambda r: r.update(architecture="0123456789abcdef"), "'architecture'"),
            (Run, lambda r: r.update(seed=2**64), "'seed' is out of range"),
            (Run, lambda r: r.update(seed=-(2**63) - 1), "'seed' is out of range"),
            (Run, lambda r: r["hyperparameters"].update(epochs=True), "epochs is True, expected a whole number"),
            (Run, lambda r: r["hyperparameters"].update(optimizer=1), "optimizer is 1, expected a text"),
            (Run, lambda r: r["hyperparameters"].update(broadcast_buffers=1), "buffers is 1, expected true or false"),
            (Reconfiguration, lambda r: r.update(before="0123456789abcdef"), "'before'"),
            (End, lambda r: r.update(status="meh"), r"\$\.status"),
            (Epoch, lambda r: r.update(record="eporch"), "eporch"),
            (Epoch, lambda r: r.update(architecture="0123456789abcdef"), "'architecture'"),
            (Epoch, lambda r: r.update(epoch=7), "'epoch' is 7, expected 0"),
            (Architecture, lambda r: r.update(id="0123456789abcdef"), "'id' is '0123456789abcdef'"),
            (Reconfiguration, lambda r: r.update(after="0123456789abcdef"), "'after'"),
        ],
    )
    def test_a_broken_field_is_named_with_file_and_line(
        self, tmp_path: Path, kind: type, edit: Any, field: str
    ) -> None:
        line = line_of(kind)
        file = broken(tmp_path, line, edit)
        with pytest.raises(FileFormatError, match=field) as caught:
            read_trace(file)
        assert caught.value.message.startswith(f"{file}:{line}: ")
        assert caught.value.line == line
        assert "\n" not in caught.value.message

    @pytest.mark.parametrize(
        "text", ["", "{", "null", '{"record": "epoch"', "\ud800".encode("utf-8", "replace").decode()]
    )
    def test_a_broken_line_in_the_middle_is_an_error_with_its_number(self, tmp_path: Path, text: str) -> None:
        file = broken(tmp_path, 5, text)
        with pytest.raises(FileFormatError, match=rf"{re.escape(str(file))}:5: "):
            read_trace(file)

    def test_two_runs_in_one_file_are_refused(self, tmp_path: Path) -> None:
        records = shrinking_records()
        with pytest.raises(FileFormatError, match=":3: a second run record"):
            read_trace(write_trace(tmp_path, [*records[:2], records[0]]))

    def test_nothing_may_follow_the_end(self, tmp_path: Path) -> None:
        records = shrinking_records()
        with pytest.raises(FileFormatError, match="found 'epoch' after the end record"):
            read_trace(write_trace(tmp_path, [*records, next(r for r in records if isinstance(r, Epoch))]))


@pytest.mark.parametrize(
    ("kind", "edit"),
    [
        (Run, lambda r: r.update(seed=2**64 - 1)),
        (Run, lambda r: r.update(seed=-(2**63))),
        (Reconfiguration, lambda r: r.update(duration_s=0.0)),
        (Reconfiguration, lambda r: r.update(duration_s=1e-6)),
        (Reconfiguration, lambda r: r.update(duration_s=1e6)),
        (Profile, lambda r: r.update(step_low_s=r["step_s"], step_high_s=r["step_s"])),
        (Epoch, lambda r: r["step"].update(p10_s=1.1e-6 * r["step"]["p90_s"])),
        # clocks of their own: the parts may take up to twice as long as the whole
        (Epoch, lambda r: r["time"].update(dict.fromkeys(("forward_s", "backward_s"), 0.85 * r["time"]["wall_s"]))),
        # a GradScaler left out a hundred updates in a row, and then one for each of the 78 that were made
        (Epoch, lambda r: r.update(num_images=(78 + 100 + 78) * 64)),
        (Epoch, lambda r: r["time"].update(exposed_communication_s=-1.9 * r["time"]["wall_s"])),
    ],
)
def test_what_can_just_be_true_is_read(tmp_path: Path, kind: type, edit: Any) -> None:
    assert len(read_trace(broken(tmp_path, line_of(kind), edit)).epochs) == 6


def test_an_interrupt_while_a_record_is_written_leaves_the_trace_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    file, (first, second, third, *_) = tmp_path / "trace.jsonl", shrinking_records()
    with TraceWriter(file) as writer:
        writer.write(first)
        writer.write(second)
        before = file.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", interrupted)
            with pytest.raises(KeyboardInterrupt):
                writer.write(third)
        assert file.read_bytes() == before
        writer.write(third)
        assert (writer.num_bytes, writer.sha256) == (file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
    assert [record for _, record in read_records(file)] == [first, second, third]


@pytest.mark.parametrize("epoch", [0, 2, 2**40])
def test_a_reconfiguration_stands_after_its_epoch(tmp_path: Path, epoch: int) -> None:
    line = line_of(Reconfiguration)
    records = shrinking_records()
    before = sum(isinstance(record, Epoch) for record in records[: line - 1])
    file = broken(tmp_path, line, lambda record: record.update(epoch=epoch))
    if epoch == before - 1:
        assert read_trace(file).reconfigurations[0].epoch == epoch
        return
    with pytest.raises(FileFormatError, match=f":{line}: field 'epoch' is {epoch}, expected {before - 1}, the epoch"):
        read_trace(file)


@pytest.mark.parametrize("seconds", [1e-30, 1e-7, 2e6])
def test_no_network_is_changed_in_no_time(tmp_path: Path, seconds: float) -> None:
    file = broken(tmp_path, line_of(Reconfiguration), lambda record: record.update(duration_s=seconds))
    says = re.escape(f"field 'duration_s' is {seconds:g}, expected 0 or 1e-06 to 1e")
    with pytest.raises(FileFormatError, match=says):
        read_trace(file)


def test_the_end_tells_as_many_epochs_as_there_are(tmp_path: Path) -> None:
    told = sum(isinstance(record, Epoch) for record in shrinking_records())
    file = broken(tmp_path, line_of(End), lambda record: record.update(epochs=told + 1))
    with pytest.raises(FileFormatError, match=f"field 'epochs' is {told + 1}, but the trace has {told}"):
        read_trace(file)


def test_the_iterations_of_the_end_are_those_of_the_epochs(tmp_path: Path) -> None:
    total = sum(record.num_iterations for record in shrinking_records() if isinstance(record, Epoch))
    file = broken(tmp_path, line_of(End), lambda record: record.update(num_iterations=2 * total))
    with pytest.raises(FileFormatError, match=f"field 'num_iterations' is {2 * total}, but the epochs have {total}"):
        read_trace(file)


def test_two_changes_after_one_epoch_are_both_written_and_both_paid_for(tmp_path: Path) -> None:
    """PruneTrain prunes after an epoch, and another program changes the network before the next one."""
    records = shrinking_records()
    at = line_of(Reconfiguration) - 1
    told = records[at]
    assert isinstance(told, Reconfiguration)
    first = msgspec.structs.replace(told, measured_duration_s=2.0)
    second = msgspec.structs.replace(first, before=first.after, measured_duration_s=None, channels_removed=0)
    third = msgspec.structs.replace(second, measured_duration_s=0.5)
    trace = read_trace(write_trace(tmp_path, [*records[:at], first, second, third, *records[at + 1 :]]))
    again = read_trace(write_whole_trace(tmp_path / "again.jsonl", trace))
    assert again.reconfigurations == trace.reconfigurations
    assert trace.epochs_frame()["reconfiguration_seconds"][first.epoch] == 2.5


def test_a_changed_shape_is_noticed_by_the_content_address(tmp_path: Path) -> None:
    line = line_of(Architecture)
    file = broken(tmp_path, line, lambda record: record["network"]["layers"][0].update(out_channels=99))
    with pytest.raises(FileFormatError, match="content has the id") as caught:
        read_trace(file)
    assert caught.value.line == line


def test_a_network_is_written_once_per_architecture() -> None:
    ids = [record.id for record in shrinking_records() if isinstance(record, Architecture)]
    assert len(ids) == len(set(ids)) == 3
    assert residual_network().id == ids[0]
