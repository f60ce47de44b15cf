"""How files are read and written: within limits, as one sentence where they are broken, whole or not at all."""

from __future__ import annotations

import bisect
import codecs
import contextlib
import difflib
import errno
import fcntl
import functools
import math
import operator
import os
import re
import stat
import tempfile
import tomllib
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec
import msgspec.inspect

from ptsim.errors import FileFormatError, UsageError

MOST_BYTES = 256 * 2**20  # of any file that is read as a whole
MOST_TOML_BYTES = 16 * 2**20  # the TOML parser reads about 1 MB/s
MOST_LEVELS = 32  # of tables and lists inside each other
_DOTTED = re.compile(r"^[ \t\[]*(?:[^\s.=\[\]{}\"']+[ \t]*\.[ \t]*){32}", re.MULTILINE)  # a.b.c.… = 1
LARGEST, SMALLEST = 1e30, 1e-30  # no quantity in a file that a person writes is beyond
LARGEST_INTEGER = 2**63 - 1  # TOML's own bound
_GZIP = b"\x1f\x8b"
_OTHER = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # how they begin
_TAR = slice(257, 262), b"ustar"
_WIDE = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE

T = TypeVar("T")


def take_lock(handle: int | BinaryIO) -> bool:
    """Lock an open file or folder for this process; False where another one has it.

    The system takes the lock from a process that closes the file or dies.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_regular(path: str | Path) -> int:
    """A descriptor of the regular file `path`, open for reading; pipes and devices are never waited for.

    Raises:
        FileFormatError: there is no such file, it is something else, or may not be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise FileFormatError(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:  # the operating system's names end at a NUL character
        raise FileFormatError(path, f"is not a file name: {error}") from error
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return handle
    os.close(handle)
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
    raise FileFormatError(path, f"cannot be read: it is {kind}, expected a file")


def read_bytes(path: str | Path, *, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        FileFormatError: it cannot be read, is no regular file, or is larger.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise FileFormatError(path, f"has {size:,} bytes, at most {most:,} are read")
        try:
            return file.read()
        except OSError as error:
            raise FileFormatError(path, f"cannot be read: {error.strerror}") from error


def unpacked(path: str | Path, content: bytes, *, most: int = MOST_BYTES) -> bytes:
    """What a gzip file holds, at most `most` bytes; of any other file its content.

    Raises:
        FileFormatError: the gzip file is broken, ends too early, holds more or another one, or the file is another
            kind of archive.
    """
    plain = _unzipped(path, content, most) if content.startswith(_GZIP) else content
    if plain.startswith(_GZIP):
        raise FileFormatError(path, "is a gzip file inside a gzip file", hint="unpack it first")
    kind = next((kind for begin, kind in _OTHER.items() if plain.startswith(begin)), None)
    if kind or plain[_TAR[0]] == _TAR[1]:
        raise FileFormatError(
            path, f"is a {kind or 'tar'} archive, expected a file or a gzip file", hint="unpack it first"
        )
    return plain


def _unzipped(path: str | Path, content: bytes, most: int) -> bytes:
    plain: list[bytes] = []
    left, rest = most + 1, content
    while rest.startswith(_GZIP):  # several may follow each other, as when logs are put together
        stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        try:
            plain.append(stream.decompress(rest, left))
        except zlib.error as error:
            raise FileFormatError(path, f"is a broken gzip file: {error}") from error
        left -= len(plain[-1])
        if left < 1:
            raise FileFormatError(path, f"unpacks to more than {most:,} bytes, which is the most that are read")
        if not stream.eof:
            raise FileFormatError(path, "is a broken gzip file: it ends too early")
        rest = stream.unused_data
    return b"".join(plain)


def decode_text(content: bytes) -> str:
    """The text of a log: UTF-8, or UTF-16 where a byte order mark says so, as PowerShell's `>` writes it.

    A byte order mark is skipped; what is not text becomes U+FFFD.
    """
    wide = content.startswith(_WIDE)
    return content.decode("utf-16" if wide else "utf-8-sig", errors="replace")


def read_lines(path: str | Path, *, most: int, most_of_line: int) -> Iterator[bytes]:
    """The lines of a regular file one after the other, as they end in the file: the last one may lack its newline.

    No more than a line is in memory.

    Raises:
        FileFormatError: as `read_bytes`, or a line is longer than `most_of_line`.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise FileFormatError(path, f"has {size:,} bytes, at most {most:,} are read")
        number = 0
        while line := _next_line(path, file, most_of_line + 1):
            number += 1
            if len(line) > most_of_line:
                raise FileFormatError(path, f"the line has more than {most_of_line:,} bytes", line=number)
            yield line


def _next_line(path: str | Path, file: BinaryIO, most: int) -> bytes:
    try:
        return file.readline(most)
    except OSError as error:
        raise FileFormatError(path, f"cannot be read: {error.strerror}") from error


def read_toml(path: str | Path) -> dict[str, Any]:
    """The content of a TOML file; a byte order mark is skipped.

    Raises:
        FileFormatError: the file cannot be read, is larger than 16 MiB, is not TOML, is nested too deep, or holds a
            number or a text that no setting can have.
    """
    return parse_toml(path, read_bytes(path, most=MOST_TOML_BYTES))


def parse_toml(path: str | Path, content: bytes) -> dict[str, Any]:
    """The same of a file's content; `path` names it in errors."""
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise FileFormatError(path, f"is not TOML: {error}") from error
    too_deep = f"is nested more than {MOST_LEVELS} levels deep"
    if _DOTTED.search(text):
        raise FileFormatError(path, too_deep)
    try:
        document = tomllib.loads(text)
    except RecursionError as error:
        raise FileFormatError(path, too_deep) from error
    except ValueError as error:  # TOMLDecodeError, and integers of more than 4300 digits
        raise FileFormatError(path, f"is not TOML: {error}") from error
    open_values: list[tuple[str, Any, int]] = [("", document, 0)]
    while open_values:
        place, value, level = open_values.pop()
        if level > MOST_LEVELS:
            raise FileFormatError(path, too_deep)
        if isinstance(value, dict):
            open_values += [(f"{place}.{key}" if place else key, inner, level + 1) for key, inner in value.items()]
        elif isinstance(value, list):
            open_values += [(f"{place}[{index}]", inner, level + 1) for index, inner in enumerate(value)]
        elif problem := _problem(value):
            raise FileFormatError(path, f"{place} {problem}")
    return document


def _problem(value: Any) -> str | None:
    """Why no setting of any file can have this value."""
    if isinstance(value, str) and "\0" in value:
        return "is a text with a NUL character"
    if isinstance(value, int) and not -LARGEST_INTEGER <= value <= LARGEST_INTEGER:
        return "is a whole number of more than 63 bits"
    if isinstance(value, float) and value and not SMALLEST <= abs(value) <= LARGEST:
        bounds = f"a number between {SMALLEST:g} and {LARGEST:g}"
        return f"is {value!r}, expected {bounds}" if math.isfinite(value) else f"is not finite, expected {bounds}"
    return None


def decode_json(
    path: str | Path,
    content: bytes | str,
    decoder: msgspec.json.Decoder[T],
    *,
    line: int | None = None,
    what: str | None = None,
) -> T:
    """The JSON document `content` of the file `path`, checked against the decoder's type.

    Args:
        path: named in errors.
        content: the document; bytes may begin with a byte order mark, as of a log.
        decoder: of the type that it must have.
        line: where in the file it stands, if that is one line of many.
        what: what it should be, with its article, for the error.

    Raises:
        FileFormatError: it is not such a document; says what was found and expected, and where.
    """
    prefix = f"not {what}: " if what else ""
    if isinstance(content, bytes) and content.startswith((codecs.BOM_UTF8, *_WIDE)):
        content = decode_text(content)
    try:
        return decoder.decode(content)
    except RecursionError as error:
        raise FileFormatError(path, f"{prefix}the JSON is nested too deep", line=line) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(path, f"{prefix}{error}", line=line) from error


def convert_toml(path: str | Path, raw: Any, kind: type[T], *, dec_hook: Callable[[type, Any], Any] | None = None) -> T:
    """The record that a TOML document is.

    Raises:
        FileFormatError: an unknown or missing key, or a wrong value; says the place, what was found and expected.
    """
    try:
        return msgspec.convert(raw, kind, dec_hook=dec_hook)
    except msgspec.ValidationError as error:
        problem, hint = _explain(str(error), raw, kind, dec_hook)
        raise FileFormatError(path, problem, hint=hint) from error


_PLACED = re.compile(r"(?P<what>.*?)(?: - at `\$(?P<place>.*)`)?", re.DOTALL)
_STEPS = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]|\[\.\.\.\]")
_WORDS = {
    "int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "array": "a list",
    "object": "a table", "null": "nothing",
}  # fmt: skip


def _explain(message: str, raw: Any, kind: Any, dec_hook: Callable[[type, Any], Any] | None) -> tuple[str, str | None]:
    """Msgspec's complaint as a sentence about the file, and a hint where a key was meant that exists."""
    match = _PLACED.fullmatch(message)
    assert match is not None, "the pattern takes any text"

    def same(document: Any) -> bool:
        try:
            msgspec.convert(document, kind, dec_hook=dec_hook)
        except msgspec.ValidationError as error:
            return str(error) == message
        return False

    what, way = match["what"], _way(match["place"] or "", raw, same)
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in way).removeprefix(".")
    inside = f"{place}." if place else ""
    if found := re.fullmatch(r"Object missing required field `(.*)`", what):
        return f"{inside}{found[1]} is missing", None
    value, shape = _at(way, raw, kind)
    if found := re.fullmatch(r"Object contains unknown field `(.*)`", what):
        known = [field.encode_name for field in getattr(shape, "fields", ())]
        close = difflib.get_close_matches(found[1], known, n=1)
        expected = f", expected one of {', '.join(known)}" if known else ""
        return f"{inside}{found[1]} is not a known key{expected}", f"did you mean {close[0]}?" if close else None
    values = getattr(shape, "values", None)  # of a Literal
    if isinstance(shape, msgspec.inspect.EnumType):
        values = [member.value for member in shape.cls]
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    if values:
        return f"{place} is {shown}, expected one of {', '.join(map(str, values))}", None
    if what == "Invalid RFC3339 encoded date":
        return f"{place} is {shown}, expected a day such as '2026-09-24'", None
    if found := re.match(r"Expected `([^`]*)`(.*?)(?:, got .*)?$", what):
        kinds = " or ".join(_WORDS.get(word.strip(), word.strip()) for word in found[1].split("|") if word != " null")
        bound = found[2].replace(">=", "of at least").replace("<=", "of at most").replace("matching regex", "like")
        return f"{place or 'the file'} is {shown}, expected {kinds}{bound}", None
    return f"{place or 'the file'}: {what}", None


