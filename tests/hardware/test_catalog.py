"""The catalog: what NVIDIA publishes is what it says, and a broken file is one clear sentence."""

import contextlib
import re

import pytest

from ptsim.costs.memory import usable_bytes
from ptsim.errors import FileFormatError, UnknownNameError, UsageError
from ptsim.hardware.catalog import (
    _plain,
    cluster_names,
    device_aliases,
    device_names,
    load_cluster,
    load_device,
    match_device,
    profiled_device,
)
from ptsim.hardware.doubts import cluster_doubts, device_doubts
from ptsim.hardware.forms import write_cluster
from ptsim.hardware.profile import DeviceProfile
from ptsim.network import Precision

ISSUE = [
    "1080ti", "titanxp", "p100", "v100-16gb", "v100-32gb", "t4", "2080ti", "3090", "4090", "a10", "a100-40gb",
    "a100-80gb", "a100-pcie", "l4", "l40s", "h100-pcie", "h100-sxm", "h200", "b200",
]  # fmt: skip

DEVICE = """
name = "mine"
architecture = "ampere"
memory = "40 GiB"
memory_bandwidth = "1555 GB/s"
num_sms = 108
boost_clock = "1410 MHz"
l2_cache = "40 MiB"
power = "400 W"
idle_power = "50 W"
peak = { fp32 = "19.5 TFLOP/s" }
sources = { default = "a data sheet" }
"""

CLUSTER = """
name = "mine"
device = "a100"
gpus_per_node = 8
intra = { name = "NVLink", bandwidth = "300 GB/s", latency = "2 us" }
sources = { default = "a data sheet" }
"""


@pytest.mark.parametrize("name", ISSUE)
def test_every_gpu_that_people_ask_about_is_there(name):
    assert load_device(name).memory_bytes > 0


# What the drivers report as total memory (MiB, nvidia-smi): a little less than the sheet's size in binary units.
@pytest.mark.parametrize(
    ("name", "driver_mib"),
    [
        ("h200", 143_771),
        ("h200-nvl", 143_771),
        ("gh200", 97_871),
        ("gh200-144gb", 146_831),
        ("gb300", 284_208),
        ("b200", 183_359),
        ("gb200", 189_471),
        ("b300", 275_040),
        ("h100", 81_559),
        ("a100-80gb", 81_920),
        ("v100-32gb", 32_768),
        ("h100-nvl", 95_830),
        ("h20", 97_871),
        ("a800", 81_920),
        ("rtx-3090-ti", 24_564),
        ("rtx-pro-6000-server", 97_887),
    ],
)
def test_memory_is_the_drivers_within_two_percent(name, driver_mib):
    assert load_device(name).memory_bytes == pytest.approx(driver_mib * 2**20, rel=0.02)


# What torch reports as total memory: GDDR with error correction has least beside its data sheet.
@pytest.mark.parametrize(
    ("name", "torch_gib"),
    [
        ("a10", 21.99),
        ("a10g", 22.06),
        ("t4", 14.56),
        ("h100-nvl", 92.63),
        ("h20", 95.0),
        ("v100-sxm3", 31.74),
        ("gh200-144gb", 142.5),
    ],
)
def test_what_a_process_may_use_is_what_torch_reports_within_two_percent(name, torch_gib):
    assert usable_bytes(load_device(name)) == pytest.approx(torch_gib * 2**30, rel=0.02)


def test_every_device_has_a_source_for_every_number():
    for name in device_names():
        device = load_device(name)
        assert device.name == name
        numbers = {"memory", "memory_bandwidth", "num_sms", "boost_clock", "l2_cache", "power", "idle_power", "peak"}
        assert set(device.sources) == numbers
        assert all(device.sources.values())


def test_no_name_means_two_devices():
    named: dict[str, set[str]] = {}
    for name in device_names():
        for alias in (name, *device_aliases(name), *load_device(name).driver_names):
            named.setdefault(_plain(alias), set()).add(name)
    assert not {alias: names for alias, names in named.items() if len(names) > 1}


