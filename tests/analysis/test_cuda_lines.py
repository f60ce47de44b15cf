"""Which lines only a GPU gets to, found in small sources."""

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "analysis"))
cuda_lines = importlib.import_module("cuda_lines")

EXAMPLE = '''"""About cuda."""
import torch

def move(x, device):
    """Moves to cuda."""
    there = device.type == "cuda"
    if device.type != "cuda":
        y = x + 1
    else:
        y = x + 2
    if there:
        y = y + 3
    z = y + 4
    torch.cuda.synchronize()
    return z, f"cuda:{device.index}"

def driver():
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return pynvml.NVML_SUCCESS
'''


def test_lines_that_only_a_gpu_runs_are_found_and_those_that_no_test_has_run(tmp_path):
    assert cuda_lines.cuda_lines(EXAMPLE) == {6, 7, 10, 11, 12, 14, 15, 19}
    (tmp_path / "moving.py").write_text(EXAMPLE)
    (tmp_path / "unread.py").write_text("import torch\nthere = torch.cuda.is_available()\n")
    report = {"files": {str(tmp_path / "moving.py"): {"missing_lines": [8, 12, 13]}}}
    assert list(cuda_lines.unreached(report, tmp_path)) == [
        "moving.py:12  y = y + 3",
        "unread.py:2  there = torch.cuda.is_available()",
    ]


ATTRIBUTE = """class Data:
    def __init__(self, device, image):
        self._pinned = device.type == "cuda" and image.is_cpu
    def batch(self, x):
        if self._pinned:
            x = x + 1
        y = copy(x, pinned=self._pinned)
        return y if self._pinned else -y
"""
PROPERTY = """class Run:
    @property
    def on_gpu(self):
        return self.device.type == "cuda"
    def step(self):
        def inner():
            if self.on_gpu:
                wait()
        if self.device.type == "cpu":
            keep()
        else:
            clear()
        inner()
"""
SAME_NAMES = """class Host:
    def mark(self):
        return now()
class Gpu:
    def mark(self):
        return torch.cuda.Event()
def mark():
    def mark():
        return "cuda"
    return mark
"""


@pytest.mark.parametrize(
    ("source", "functions"),
    [
        (ATTRIBUTE, {"Data.__init__": {3}, "Data.batch": {5, 6, 8}}),
        (PROPERTY, {"Run.on_gpu": {4}, "Run.step": {9, 12}, "Run.step.inner": {7, 8}}),
        (SAME_NAMES, {"Gpu.mark": {6}, "mark.mark": {9}}),
    ],
    ids=["attribute", "property", "same names"],
)
def test_a_line_belongs_to_the_function_that_it_stands_in_by_its_whole_name(source, functions):
    assert cuda_lines.lines_by_function(source) == functions


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ('on_gpu, x = device.type == "cuda", 1\nif warm and not on_gpu:\n    a()\nif on_gpu:\n    b()', {1, 4, 5}),
        ('if device.type != "cuda":\n    return 0\na()\nfor b in c:\n    if b:\n        continue', {1, 3, 4, 5, 6}),
        ('if device.type != "cuda":\n    a()\nb()', {1}),
        ('if rests or device.type != "cuda":\n    return 1\na()', {1, 3}),
        ('if rests and device.type == "cuda":\n    return 1\na()', {1, 2}),
        ('if device.type == "cpu":\n    a()\nb()', set()),
        ('if device.type == "cpu":\n    return 1\nb()', {1, 3}),
        ('if kind not in ("cpu", "cuda"):\n    raise ValueError\na()', {1}),
        ("if machine.cuda is None:\n    return 1\na()", {1}),
        ("if number >= torch.cuda.device_count():\n    raise ValueError\na()", {1, 2}),
        ("there = torch.cuda.is_available()\nif not there:\n    raise ValueError\na()", {1, 2, 4}),
        ("if (there := torch.cuda.is_available()) and x:\n    a()\nif there:\n    b()", {1, 2, 3, 4}),
        ("flat = bool(x) and all(w.is_cuda for w in y)\nif flat:\n    a()\nelse:\n    b()", {1, 2, 3}),
        ("mine = torch.cuda.is_available()\nself.mine = mine\nif not self.mine:\n    a()\nelse:\n    b()", {1, 3, 6}),
        ('on_cpu = device.type == "cpu"\nx = 1 if on_cpu else 2\nif not on_cpu:\n    a()', {2, 3, 4}),
        ("with torch.cuda.stream(s):\n    a()", {1}),
        ("for i in range(torch.cuda.device_count()):\n    a()", {1}),
        ('try:\n    a()\nexcept E:\n    if d.type == "cuda":\n        b()\nfinally:\n    torch.cuda.f()', {4, 5, 7}),
        ('while d.type == "cuda":\n    a()', {1, 2}),
        ('match x:\n    case 1:\n        device = "cuda"', {3}),
        ('if d.type == "cuda":\n    def f():\n        a()\n    class C:\n        b = 1', {1, 2, 3, 4, 5}),
    ],
)
def test_what_only_a_gpu_gets_to_counts_however_its_condition_is_held(code, lines):
    body = "".join(f"    {line}\n" for line in code.splitlines())
    assert cuda_lines.cuda_lines(f"def function():\n{body}") == {line + 1 for line in lines}