def _way(place: str, raw: Any, same: Callable[[Any], bool]) -> list[str | int]:
    """The keys and indices that lead to a place, where msgspec writes `[...]` for a key of a table without fields.

    `same` tells whether a document gives the same complaint: so does a table up to the key that is meant, and not
    without it.
    """
    way: list[str | int] = []
    for name, index in _STEPS.findall(place):
        if name or index:
            way.append(name or int(index))
            continue
        items = list(functools.reduce(operator.getitem, way, raw).items())
        ends = range(1, len(items))
        end = bisect.bisect_left(ends, True, key=lambda end: same(_with(raw, way, dict(items[:end]))))
        raw = _with(raw, way, dict(items[end : end + 1]))  # another table inside may hold the same mistake
        way.append(items[end][0])
    return way


def _with(document: Any, way: Sequence[str | int], value: Any) -> Any:
    """The document with another value at a place."""
    if not way:
        return value
    copied = document.copy()
    copied[way[0]] = _with(document[way[0]], way[1:], value)
    return copied


def _at(way: Sequence[str | int], raw: Any, kind: Any) -> tuple[Any, Any]:
    """The value at a place of a document and the type that it should have, as far as that can be followed."""
    value, shape = raw, _one_shape(msgspec.inspect.type_info(kind))
    for step in way:
        value = value[step]
        if isinstance(shape, msgspec.inspect.StructType):
            shape = next((field.type for field in shape.fields if field.encode_name == step), None)
        elif isinstance(shape, msgspec.inspect.DictType):
            shape = shape.value_type
        else:
            shape = getattr(shape, "item_type", None)
        shape = _one_shape(shape)
    return value, shape


