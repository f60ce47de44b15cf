from ptsim.training.progress import Bars


def test_a_folders_name_is_shown_on_one_line_without_what_acts(capsys):
    with Bars() as bars:
        bars.begin("a\u202eb\n[red]c", 1, 0)
    assert capsys.readouterr().err == "a\N{REPLACEMENT CHARACTER}b [red]c: 1 epoch\n"
