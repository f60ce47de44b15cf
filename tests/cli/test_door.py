"""Whatever happens inside a command, the user gets one sentence and an exit status that says whose fault it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ptsim.cli import main
from ptsim.cli.common import escaped, stdout_console
from ptsim.cli.reading import parse_bytes
from ptsim.errors import UsageError


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def load(_: object) -> None:
        raise error

    monkeypatch.setattr("ptsim.cli.allreduce.load_cluster", load)


SHORT = "allreduce --cluster dgx-a100 --gpus 8 --bytes 1M"  # says so little that all of it waits in a buffer
ALLREDUCE = SHORT.split()


@pytest.mark.parametrize("error", [RecursionError("deep"), OverflowError("large"), KeyError("k"), ZeroDivisionError()])
def test_a_fault_of_ptsim_is_kept_in_a_file_that_the_sentence_names(
    failing: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, error: Exception
) -> None:
    raising(monkeypatch, error)
    assert main.run(ALLREDUCE) == 70
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    (file,) = tmp_path.glob("ptsim-crash-*.txt")
    assert str(file) in captured.err
    assert "report it with that file" in captured.err
    content = file.read_text()
    assert "Traceback" in content
    assert "command: ptsim allreduce --cluster dgx-a100" in content


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (MemoryError(), 2, "error: the machine has not enough memory for this"),
        (
            RuntimeError("Cannot allocate memory"),
            2,
            "error: the machine has not enough memory for this",
        ),
        (OSError(28, "No space left on device", "x.toml"), 2, "error: x.toml: No space left on device"),
        (
            UnicodeEncodeError("utf-8", "a" * 300 + "\udcff" + "b" * 300, 300, 301, "surrogates not allowed"),
            2,
            f"error: '{'a' * 100}\\udcff{'b' * 100}' is no text in UTF-8, so that it cannot be written",
        ),
    ],
)
def test_what_the_machine_refuses_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    sentence: str,
) -> None:
    raising(monkeypatch, error)
    assert main.run(ALLREDUCE) == status
    assert capsys.readouterr().err.splitlines()[0] == sentence


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("allreduce --cluster dgx-a100 --gpus 2.6 --bytes 1M", "--gpus is 2.6, expected a whole number"),
        ("allreduce --cluster dgx-a100 --gpus 1e3 --bytes 1M", "--gpus is 1e3, expected a whole number"),
        ("predict resnet20 --batch 3.5 --gpu a100", "--batch is 3.5, expected a whole number"),
        ("train --epochs 1.6", "--epochs is 1.6, expected a whole number"),
        ("predict resnet20 --batch 99999999999999999999 --gpu a100", "--batch is 1e+20, expected at most"),
        ("simulate x --cluster dgx-a100 --seed -99999999999999999999", "--seed is -1e+20, expected at least -92"),
        ("simulate x --cluster dgx-a100 --price 1e-320", "--price is 1e-320, expected 0 or a number between"),
        ("simulate x --cluster dgx-a100 --price 1e-400", "--price is 1e-400, expected 0 or a number between"),
        ("calibrate gpus", "unknown calibrate command 'gpus'; known: gpu, network"),
        ("simulate x", "--cluster"),
        ("validate [] --json", "[]: no trace here"),
        ('import kineto ["a"] --out x.toml', '["a"]: cannot be read'),
    ],
)
def test_what_was_typed_wrong_is_named(line: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(line.split()) == 2
    assert sentence in capsys.readouterr().err


def test_names_are_neither_markup_nor_terminal_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    names = ["[/b]x", "[red]y", "\x1b[31mz", "a\u202eb", ":smile:", "[", "\udcff"]
    table = Table("[/i]head", title="[/b]title")
    for name in names:
        table.add_row(name)
    stdout_console().print(table)
    stdout_console().print(" ".join(names))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    for text in ("[/b]x", "[red]y", "\\x1b[31mz", "a\\u202eb", ":smile:", "\\udcff", "[/i]head", "[/b]title"):
        assert text in shown
    assert escaped("a\u2028b\u2029c") == "a\\u2028b\\u2029c"  # lines and paragraphs end there in some terminals
    assert escaped("a\nb\tc é ×") == "a\nb\tc é ×"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("128M", 134217728),
        ("128 M", 134217728),
        ("1e6", 1000000),
        ("10 GiB", 10737418240),
        ("1.5K", 1536),
        ("128MB", 128000000),
        ("128MiB", 134217728),
        ("134217728", 134217728),
        ("8g", 8589934592),
        ("1k", 1024),
        ("0", 0),
    ],
)
def test_a_message_size_is_read_as_nccl_tests_and_people_write_it(text: str, size: int) -> None:
    assert parse_bytes("--bytes", text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "M",
        "1.5",
        "-1",
        "nan",
        "1e400",
        "1 parsec",
        "9" * 5000,
        "128 Q",
        "1_",
        "1,000",
        "1T",
        "0x10",
        "-0.5K",
        "inf",
    ],
)
def test_what_is_no_message_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--bytes"):
        parse_bytes("--bytes", text)


@pytest.fixture
def as_users_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python keeps what is printed to a file or a pipe in a buffer; what runs the tests may have told it not to."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "around", "status", "out"),
    [
        ("devices --json", ">&-", 0, ""),
        ("cost nosuch", "2>&-", 2, ""),
        ("cost nosuch", "2>/dev/full", 2, ""),
        ("cost nosuch", ">&- 2>&- <&-", 2, ""),
        ("devices", ">/dev/full", 2, ""),
        ("--help", ">/dev/full", 2, ""),
        *((f"{SHORT}{more}", ">/dev/full", 2, "") for more in ("", " --json")),
    ],
)
def test_output_that_nobody_takes_is_no_fault(
    arguments: str, around: str, status: int, out: str, as_users_run_it: None
) -> None:
    command = f'"{sys.executable}" -m ptsim {arguments} {around}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, out)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.stderr.count("error: No space left on device") == (around == ">/dev/full")


@pytest.mark.slow
@pytest.mark.parametrize("line", ["plan --help", "--version", "devices", "devices --json", SHORT, f"{SHORT} --json"])
def test_a_reader_that_has_left_ends_the_command_with_status_141(line: str, as_users_run_it: None) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "ptsim", *line.split()], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_help_is_never_interrupted_by_a_notice(capsys: pytest.CaptureFixture[str]) -> None:
    main._tell_what_it_does(["cost", "--help"])
    main._tell_what_it_does(["devices"])
    assert capsys.readouterr().err == ""
    main._tell_what_it_does(["doctor"])
    assert capsys.readouterr().err.count("\n") == 1
    assert capsys.readouterr().err == ""
    main._tell_what_it_does(["cost", "run"])
    assert capsys.readouterr().err == "ptsim cost: counting the network …\n"


def test_every_command_that_may_take_long_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with_bars = {"demo", "train", "sweep"}  # and calibrate gpu
    quick = {"allreduce", "devices", "clusters"}  # no torch, no simulation
    for command in main.COMMANDS.keys() - with_bars - quick:
        main._tell_what_it_does(["calibrate", "network"] if command == "calibrate" else [command, "x"])
        assert capsys.readouterr().err.startswith(f"ptsim {command}")


def test_memory_that_torch_cannot_get_is_not_the_models_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.conv = nn.Conv2d(3, 4, 3)\n\n"
        "    def forward(self, x):\n        return self.conv(x).sum((2, 3)) + torch.empty(2**55)[0]\n\n\n"
        "def net(num_classes=4):\n    return Net()\n"
    )
    assert main.run(["inspect", "net.py:net", "--input", "3,8,8"]) == 2
    assert "error: the machine has not enough memory for this" in capsys.readouterr().err.splitlines()


def test_an_error_that_a_lack_of_memory_has_caused_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever a library makes of it: an error in the handling of another, or one that says nothing of memory."""
    error = SystemError("error return without exception set")
    error.__context__ = MemoryError()
    raising(monkeypatch, error)
    assert main.run(ALLREDUCE) == 2
    assert capsys.readouterr().err.splitlines()[0] == "error: the machine has not enough memory for this"
    assert not main._lacks_memory(SystemError("error return without exception set"))
    monkeypatch.setattr(main, "_RESERVE_BYTES", 2**58)  # none is left
    assert main._lacks_memory(SystemError("error return without exception set"))