# Cores per SM, and FLOP per SM and clock of the tensor cores with fp32 accumulation (white papers of the generations);
# consumer boards have half of it. H100 multiplies tensors at another clock than its boost clock.
CORES = {
    "kepler": 192,
    "maxwell": 128,
    "pascal": 128,
    "volta": 64,
    "turing": 64,
    "ampere": 128,
    "ada": 128,
    "hopper": 128,
    "blackwell": 128,
}
HALF_PER_SM = {"volta": 1024, "turing": 1024, "ampere": 1024, "ada": 1024, "hopper": 4096, "blackwell": 8192}
GEFORCE = {
    "a10g", "rtx-2080-ti", "rtx-3060", "rtx-3060-ti", "rtx-3070", "rtx-3070-ti", "rtx-3080", "rtx-3080-ti", "rtx-3090",
    "rtx-3090-ti", "rtx-4070", "rtx-4070-super", "rtx-4070-ti", "rtx-4080", "rtx-4080-super", "rtx-4090", "rtx-5080",
    "rtx-5090", "l40", "rtx-2060", "rtx-2060-super", "rtx-2070", "rtx-2070-super", "rtx-2080", "rtx-2080-super",
    "rtx-4060", "rtx-4060-ti", "rtx-4070-ti-super", "rtx-4090-d", "rtx-5070", "rtx-5070-ti",
}  # fmt: skip # the 50 series has the tensor cores of Ada; A10G and L40 have the rates of consumer boards
TENSOR_CLOCK = {
    "h100-sxm5-80gb": 1830e6, "h200-sxm5-141gb": 1830e6, "gh200-96gb": 1830e6, "h100-pcie-80gb": 1620e6,
    "b200-sxm-180gb": 1856e6, "b300-sxm-270gb": 1856e6, "h200-nvl-141gb": 1545e6, "gb200-186gb": 2008e6,
    "h100-nvl-94gb": 1545e6, "h800-sxm5-80gb": 1830e6, "h800-pcie-80gb": 1620e6, "h20-96gb": 1830e6,
    "gh200-144gb": 1830e6, "gb300-278gb": 2008e6,
}  # fmt: skip
# A quarter of the H100's; Ada's.
PER_SM = dict.fromkeys(("h20-96gb", "rtx-pro-6000-blackwell", "rtx-pro-6000-blackwell-server"), 1024)
WITHOUT_TENSOR_CORES = ("kepler", "maxwell", "pascal")
A100_LIKE = ("a100-", "a800-", "a30", "p100-")
# Bits of the bus, and transfers per second and pin.
MEMORY = {
    "gtx-1080-ti": (352, 11e9), "titan-xp": (384, 11.41e9), "p100-pcie-16gb": (4096, 1.43e9),
    "p100-sxm2-16gb": (4096, 1.43e9), "v100-pcie-16gb": (4096, 1.754e9), "v100-pcie-32gb": (4096, 1.754e9),
    "v100-sxm2-16gb": (4096, 1.754e9), "v100-sxm2-32gb": (4096, 1.754e9), "v100-sxm3-32gb": (4096, 1.916e9),
    "t4": (256, 10e9),
    "rtx-2080-ti": (352, 14e9), "rtx-3090": (384, 19.5e9), "rtx-4090": (384, 21e9), "a10": (384, 12.5e9),
    "a100-pcie-40gb": (5120, 2.43e9), "a100-sxm4-40gb": (5120, 2.43e9), "a100-pcie-80gb": (5120, 3.024e9),
    "a100-sxm4-80gb": (5120, 3.186e9), "l4": (192, 12.5e9), "l40s": (384, 18e9), "h100-pcie-80gb": (5120, 3.186e9),
    "h100-sxm5-80gb": (5120, 5.238e9), "h200-sxm5-141gb": (6144, 6.25e9), "b200-sxm-180gb": (7680, 7.992e9),
    "titan-v": (3072, 1.7e9), "titan-rtx": (384, 14e9), "quadro-rtx-8000": (384, 14e9), "rtx-3080": (320, 19e9),
    "rtx-a6000": (384, 16e9), "rtx-6000-ada": (384, 20e9), "rtx-5090": (512, 28e9),
    "a30": (3072, 2.43e9), "a40": (384, 14.5e9), "rtx-a4000": (256, 14e9), "rtx-a5000": (384, 16e9),
    "rtx-a5500": (384, 16e9), "a10g": (384, 12.5e9), "rtx-3060": (192, 15e9), "rtx-3060-ti": (256, 14e9),
    "rtx-3070": (256, 14e9), "rtx-3070-ti": (256, 19e9),
    "rtx-3080-ti": (384, 19e9), "rtx-4070": (192, 21e9), "rtx-4070-ti": (192, 21e9), "rtx-4080": (256, 22.4e9),
    "gh200-96gb": (6144, 5.238e9), "h200-nvl-141gb": (6144, 6.25e9), "b300-sxm-270gb": (8192, 7.8125e9),
    "gb200-186gb": (8192, 7.8125e9), "k80": (384, 5.01e9), "m40": (384, 6.008e9),
    "rtx-5080": (256, 30e9), "gtx-1070": (256, 8e9), "gtx-1080": (256, 10e9), "quadro-rtx-6000": (384, 14e9),
    "h100-nvl-94gb": (6016, 5.238e9), "h800-sxm5-80gb": (5120, 5.238e9), "h800-pcie-80gb": (5120, 3.186e9),
    "a800-sxm4-80gb": (5120, 3.186e9), "a800-pcie-80gb": (5120, 3.024e9), "h20-96gb": (6144, 5.238e9),
    "l40": (384, 18e9), "p40": (384, 7.2e9), "rtx-3090-ti": (384, 21e9), "rtx-4070-super": (192, 21e9),
    "rtx-4080-super": (256, 23e9), "gtx-1070-ti": (256, 8e9), "gtx-1060-6gb": (192, 8e9), "titan-x-pascal": (384, 10e9),
    "p100-pcie-12gb": (3072, 1.43e9), "m40-24gb": (384, 6.008e9), "gtx-titan-x": (384, 7.01e9),
    "gtx-980-ti": (384, 7.01e9), "v100s-pcie-32gb": (4096, 2.214e9), "rtx-2060": (192, 14e9),
    "rtx-2060-super": (256, 14e9), "rtx-2070": (256, 14e9), "rtx-2070-super": (256, 14e9), "rtx-2080": (256, 14e9),
    "rtx-2080-super": (256, 15.5e9), "quadro-rtx-5000": (256, 14e9), "quadro-rtx-4000": (256, 13e9),
    "rtx-a4500": (320, 16e9), "rtx-4060": (128, 17e9), "rtx-4060-ti": (128, 18e9), "rtx-4070-ti-super": (256, 21e9),
    "rtx-4090-d": (384, 21e9), "rtx-5070": (192, 28e9), "rtx-5070-ti": (256, 28e9), "rtx-4000-ada": (160, 18e9),
    "rtx-4500-ada": (192, 18e9), "rtx-5000-ada": (256, 18e9), "rtx-pro-6000-blackwell": (512, 28e9),
    "rtx-pro-6000-blackwell-server": (512, 2 * 12.481e9), "gh200-144gb": (6144, 2 * 3.201e9),
    "gb300-278gb": (8192, 7.8125e9),
}  # fmt: skip


