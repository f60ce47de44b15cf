import msgspec

from ptsim.trace.schema import Dataset, Epoch, Reconfiguration
from ptsim.training.progress import Bars
from tests.traces import shrinking_records

DATA = Dataset(name="scans", num_classes=3, num_train=1200, num_validation=27, input_shape=(3, 32, 48))


def test_a_folders_name_is_shown_on_one_line_without_what_acts(capsys):
    with Bars() as bars:
        bars.begin("a\u202eb\n[red]c", 1, 0, DATA)
    assert capsys.readouterr().err.startswith("a\N{REPLACEMENT CHARACTER}b [red]c: 1 epoch; ")


def test_a_run_begins_with_what_is_trained_on(capsys):
    with Bars() as bars:
        bars.begin("dense", 90, 30, DATA)
    said = "dense: 90 epochs, 30 done; trained on 1,200 images of 3×32×48 in 3 classes, validated on 27\n"
    assert capsys.readouterr().err == said


def test_an_epoch_in_which_every_update_was_left_out_has_no_time_to_show(capsys):
    epoch = next(record for record in shrinking_records() if isinstance(record, Epoch))
    with Bars() as bars:
        bars.begin("run", 2, 0, DATA)
        bars.epoch(epoch)
        bars.epoch(msgspec.structs.replace(epoch, epoch=1, measured_time=None))
    _, first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(f"sparse 0%  {epoch.time.wall_s:.2f} s")
    assert second.endswith("sparse 0%")


def test_what_went_is_counted(capsys):
    usual = next(record for record in shrinking_records() if isinstance(record, Reconfiguration))
    with Bars() as bars:
        bars.begin("run", 2, 0, DATA)
        for channels, layers in ((0, ()), (1, ("a",)), (1234, ("a", "b"))):
            bars.reconfigured(msgspec.structs.replace(usual, channels_removed=channels, layers_removed=layers))
    pruned = [line.partition("pruned ")[2].partition(" in ")[0] for line in capsys.readouterr().err.splitlines()[1:]]
    assert pruned == ["0 channels", "1 channel, 1 layer", "1,234 channels, 2 layers"]
