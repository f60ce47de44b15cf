import resource
import subprocess
import sys

import pytest

_STEPS = """
import resource, torch
from ptsim.measure.host_memory import keep_freed_memory
torch.set_num_threads(1)
keep_freed_memory()
def step():  # 16 blocks of 4 MiB, freed together
    return sum(float(block[0]) for block in [torch.ones(2**20) for _ in range(16)])
for _ in range(5):  # the heap grows for three
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc's allocator is told to keep memory")
def test_a_step_finds_the_memory_of_the_step_before_without_page_faults():
    done = subprocess.run([sys.executable, "-c", _STEPS], capture_output=True, text=True, check=True)
    pages = 16 * 2**22 // resource.getpagesize()
    assert int(done.stdout) < 0.02 * pages