@pytest.mark.parametrize("name", device_names())
def test_fp32_peak_is_two_flops_per_core_and_clock(name):
    device = load_device(name)
    cores = 64 if name.startswith(A100_LIKE) else CORES[device.architecture]
    expected = 2 * cores * device.num_sms * device.boost_clock_hz
    assert device.peak_flops_per_s[Precision.FP32] == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize(
    "name", [name for name in device_names() if load_device(name).architecture not in WITHOUT_TENSOR_CORES]
)
def test_tensor_peaks_are_flops_per_sm_and_clock_and_tf32_is_half_of_fp16(name):
    device = load_device(name)
    per_sm = (
        2048
        if name.startswith(("a100-", "a800-", "a30"))
        else PER_SM.get(name) or HALF_PER_SM["ada" if name in GEFORCE else device.architecture]
    )
    clock = TENSOR_CLOCK.get(name, device.boost_clock_hz)
    expected = per_sm * device.num_sms * clock * (0.5 if name in GEFORCE else 1.0)
    peaks = device.peak_flops_per_s
    assert peaks[Precision.FP16] == pytest.approx(expected, rel=0.015)
    if Precision.TF32 in peaks:
        assert peaks[Precision.TF32] == pytest.approx(peaks[Precision.FP16] / 2, rel=0.015)
        assert peaks[Precision.BF16] == peaks[Precision.FP16]
    assert (Precision.TF32 in peaks) == (device.architecture not in ("volta", "turing"))


@pytest.mark.parametrize("name", device_names())
def test_memory_bandwidth_is_the_bus_times_its_rate(name):
    bits, rate = MEMORY[name]
    assert load_device(name).memory_bandwidth_bytes_per_s == pytest.approx(bits / 8 * rate, rel=0.005)


@pytest.mark.parametrize("name", cluster_names())
def test_a_link_has_the_bandwidth_of_its_name(name):
    cluster = load_cluster(name)
    lanes = {"1.0": 20, "1": 20, "2": 25, "3": 25, "4": 25, "5": 50}  # NVLink: GB/s each way
    links = {"1": 4, "2": 6, "3": 12, "4": 18, "5": 18}
    pcie = {"3.0": 15.75e9, "4.0": 31.5e9, "5.0": 63e9}  # 16 lanes after coding
    words = cluster.intra.name.split()
    if words[0] == "NVLink":
        generation = words[1].rstrip(",")
        assert cluster.intra.bandwidth_bytes_per_s == links[generation] * lanes[generation] * 1e9
    else:
        assert words[0] == "PCIe"
        assert cluster.intra.bandwidth_bytes_per_s == pcie[words[1]]
    if cluster.inter is not None and (found := re.search(r"(?:(\d+) x )?.*?(\d+) Gbit/s", cluster.inter.name)):
        stated = int(found[1] or 1) * int(found[2]) * 1e9 / 8
        assert cluster.inter.bandwidth_bytes_per_s == pytest.approx(stated, rel=0.03)
        assert cluster.nics_per_node == int(found[1] or 1)


