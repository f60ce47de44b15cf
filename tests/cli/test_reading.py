"""What --set means, for every command that has it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptsim.cli.reading import parse_bytes, read_settings
from ptsim.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr=0.5", {"lr": 0.5}),
        ("nesterov = true", {"nesterov": True}),
        ("lr_milestones=[0.5, 0.8]", {"lr_milestones": [0.5, 0.8]}),
        ("model=vgg11", {"model": "vgg11"}),
        ("memory_budget=8 GiB", {"memory_budget": "8 GiB"}),
        ('model="a=b"', {"model": "a=b"}),
        ("penalty-ratio=0.2", {"penalty_ratio": 0.2}),
        ("faults.repair-s=5", {"faults": {"repair_s": 5}}),
        ("devices.rtx-3090=2", {"devices": {"rtx-3090": 2}}),
        ('devices={"rtx-3090": 2}', {"devices": {"rtx-3090": 2}}),
        ("overlap=null", {"overlap": None}),
        ("lr=0.5\nepochs=3", {"lr": "0.5\nepochs=3"}),
    ],
)
def test_a_value_is_toml_or_json_and_else_text(text, expected):
    assert read_settings([text], {}, named=("devices",)) == expected


@given(st.text().filter(lambda text: "=" not in text))
def test_a_setting_without_an_equals_sign_is_refused(text):
    with pytest.raises(UsageError, match="is not name=value"):
        read_settings([text], {})


@pytest.mark.parametrize(("text", "size"), [("128M", 2**27), ("128m", 2**27), ("3 k", 3072), ("1G", 2**30), ("9", 9)])
def test_sizes_of_messages_are_read_as_nccl_tests_reads_them(text, size):
    assert parse_bytes("--bytes", text) == size


@pytest.mark.parametrize("text", ["1T", "1.5q", "12parsecs", "5MM"])
def test_an_unknown_unit_of_a_message_is_refused_with_all_that_are_taken(text):
    with pytest.raises(UsageError) as caught:
        parse_bytes("--bytes", text)
    named = str(caught.value).split("; one of ")[1].removesuffix(" is needed").split(", ")
    assert {"B", "MB", "MiB", "TB", "K", "M", "G"} < set(named)
    assert all(parse_bytes("--bytes", f"1{unit}") for unit in named)


def test_parts_that_an_option_and_set_give_come_together():
    given = {"faults.mtbf_gpu_hours": 100.0}
    assert read_settings(["faults.policy=elastic"], given) == {"faults": {"mtbf_gpu_hours": 100.0, "policy": "elastic"}}


@pytest.mark.parametrize(
    ("texts", "given"),
    [
        (["lr=1", "lr=2"], {}),
        (["lr=1"], {"lr": 1.0}),
        (["channel-multiple=8", "channel_multiple=8"], {}),
        (["faults={mtbf_gpu_hours = 5}"], {"faults.mtbf_gpu_hours": 5.0}),
        (["faults.policy=elastic", "faults={mtbf_gpu_hours = 5}"], {}),
        (["faults={mtbf_gpu_hours = 5}", "faults.policy=elastic"], {}),
    ],
)
def test_a_setting_is_given_once(texts, given):
    with pytest.raises(UsageError, match="is given twice"):
        read_settings(texts, given)
