import msgspec

from ptsim.trace.schema import Epoch
from ptsim.training.progress import Bars
from tests.traces import shrinking_records


def test_a_folders_name_is_shown_on_one_line_without_what_acts(capsys):
    with Bars() as bars:
        bars.begin("a\u202eb\n[red]c", 1, 0)
    assert capsys.readouterr().err == "a\N{REPLACEMENT CHARACTER}b [red]c: 1 epoch\n"


def test_an_epoch_in_which_every_update_was_left_out_has_no_time_to_show(capsys):
    epoch = next(record for record in shrinking_records() if isinstance(record, Epoch))
    with Bars() as bars:
        bars.begin("run", 2, 0)
        bars.epoch(epoch)
        bars.epoch(msgspec.structs.replace(epoch, epoch=1, measured_time=None))
    _, first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(f"sparse 0%  {epoch.time.wall_s:.2f} s")
    assert second.endswith("sparse 0%")