@pytest.mark.parametrize(
    ("driver_name", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-sxm4-40gb"),
        ("NVIDIA A100-PG509-200", "a100-sxm4-40gb"),
        ("NVIDIA PG509-210", "a100-sxm4-80gb"),
        ("A100-SXM-80GB", "a100-sxm4-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm5-80gb"),
        ("Tesla V100-SXM2-16GB", "v100-sxm2-16gb"),
        ("GeForce RTX 3090", "rtx-3090"),
        ("NVIDIA GeForce GTX 1080 Ti", "gtx-1080-ti"),
        ("TITAN Xp", "titan-xp"),
        ("NVIDIA A30", "a30"),
        ("NVIDIA RTX A5000", "rtx-a5000"),
        ("NVIDIA GeForce RTX 3080 Ti", "rtx-3080-ti"),
        ("GeForce GTX 1080", "gtx-1080"),
        ("Quadro RTX 6000", "quadro-rtx-6000"),
        ("NVIDIA GH200 480GB", "gh200-96gb"),
        ("NVIDIA H200 NVL", "h200-nvl-141gb"),
        ("NVIDIA B300 SXM6 AC", "b300-sxm-270gb"),
        ("NVIDIA GB200", "gb200-186gb"),
        ("Tesla K80", "k80"),
        ("NVIDIA H100 NVL", "h100-nvl-94gb"),
        ("NVIDIA H800", "h800-sxm5-80gb"),
        ("NVIDIA H800 PCIe", "h800-pcie-80gb"),
        ("NVIDIA H20", "h20-96gb"),
        ("NVIDIA A800-SXM4-80GB", "a800-sxm4-80gb"),
        ("NVIDIA A800 80GB PCIe", "a800-pcie-80gb"),
        ("NVIDIA L40", "l40"),
        ("Tesla P40", "p40"),
        ("NVIDIA GeForce RTX 3090 Ti", "rtx-3090-ti"),
        ("NVIDIA GeForce RTX 4070 SUPER", "rtx-4070-super"),
        ("NVIDIA GeForce RTX 4080 SUPER", "rtx-4080-super"),
    ],
)
def test_a_driver_name_finds_its_device(driver_name, name):
    device = match_device(driver_name)
    assert device is not None
    assert device.name == name


# As nvidia-smi and torch.cuda.get_device_name print them, as Kubernetes labels nodes, and as people type.
NAMED = {
    "Tesla M40 24GB": "m40-24gb", "Tesla P100-PCIE-12GB": "p100-pcie-12gb", "Tesla V100S-PCIE-32GB": "v100s-pcie-32gb",
    "Tesla V100-SXM3-32GB": "v100-sxm3-32gb", "NVIDIA A10": "a10", "NVIDIA A10G": "a10g", "NVIDIA L4": "l4",
    "NVIDIA L40": "l40", "NVIDIA L40S": "l40s", "NVIDIA H100 PCIe": "h100-pcie-80gb", "NVIDIA H200": "h200-sxm5-141gb",
    "NVIDIA GH200 120GB": "gh200-96gb", "NVIDIA B200": "b200-sxm-180gb", "Quadro RTX 5000": "quadro-rtx-5000",
    "NVIDIA RTX A4500": "rtx-a4500", "NVIDIA RTX 5000 Ada Generation": "rtx-5000-ada",
    "NVIDIA RTX 6000 Ada Generation": "rtx-6000-ada", "RTX 6000 Ada": "rtx-6000-ada", "L40S": "l40s",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "rtx-pro-6000-blackwell",
    "NVIDIA-RTX-PRO-6000-Blackwell-Server-Edition": "rtx-pro-6000-blackwell-server",
    "GeForce GTX TITAN X": "gtx-titan-x", "TITAN X (Pascal)": "titan-x-pascal", "NVIDIA TITAN Xp": "titan-xp",
    "GeForce GTX 1070 Ti": "gtx-1070-ti", "GTX 1070 Ti": "gtx-1070-ti", "NVIDIA GeForce GTX 1070": "gtx-1070",
    "NVIDIA GeForce GTX 1060 6GB": "gtx-1060-6gb", "GeForce RTX 2070 SUPER": "rtx-2070-super",
    "NVIDIA GeForce RTX 2080 SUPER": "rtx-2080-super", "NVIDIA GeForce RTX 2080": "rtx-2080", "2080 Ti": "rtx-2080-ti",
    "NVIDIA GeForce RTX 4060 Ti": "rtx-4060-ti", "NVIDIA GeForce RTX 4070": "rtx-4070", "3080 ti": "rtx-3080-ti",
    "NVIDIA GeForce RTX 4070 Ti": "rtx-4070-ti", "RTX 4070 Ti SUPER": "rtx-4070-ti-super",
    "NVIDIA GeForce RTX 4070 SUPER": "rtx-4070-super", "NVIDIA GeForce RTX 4090 D": "rtx-4090-d",
    "NVIDIA GeForce RTX 5070 Ti": "rtx-5070-ti", "NVIDIA-A100-SXM4-80GB": "a100-sxm4-80gb",
    "NVIDIA-H100-80GB-HBM3": "h100-sxm5-80gb", "Tesla-V100-SXM2-16GB": "v100-sxm2-16gb", "RTX3090": "rtx-3090",
    "NVIDIA GH200 144G HBM3e": "gh200-144gb", "NVIDIA-GH200-144G-HBM3e": "gh200-144gb", "NVIDIA GB300": "gb300-278gb",
    "Tesla V100-DGXS-32GB": "v100-sxm2-32gb", "Tesla-V100-DGXS-16GB": "v100-sxm2-16gb",
    "H100 SXM": "h100-sxm5-80gb", "A100 80GB": "a100-sxm4-80gb", "nvidia geforce rtx 3090": "rtx-3090",
}  # fmt: skip


