"""Files are read within limits and written whole or not at all; every broken one is a sentence."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import tarfile
import zipfile
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest

from ptsim.errors import FileFormatError, UsageError
from ptsim.textfile import (
    check_folder_writable,
    check_writable,
    convert_toml,
    decode_json,
    drop_torn_line,
    read_bytes,
    read_lines,
    read_toml,
    take_lock,
    unpacked,
    write_whole,
    writing_whole,
)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a = " + "[" * 5000, "nested more than 32 levels"),
        ("a = " + "[" * 40 + "]" * 40, "nested more than 32 levels"),
        (".".join("a" * 5000) + " = 1", "nested more than 32 levels"),
        ("a = " + "9" * 5000, "is not TOML"),
        ("[t]\na = " + "9" * 30, r"t\.a is a whole number of more than 63 bits"),
        ("a = [1, 1e400]", r"a\[1\] is not finite"),
        ("a = nan", "a is not finite"),
        ("a = 1e-320", r"a is 1e-320, expected a number between 1e-30 and 1e\+30"),
        ('a = "x\\u0000y"', "NUL"),
        ("a = ", "is not TOML"),
    ],
)
def test_what_no_setting_can_be_is_refused_with_its_place(tmp_path, content, sentence):
    file = tmp_path / "x.toml"
    file.write_text(content)
    with pytest.raises(FileFormatError, match=sentence):
        read_toml(file)


def test_the_largest_whole_number_of_toml_is_read_and_the_next_is_not(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text("a = 9223372036854775807")
    assert read_toml(file) == {"a": 2**63 - 1}
    file.write_text("a = 9223372036854775808")
    with pytest.raises(FileFormatError, match="a is a whole number of more than 63 bits"):
        read_toml(file)


@pytest.mark.parametrize(
    "write", [lambda levels: "a = " + "[" * levels + "]" * levels, lambda n: ".".join("a" * n) + " = 1"]
)
def test_32_levels_are_read_and_33_are_not(tmp_path, write):
    file = tmp_path / "x.toml"
    file.write_text(write(32))
    assert list(read_toml(file)) == ["a"]
    file.write_text(write(33))
    with pytest.raises(FileFormatError, match="is nested more than 32 levels deep"):
        read_toml(file)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    file = tmp_path / "x.toml"
    file.write_bytes(b"\xef\xbb\xbfa = 1\r\nb = 2\r\n")
    assert read_toml(file) == {"a": 1, "b": 2}


def test_pipes_devices_folders_and_strange_names_are_one_sentence(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, sentence in (
        (tmp_path / "pipe", "a pipe or a device"),
        ("/dev/zero", "a pipe or a device"),
        (tmp_path, "a folder"),
        (tmp_path / ("x" * 5000), "name too long"),
        (str(tmp_path / "x\0y"), "not a file name"),
        (tmp_path / "none", "No such file"),
    ):
        with pytest.raises(FileFormatError, match=sentence):
            read_bytes(path)


def test_a_file_that_the_system_cannot_read_is_named():
    """Memory that is not mapped: opening it works, reading does not."""
    with pytest.raises(FileFormatError, match=r"^/proc/self/mem: cannot be read: "):
        list(read_lines("/proc/self/mem", most=2**20, most_of_line=2**10))


def test_a_file_beyond_the_limit_is_refused_with_the_limit(tmp_path):
    file = tmp_path / "large"
    with file.open("wb") as handle:
        handle.truncate(2**40)  # no block is stored
    with pytest.raises(FileFormatError, match=r"has 1,099,511,627,776 bytes, at most 16,777,216 are read"):
        read_toml(file)
    with pytest.raises(FileFormatError, match=r"large:1: the line has more than 10 bytes"):
        list(read_lines(file, most=2**41, most_of_line=10))


def test_deep_json_is_one_sentence(tmp_path):
    with pytest.raises(FileFormatError, match=r"f:3: not a thing: the JSON is nested too deep"):
        decode_json("f", b"[" * 100_000, msgspec.json.Decoder(), line=3, what="a thing")


def test_what_cannot_be_written_is_found_out_before(tmp_path):
    (tmp_path / "file").write_text("x")
    for path, sentence in (
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "x.toml", "cannot be written"),
        (tmp_path / ("x" * 300), "cannot be written: File name too long"),
        (f"{tmp_path}/x\0y", "not a file name"),
    ):
        with pytest.raises(UsageError, match=sentence):
            check_writable(path)
    check_writable(tmp_path / "new" / "x.toml")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "new"]


def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
    file = tmp_path / "x"
    file.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_whole(file, "new")
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_file_that_is_written_in_pieces_appears_only_when_it_is_whole(tmp_path):
    file = tmp_path / "x"
    file.write_text("old")

    def fail_half_way() -> None:
        with writing_whole(file) as half:
            half.write(b"half of the ")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "old")]
    with writing_whole(file) as whole:
        whole.write(b"all of the ")
        whole.write(b"new")
        assert file.read_text() == "old"
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "all of the new")]


def test_all_of_a_file_is_on_the_disk_before_it_gets_its_name_and_then_the_name(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("old")
    seen = []

    def note(handle: int) -> None:
        found = os.fstat(handle)
        seen.append((found.st_size if stat.S_ISREG(found.st_mode) else "folder", (tmp_path / "x").read_text()))

    monkeypatch.setattr(os, "fsync", note)
    write_whole(tmp_path / "x", "the new one")
    assert seen == [(11, "old"), ("folder", "the new one")]


def test_a_new_file_gets_the_usual_permissions_and_an_old_one_keeps_its_own(tmp_path):
    usual = os.umask(0o027)
    try:
        for expected in (0o640, 0o604):
            write_whole(tmp_path / "x", "text")
            assert (tmp_path / "x").stat().st_mode & 0o7777 == expected
            (tmp_path / "x").chmod(0o604)
    finally:
        os.umask(usual)


def test_a_torn_line_is_cut(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"a\nb\nc")
    drop_torn_line(file)
    assert file.read_bytes() == b"a\nb\n"


def test_a_pipe_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is a pipe"):
        write_whole(tmp_path / "pipe", "text")
    with pytest.raises(UsageError, match="is a pipe"):
        check_writable(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_folder_that_cannot_be_made_is_found_and_none_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_folder_writable(tmp_path / "new" / "folder")
    for name in ("file", "file/new", "a" * 300, "x\0y"):
        with pytest.raises(UsageError, match=r"cannot be written|is not a file name"):
            check_folder_writable(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("lacking", [os.W_OK, os.X_OK])
def test_a_folder_that_may_not_be_written_or_entered_is_found(tmp_path, monkeypatch, lacking):
    monkeypatch.setattr(os, "access", lambda path, wanted: not wanted & lacking)  # root may do everything
    with pytest.raises(UsageError, match=f"{tmp_path} may not be written"):
        check_folder_writable(tmp_path / "new")


def test_packed_files_are_unpacked_to_their_end_and_to_a_limit() -> None:
    one, other = gzip.compress(b"all of "), gzip.compress(b"it")
    assert unpacked("x", b"plain") == b"plain"
    assert unpacked("x", one + other, most=9) == b"all of it"
    assert unpacked("x", one + bytes(8), most=7) == b"all of "  # zeros fill blocks of a tape
    for content, most, sentence in (
        (one + other, 8, "unpacks to more than 8 bytes"),
        (one + other, 7, "unpacks to more than 7 bytes"),
        (one, 6, "unpacks to more than 6 bytes"),
        (one + other[:-9], 9, "ends too early"),
        (one[:-8] + bytes(8), 9, "is a broken gzip file"),
    ):
        with pytest.raises(FileFormatError, match=sentence):
            unpacked("x", content, most=most)


def test_other_archives_are_named(tmp_path):
    (tmp_path / "log").write_text("rows")
    with tarfile.open(tmp_path / "log.tar", "w") as tar, zipfile.ZipFile(tmp_path / "log.zip", "w") as zipped:
        tar.add(tmp_path / "log", "log")
        zipped.write(tmp_path / "log", "log")
    tarred = (tmp_path / "log.tar").read_bytes()
    for content, kind in (
        (tarred, "tar"),
        (gzip.compress(tarred), "tar"),
        ((tmp_path / "log.zip").read_bytes(), "zip"),
        (lzma.compress(b"rows"), "xz"),
        (bz2.compress(b"rows"), "bzip2"),
    ):
        with pytest.raises(FileFormatError, match=f"is a {kind} archive, expected a file or a gzip file") as caught:
            unpacked("x", content)
        assert caught.value.hint == "unpack it first"


def test_a_gzip_file_inside_a_gzip_file_is_named() -> None:
    with pytest.raises(FileFormatError, match="is a gzip file inside a gzip file"):
        unpacked("x", gzip.compress(gzip.compress(b"a")))


def test_a_name_of_as_many_bytes_as_a_folder_takes_is_written(tmp_path):
    file = tmp_path / ("\N{CJK UNIFIED IDEOGRAPH-7DB2}" * 83 + ".toml")  # 254 bytes
    write_whole(file, "a = 1")
    assert read_toml(file) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_is_locked_once_until_it_is_closed(tmp_path):
    (tmp_path / "x").touch()
    with (tmp_path / "x").open("rb") as one, (tmp_path / "x").open("rb") as other:
        assert take_lock(one)
        assert not take_lock(other)
        one.close()
        assert take_lock(other.fileno())


class Card(msgspec.Struct, forbid_unknown_fields=True):
    speed: int = 1
    kind: Literal["a", "b"] = "a"


class Cards(msgspec.Struct, forbid_unknown_fields=True):
    one: Card | None = None
    rows: list[Card] = []
    cards: dict[str, Card] = {}
    lists: dict[str, dict[str, list[int]]] = {}


GOOD = {"x": {}, "y": {"speed": 2}}
DEEP = {"x": {"p": [1], "q": []}, "y.z": {"p": [1], "q": [2, "w"], "r": ["w", "w"]}, "z": {"p": [1, "w"]}}


@pytest.mark.parametrize(
    ("document", "problem", "hint"),
    [
        ({"one": {"kind": 3}}, "one.kind is 3, expected one of a, b", None),
        ({"rows": [{}, {"speed": "w"}]}, "rows[1].speed is 'w', expected a whole number", None),
        ({"rows": "w" * 58}, f"rows is '{'w' * 58}', expected a list", None),
        ({"rows": "w" * 59}, f"rows is '{'w' * 56}..., expected a list", None),
        ({"cards": GOOD | {"z": 3}}, "cards.z is 3, expected a table", None),
        ({"cards": {"z": 3} | GOOD}, "cards.z is 3, expected a table", None),
        ({"cards": GOOD | {"z": {"kind": "c"}} | GOOD}, "cards.z.kind is 'c', expected one of a, b", None),
        (
            {"cards": GOOD | {"z": {"sped": 1}}},
            "cards.z.sped is not a known key, expected one of speed, kind",
            "did you mean speed?",
        ),
        ({"lists": DEEP}, "lists.y.z.q[1] is 'w', expected a whole number", None),  # the first of several
    ],
)
def test_a_wrong_value_is_named_with_its_place_in_tables_of_any_keys_too(
    document: dict[str, Any], problem: str, hint: str | None
) -> None:
    with pytest.raises(FileFormatError) as caught:
        convert_toml("f", document, Cards)
    assert (str(caught.value), caught.value.hint) == (f"f: {problem}", hint)