def _one_shape(shape: Any) -> Any:
    """Of "this or nothing" this."""
    if isinstance(shape, msgspec.inspect.UnionType):
        shape = next((kind for kind in shape.types if not isinstance(kind, msgspec.inspect.NoneType)), None)
    return shape


def check_writable(path: str | Path) -> None:
    """Find out before a long computation that its result could not be written.

    Makes the folder where there is none yet.

    Raises:
        UsageError: `path` is a folder, or its folder cannot be made or written.
    """
    if "\0" in str(path):
        raise UsageError(f"{str(path)!r} is not a file name")
    target = Path(os.path.realpath(path))
    if os.path.isdir(target):
        raise UsageError(f"{path} is a folder, expected a file to write")
    if os.path.lexists(target) and not os.path.isfile(target):
        raise UsageError(f"{path} is a pipe, a device or a broken link, expected a file to write")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target)  # too long a name
        handle, beside = tempfile.mkstemp(dir=target.parent)
        os.close(handle)
        os.unlink(beside)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def check_folder_writable(path: str | Path) -> None:
    """Find out before a long computation that a folder for its results could not be made; makes nothing.

    Raises:
        UsageError: `path` or something above it is no folder, or one that may not be written.
    """
    if "\0" in str(path):
        raise UsageError(f"{str(path)!r} is not a file name")
    place = Path(os.path.realpath(path))
    try:
        while not os.path.lexists(place):
            with contextlib.suppress(FileNotFoundError):
                os.lstat(place)  # too long a name
            place = place.parent
    except OSError as error:
        raise UsageError(f"the folder {path} cannot be written: {error.strerror}") from error
    if not os.path.isdir(place):
        raise UsageError(f"the folder {path} cannot be written: {place} is a file, expected a folder")
    if not os.access(place, os.W_OK | os.X_OK) or Path("/proc") in (place, *place.parents):
        raise UsageError(f"the folder {path} cannot be written: {place} may not be written")


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all: readers see the old content or the new one, never a part.

    A link is followed, so that it still points to the file afterwards. Text is UTF-8.

    Raises:
        OSError: the folder cannot be written, the disk is full, or `path` is a pipe or a device; an old file is
            untouched.
    """
    with writing_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def writing_whole(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write into piece by piece; it gets its name when the block ends without an error.

    Otherwise as `write_whole`.
    """
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not (os.path.isfile(target) or os.path.isdir(target)):
        raise OSError(errno.EINVAL, "is a pipe, a device or a broken link, expected a file", str(path))
    handle, beside = tempfile.mkstemp(prefix=f".{target.name[:50]}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), _permissions(target))
        os.replace(beside, target)
        sync_folder(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def sync_folder(folder: Path) -> None:
    """Wait until the names of the folder's files are on the disk, so that they survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def printable(text: str, most: int | None = None) -> str:
    """A name from a file or a user as it can be shown anywhere: on one line, without characters that act.

    Control characters, terminal escapes and marks that turn the direction of writing become U+FFFD, white space becomes
    one blank. `most` letters remain at most; the middle is left out then.
    """
    text = " ".join(text.split())
    text = "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ACTING else c for c in text)
    if most is not None and len(text) > most:
        head = (most - 1) // 2
        text = f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"
    return text


ACTING = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format, surrogate, line and paragraph separator


def split_lines(content: bytes) -> tuple[list[bytes], bytes]:
    """The whole lines of a JSON Lines file, and the line that was being written when its writer died (often empty)."""
    *lines, torn = content.split(b"\n")
    return lines, torn


def drop_torn_line(path: Path) -> None:
    """Cut from the file what follows its last newline: a line that a crash left incomplete."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _permissions(target: Path) -> int:
    """Those of the file that is replaced, else those that a new file gets."""
    with contextlib.suppress(OSError):
        return target.stat().st_mode & 0o7777
    return 0o666 & ~umask()


def umask() -> int:
    """Which permissions new files of this process do not get.

    Linux tells; asking the system call itself would take the mask away from other threads for a moment.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.removeprefix("Umask:"), 8)
    mask = os.umask(0)
    os.umask(mask)
    return mask