@pytest.mark.parametrize("printed", NAMED)
def test_a_name_as_drivers_kubernetes_and_people_write_it_means_its_device(printed):
    assert load_device(printed).name == NAMED[printed]


# Other silicon, clocks or memory under a name that begins like a known one; parts and shares of a GPU.
@pytest.mark.parametrize(
    ("printed", "nearest"),
    [
        ("NVIDIA GeForce RTX 3080 Laptop GPU", "rtx-3080"),
        ("NVIDIA GeForce RTX 3080 Ti Laptop GPU", "rtx-3080-ti"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx-4090"),
        ("GeForce RTX 2080 with Max-Q Design", "rtx-2080"),
        ("NVIDIA RTX A5000 Laptop GPU", "rtx-a5000"),
        ("NVIDIA RTX 5000 Ada Generation Laptop GPU", "rtx-5000-ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "rtx-pro-6000-blackwell"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "a100-sxm4-40gb"),
        ("NVIDIA-A100-SXM4-40GB-MIG-1g.5gb", "a100-sxm4-40gb"),
        ("NVIDIA A100-SXM-64GB", "a100-sxm4-80gb"),
        ("NVIDIA A10-24Q", "a10"),
        ("NVIDIA GeForce GTX 1060 3GB", "gtx-1060-6gb"),
        ("NVIDIA GeForce RTX 5090 D", "rtx-5090"),
        ("NVIDIA H100 96GB HBM3", "h100-sxm5-80gb"),
    ],
)
def test_another_device_of_a_like_name_is_refused_with_the_nearest(printed, nearest):
    assert match_device(printed) is None
    with pytest.raises(UnknownNameError) as caught:
        load_device(printed)
    assert caught.value.hint is not None
    assert nearest in caught.value.hint.removeprefix("did you mean ").removesuffix("?").split(" or ")


def test_an_unknown_driver_name_matches_nothing():
    assert match_device("AMD Instinct MI300X") is None


@pytest.mark.parametrize("name", ["AMD Instinct MI300X", "Tesla K40m", "NVIDIA Graphics Device"])
def test_a_device_like_none_of_the_catalog_can_be_described(name):
    with pytest.raises(UnknownNameError) as caught:
        load_device(name)
    assert caught.value.hint == "a TOML file can describe it; ptsim devices lists those that are known"


def test_an_unknown_device_says_which_exist():
    with pytest.raises(UnknownNameError, match="a100-sxm4-40gb"):
        load_device("a100-sxm4-40g")


def test_a_missing_file_is_named():
    with pytest.raises(UsageError, match=r"nowhere\.toml"):
        load_device("nowhere.toml")


def test_a_device_file_of_ones_own_is_read(tmp_path):
    (tmp_path / "mine.toml").write_text(DEVICE)
    assert load_device(tmp_path / "mine.toml").memory_bandwidth_bytes_per_s == 1555e9


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('"1555 GB/s"', '"1555"', "memory_bandwidth.*no unit"),
        ('"1555 GB/s"', "1555", "memory_bandwidth.*no unit"),
        ('"1555 GB/s"', '"-1555 GB/s"', "memory_bandwidth.*positive"),
        ('"1555 GB/s"', '"0 GB/s"', "memory_bandwidth.*positive"),
        ('"1555 GB/s"', '"1555 W"', "memory_bandwidth.*unit 'W'"),
        ('"19.5 TFLOP/s"', '"-1 TFLOP/s"', r"peak\.fp32.*positive"),
        ("fp32", "fp7", r"peak\.fp7 is not a known key"),
        ("fp32", "fp16", r"peak\.fp32 is missing"),
        ("num_sms = 108", 'num_sms = 108\ndriver_names = "A100"', "driver_names is .A100., expected a list"),
        ("num_sms = 108", "num_sms = 1.5", "num_sms.*whole number"),
        ("num_sms = 108\n", "", "num_sms is missing"),
        ("num_sms", "sms", "sms is not a known key"),
        ('"50 W"', '"500 W"', "idle_power is above power"),
        ('default = "a data sheet"', 'power = "a data sheet"', r"sources\.memory is missing"),
        ('"ampere"', '"amperes"', "architecture.*expected one of"),
        ("name = ", "name ", "is not TOML"),
    ],
)
def test_a_broken_device_file_names_file_and_field(tmp_path, old, new, complaint):
    path = tmp_path / "mine.toml"
    path.write_text(DEVICE.replace(old, new, 1))
    with pytest.raises(FileFormatError, match=rf"mine\.toml: .*{complaint}"):
        load_device(path)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('"300 GB/s"', '"1e-320 B/s"', r"intra\.bandwidth.*not between 1 and 1e\+15 B/s"),
        ('"300 GB/s"', '"1e400 B/s"', r"intra\.bandwidth.*not between"),
        ('"300 GB/s"', "true", r"intra\.bandwidth: found True, expected a number with a unit"),
        ("gpus_per_node = 8", "gpus_per_node = true", "gpus_per_node is true, expected a whole number"),
        ("gpus_per_node = 8", "gpus_per_node = 10000000", "gpus_per_node is 10000000, expected.*at most 1000000"),
        ("gpus_per_node", "gpus_per_nod", "gpus_per_nod is not a known key"),
        ('"2 us"', '"2 us", kind = "rope"', "intra.kind is .rope., expected one of nvlink"),
        ('"300 GB/s"', '"300"', r"intra\.bandwidth.*no unit"),
        ('"300 GB/s"', '"-300 GB/s"', r"intra\.bandwidth.*positive"),
        ('"2 us"', '"-2 us"', r"intra\.latency.*is negative"),
        ('"a100"', '"a1000"', "device: unknown device"),
        ("gpus_per_node = 8", "gpus_per_node = 0", "gpus_per_node.*at least 1"),
        ("gpus_per_node = 8", 'gpus_per_node = 8\nprice_per_gpu = "4"', "price_per_gpu.*no unit"),
    ],
)
def test_a_broken_cluster_file_names_file_and_field(tmp_path, old, new, complaint):
    path = tmp_path / "mine.toml"
    path.write_text(CLUSTER.replace(old, new, 1))
    with pytest.raises(FileFormatError, match=rf"mine\.toml: .*{complaint}"):
        load_cluster(path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("fp32", 'fp16 = "312 TFLOP/s", fp32', None),
        ("fp32", 'bf16 = "624 TFLOP/s", fp32', r"peak\.bf16 is 624 TFLOP/s, but 108 .* at most 311\.9 TFLOP.*sparsity"),
        ("fp32", 'tf32 = "312 TFLOP/s", fp32', r"peak\.tf32 is 312 TFLOP/s, .* at most 155\.9 TFLOP/s"),
        ('"40 GiB"', '"40 GB"', r"memory is 40 GB, which are 37\.3 GiB; .* GB they mean GiB"),
    ],
)
def test_what_a_data_sheet_says_in_another_way_is_told(tmp_path, old, new, said):
    """An A100's: 1,024 and 2,048 FLOP of an SM in a clock of 1.41 GHz."""
    path = tmp_path / "mine.toml"
    path.write_text(DEVICE.replace(old, new))
    with contextlib.nullcontext() if said is None else pytest.warns(UserWarning, match=said):
        load_device(path)
    load_device(path)  # said once


