"""The table of the paper's experiment."""

from agcseg.figure1 import PANELS, PAPER_ERRORS, RUNS, Setting


def test_twelve_runs():
    assert [run.name for run in RUNS] == [
        "segnet-bn-mb1-lr0.02",
        "segnet-bn-mb4-lr0.08",
        "segnet-bn-mb8-lr0.16",
        "segnet-bn-mb8-lr0.08",
        "segnet-agc-mb1-lr0.02",
        "segnet-agc-mb4-lr0.08",
        "segnet-agc-mb8-lr0.16",
        "segnet-agc-mb8-lr0.08",
        "segnet-agc-mb8-lr0.32",
        "segnet-agc-mb8-lr0.64",
        "classnet-bn-mb4-lr0.08",
        "classnet-agc-mb4-lr0.08",
    ]


def test_eight_panels_show_every_run_as_their_captions_say():
    assert "".join(panel.letter for panel in PANELS) == "abcdefgh"
    assert {run for panel in PANELS for run in panel.runs} == {*RUNS}
    assert [len(panel.runs) for panel in PANELS] == [3, 3, 2, 2, 2, 2, 2, 4]
    for panel in PANELS:
        assert ("loss" in panel.caption) == (panel.metric == "val_loss")
        assert all(run.network in panel.caption.lower() for run in panel.runs)
        assert {run.norm for run in panel.runs} == {n for n in ("bn", "agc") if n.upper() in panel.caption}
        for run in panel.runs:
            assert f"{run.rate:g}" in panel.caption and str(run.minibatch) in panel.caption


def test_the_papers_errors():
    assert {*PAPER_ERRORS} <= {*RUNS}
    assert PAPER_ERRORS[Setting("classnet", "agc", 4, 0.08)] == 0.0534