LINK = 'NVLink", bandwidth = "300 GB/s", latency = "2 us"'
NICS = '\nnics_per_node = 8\ninter = {{ name = "IB", kind = "infiniband", bandwidth = "{} Gbit/s" }}\nintra'
TABLE = '[[table]]\nnum_gpus = 8\nnum_nodes = 1\nsize_bytes = [1024, 1048576]\nseconds = [{}]\nsource = "mine"\n'


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (LINK, 'NVLink", kind = "nvlink", bandwidth = "300 GB/s"', None),
        (LINK, 'NVLink", kind = "nvlink", bandwidth = "600 GB/s"', "600 GB/s, but nvlink of a100-.* at most 300 GB"),
        (LINK, 'PCIe", kind = "pcie", bandwidth = "64 GB/s"', r"64 GB/s, but pcie of a100-.* at most 31\.5 GB"),
        (LINK, 'measured", latency = "2 us", bandwidth = "600 GB/s"', None),
        ("\nintra", NICS.format(400), "is 50 GB/s, of 8 NICs together; is it that of a single one"),
        ("\nintra", NICS.format(800), None),
        ("\nintra", '\nprice_per_gpu = "12.29 USD/h"\nintra', None),
        ("\nintra", '\nprice_per_gpu = "98.32 USD/h"\nintra', "is 98.32 USD an hour; is it the price of a node"),
        ('sheet" }\n', 'sheet" }\n' + TABLE.format("21e-6, 30e-6"), None),
        ('sheet" }\n', 'sheet" }\n' + TABLE.format("21, 30"), r"table\[0\] says that 1\.00 MiB take 30\.0 s; "),
    ],
)
def test_what_others_count_in_another_way_is_told(tmp_path, old, new, said):
    """Both directions of a link, a NIC of several, a node's price, microseconds."""
    path = tmp_path / "mine.toml"
    assert old in CLUSTER
    path.write_text(CLUSTER.replace(old, new))
    with contextlib.nullcontext() if said is None else pytest.warns(UserWarning, match=said):
        load_cluster(path)
    load_cluster(path)


def test_nothing_in_the_catalog_is_doubted():
    assert not [doubt for name in device_names() for doubt in device_doubts(load_device(name))]
    assert not [doubt for name in cluster_names() for doubt in cluster_doubts(load_cluster(name))]


def test_a_cluster_without_a_network_is_one_machine(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(CLUSTER)
    assert load_cluster(path).max_nodes == 1


@pytest.mark.parametrize("name", cluster_names())
def test_writing_a_cluster_then_reading_it_changes_nothing(tmp_path, name):
    cluster = load_cluster(name)
    write_cluster(cluster, tmp_path / "copy.toml")
    assert load_cluster(tmp_path / "copy.toml") == cluster


def test_an_edited_file_is_read_again(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(CLUSTER)
    assert load_cluster(path).intra.bandwidth_bytes_per_s == 300e9
    path.write_text(CLUSTER.replace("300 GB/s", "900 GB/s"))
    assert load_cluster(path).intra.bandwidth_bytes_per_s == 900e9
    path.write_text(DEVICE)
    assert load_device(path).num_sms == 108
    path.write_text(DEVICE.replace("num_sms = 108", "num_sms = 109"))
    assert load_device(path).num_sms == 109


def test_a_misspelt_key_gets_the_right_one_as_a_hint(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(CLUSTER.replace("gpus_per_node", "gpu_per_node"))
    with pytest.raises(FileFormatError) as caught:
        load_cluster(path)
    assert caught.value.hint == "did you mean gpus_per_node?"


def test_a_path_is_a_file_whatever_the_catalog_calls_by_its_last_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a100").write_text(DEVICE.replace("num_sms = 108", "num_sms = 107"))
    assert [load_device(name).num_sms for name in ("./a100", str(tmp_path / "a100"), "a100")] == [107, 107, 108]
    assert load_device("nvidia/a100").num_sms == 108  # no such file


def test_a_driver_name_is_a_device_name():
    assert load_device("NVIDIA H100 80GB HBM3").name == "h100-sxm5-80gb"
    assert load_device("Tesla V100-SXM2-16GB").name == "v100-sxm2-16gb"


def test_peaks_may_be_given_in_every_precision(tmp_path):
    path = tmp_path / "mine.toml"
    peaks = ", ".join(f'{precision} = "1 TFLOP/s"' for precision in Precision)
    path.write_text(DEVICE.replace('fp32 = "19.5 TFLOP/s"', peaks))
    assert load_device(path).peak_flops_per_s == dict.fromkeys(Precision, 1e12)


def test_a_cluster_holds_the_device_of_a_file_beside_it_also_when_it_is_written_again(tmp_path):
    (tmp_path / "gpu.toml").write_text(DEVICE.replace('"40 GiB"', '"41 GiB"'))
    (tmp_path / "own.toml").write_text(CLUSTER.replace('"a100"', '"gpu.toml"'))
    cluster = load_cluster(tmp_path / "own.toml")
    assert cluster.gpu.memory_bytes == 41 * 2**30
    (tmp_path / "elsewhere").mkdir()
    write_cluster(cluster, tmp_path / "elsewhere" / "copy.toml")
    assert load_cluster(tmp_path / "elsewhere" / "copy.toml") == cluster


def test_a_device_or_cluster_in_place_of_a_name_is_itself():
    cluster = load_cluster("dgx-a100")
    assert load_cluster(cluster) is cluster
    assert load_device(cluster.gpu) is cluster.gpu


def test_a_cluster_of_which_only_the_network_is_known_has_no_device(tmp_path):
    (tmp_path / "net.toml").write_text(CLUSTER.replace('"a100"', '"unspecified"'))
    cluster = load_cluster(tmp_path / "net.toml")
    assert cluster.device is None
    with pytest.raises(UsageError, match="does not say which device"):
        _ = cluster.gpu


# USD an hour of the whole machine, its GPUs, and the day, as the vendors' lists were quoted; the files say by whom.
LIST_PRICES = {
    "aws-g4dn-12xlarge": (3.912, 4, "2026-09-24"),
    "aws-g6-48xlarge": (13.3504, 8, "2026-09-24"),
    "aws-g6e-48xlarge": (30.13118, 8, "2026-09-24"),
    "aws-p3-16xlarge": (24.48, 8, "2026-09-24"),
    "aws-p4d-24xlarge": (21.957642, 8, "2026-11-09"),
    "aws-p4de-24xlarge": (27.44705, 8, "2026-11-09"),
    "aws-p5-48xlarge": (55.04, 8, "2026-11-09"),
    "aws-p5en-48xlarge": (63.296, 8, "2026-09-24"),
    "aws-p6-b200-48xlarge": (113.9328, 8, "2026-09-01"),
    "azure-nd96amsr-a100-v4": (32.77, 8, "2026-09-01"),
    "azure-nd96asr-v4": (8 * 3.3996, 8, "2026-11-09"),
    "azure-nd96isr-h100-v5": (8 * 12.29, 8, "2026-11-09"),
    "gcp-a2-highgpu-8g": (29.38708, 8, "2025-03-06"),
    "gcp-a2-ultragpu-8g": (40.5503831232877, 8, "2025-03-06"),
    "gcp-a3-highgpu-8g": (88.4899999025753, 8, "2025-03-06"),
    "gcp-a3-megagpu-8g": (92.9375881512329, 8, "2025-03-06"),
    "gcp-a3-ultragpu-8g": (8 * 10.4365, 8, "2026-10-13"),
    "gcp-g2-standard-96": (8.003330296, 8, "2025-03-06"),
    "oci-bm-gpu-a100-v2-8": (32.0, 8, "2026-04-14"),
    "oci-bm-gpu-h100-8": (80.0, 8, "2026-04-14"),
    "oci-bm-gpu3-8": (23.6, 8, "2026-06-04"),
    "oci-bm-gpu4-8": (24.4, 8, "2026-06-04"),
}


def test_a_list_price_is_the_machines_over_its_gpus_with_its_day_and_source():
    priced = {name for name in cluster_names() if load_cluster(name).price_usd_per_gpu_hour is not None}
    assert priced == set(LIST_PRICES)
    for name, (usd_per_hour, gpus, day) in LIST_PRICES.items():
        cluster = load_cluster(name)
        assert cluster.gpus_per_node == gpus
        assert cluster.price_usd_per_gpu_hour == pytest.approx(usd_per_hour / gpus, rel=1e-12)
        assert str(cluster.price_date) == day
        assert "USD an hour for" in cluster.sources["price_per_gpu"]


def test_a_price_may_be_nothing_but_not_less(tmp_path):
    path = tmp_path / "mine.toml"
    for price in ("0", "1e-12"):  # both of which --price takes
        path.write_text(CLUSTER.replace("gpus_per_node = 8", f'gpus_per_node = 8\nprice_per_gpu = "{price} USD/h"'))
        assert load_cluster(path).price_usd_per_gpu_hour == float(price)
    path.write_text(CLUSTER.replace("gpus_per_node = 8", 'gpus_per_node = 8\nprice_per_gpu = "-1 USD/h"'))
    with pytest.raises(FileFormatError, match=r"price_per_gpu.*is negative"):
        load_cluster(path)


def test_the_day_of_a_list_price_needs_the_price(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(CLUSTER.replace("gpus_per_node = 8", 'gpus_per_node = 8\nprice_date = "2026-09-24"'))
    with pytest.raises(FileFormatError, match="price_date is there without price_per_gpu"):
        load_cluster(path)
    path.write_text(
        CLUSTER.replace("gpus_per_node = 8", 'gpus_per_node = 8\nprice_per_gpu = "2 USD/h"\nprice_date = "yesterday"')
    )
    with pytest.raises(FileFormatError, match=r"price_date is .yesterday., expected a day such as .2026-09-24."):
        load_cluster(path)


def test_a_profile_is_of_the_catalogs_device_or_of_a_processor_without_a_data_sheet():
    what = {"created": "", "complete": True, "memory_bytes": 7, "num_threads": None, "software": {}}
    assert profiled_device(DeviceProfile(device="Tesla T4", kind="cuda", **what)).name == "t4"
    cpu = profiled_device(DeviceProfile(device="EPYC", kind="cpu", **what | {"num_threads": 3}))
    assert (cpu.name, cpu.memory_bytes, cpu.num_sms, cpu.driver_names) == ("EPYC", 7, 3, ("EPYC",))
    with pytest.raises(UsageError, match="EPYC"):
        profiled_device(DeviceProfile(device="EPYC", kind="cuda", **what))
