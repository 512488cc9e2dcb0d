"""Settings compared over their seeds, on made-up runs of which the answer is known."""

import json
import math
import warnings

import numpy as np
import pytest
from fake_figure1 import make_figure1
from fake_sweep import make_run, make_sweep

from agcseg.cli.report import main
from agcseg.errors import UserError
from agcseg.figure1 import RUNS
from agcseg.report import by_setting, cells, read_folders, read_runs, t_interval
from agcseg.report.compare import of_settings, reference_of
from agcseg.report.figures import figure, lambda_starts_figure, setting_styles
from agcseg.report.page import costs_compared, differences_table, lambda_memory, lambda_starts, settings_table
from agcseg.report.read import NAMES, NORM_TITLES

GEMS = [{"gems.mode": mode} for mode in (None, "minibatch", "sample")]


def compared(runs, reference=None):
    groups, notes = by_setting(runs)
    return groups, reference_of(groups, reference), notes


def table(folder):
    return settings_table(by_setting(read_runs(folder))[0]).T.to_dict()


def differences(folder, reference=None):
    return differences_table(*compared(read_runs(folder), reference)[:2]).T.to_dict()


@pytest.mark.parametrize(
    ("settings", "names", "reference"),
    [
        (GEMS, ["GEMS minibatch", "GEMS sample", "no GEMS"], "no GEMS"),
        (
            [{"gems.mode": "map"}, {"gems.mode": "map", "gems.limit": 5.0}],
            ["GEMS map", "GEMS map at most 5"],
            "GEMS map",
        ),
        (
            [{"noise.gain": gain, "noise.shift": shift} for gain in (0, 0.1) for shift in (0, 0.1)],
            ["no noise", "noise gain 0 shift 0.1", "noise gain 0.1 shift 0", "noise gain 0.1 shift 0.1"],
            "no noise",
        ),
        (
            [{"minibatch": 1, "momentum_match": match} for match in (1, 8, 100)],
            ["momentum 0.9, rate 0.02", "momentum 0.9875, rate 0.0025", "momentum 0.999, rate 0.0002"],
            "momentum 0.9, rate 0.02",
        ),
        (
            [{"norm.name": norm, "network.init": init} for norm in ("agc", "bn") for init in ("he", "identity")],
            ["BN, init he", "BN, init identity", "AGC, init he", "AGC, init identity"],
            "AGC, init he",
        ),
        (
            [{"norm.options.mean_scale": start} for start in (0, 0.5, 1)],
            ["λ from 0", "λ from 0.5", "λ from 1"],
            "λ from 1",
        ),
        (
            [{"norm.options.background": "map"}, {"norm.options.background": "window"}]
            + [{"norm.options.background": "window", "norm.options.window": 9}],
            ["background map", "background window", "background window 9"],
            "background map",
        ),
        (  # a run that is older than an option has its default; one that another background has no use for is not said
            [{"norm.options.background": "window"}]
            + [{"norm.options": {"background": "median", "median_gradient": flag}} for flag in (False, True)],
            ["background median", "background median with gradient", "background window"],
            "background median",
        ),
        (
            [{"gems.mode": "sample"}, {"gems.mode": "sample", "gems.ema": 0.9, "gems.gate": "grad"}],
            ["GEMS sample", "GEMS sample ema 0.9 gate grad"],
            "GEMS sample",
        ),
        (  # a norm's own options are named only where they differ, and none's are compared with another's
            [{}, {"norm.options.background": "median"}, {"norm.name": "bn", "norm.options": {"eps": 1e-5}}]
            + [{"norm.name": "frn", "norm.options": {"eps": 1e-6}}, {"norm.name": "none"}]
            + [{"norm.name": "center", "norm.options": {"mean_scale": scale}} for scale in (0.0, 1.0)],
            ["BN", "AGC", "AGC, background median", "no norm", "center, λ 0", "center, λ 1", "FRN"],
            "AGC",
        ),
        (  # what is usual is said only where it is not so
            [{"norm.name": norm, "network.init": "he_centered"} for norm in ("bn", "agc", "none", "group")]
            + [{"norm.name": "none", "network.init": "he"}],
            ["BN", "AGC", "no norm", "no norm, init he", "group"],
            "AGC",
        ),
        (  # an option stands with its norm, whichever run names it first
            [{"norm.name": "bn", "network.init": "he"}]
            + [{"norm.options.mean_scale": scale, "network.init": "identity"} for scale in (0, 0.5)],
            ["BN, init he", "AGC, λ from 0, init identity", "AGC, λ from 0.5, init identity"],
            "BN, init he",
        ),
        (
            [{}, {"data.flip": True}, {"gems.mode": "map"}, {"epochs": 3}],
            ["AGC", "GEMS map", "epochs 3", "flip"],
            "AGC",
        ),
        (
            [{}, {"init_from": "outputs/a/b/last.pt"}, {"init_from": "outputs/c/b"}],
            ["from a/b", "from c/b", "from scratch"],
            "from scratch",
        ),
        (  # of a path as much as tells it from the others
            [{"init_from": f"outputs/{place}"} for place in ("a/run/best.pt", "c/run/best.pt", "a/run/last.pt")],
            ["from a/run/best.pt", "from c/run/best.pt", "from outputs/a/run"],
            "from a/run/best.pt",
        ),
        ([{"data.train_images": None}, {}], ["all train images", "train images 2750"], "train images 2750"),
        ([{"data.val_images": None}, {}], ["all val images", "val images 500"], "val images 500"),
        ([{}, {"class_weights": "none"}, {"data.flip": True}], None, "no flip, class weights enet"),
    ],
)  # fmt: skip
def test_settings_are_named_by_what_differs(tmp_path, settings, names, reference):
    make_sweep(tmp_path, settings, seeds=(1,), epochs=2)
    groups, chosen, notes = compared(read_runs(tmp_path))
    assert not notes and len(groups) == len(settings) and (names is None or [*groups] == names)
    assert chosen == reference == reference_of(groups)
    assert reference_of(groups, [*groups][-1].upper()) == [*groups][-1]


def test_the_same_by_other_keys_is_one_setting(tmp_path):
    same = [{"minibatch": 1}, {"minibatch": 1, "momentum_match": 1}, {"minibatch": 1, "lr.value": 0.02}]
    make_sweep(tmp_path, [*same, {"minibatch": 1, "momentum_match": 8}], seeds=(1,), epochs=2)
    groups, notes = by_setting(read_runs(tmp_path))
    assert len(groups) == 2 and len(notes) == 2 and all("has the same settings and seed" in note for note in notes)


def test_runs_on_other_images_are_not_compared(tmp_path):
    """The root of the data is no setting; what a run saw there is."""
    make_sweep(tmp_path, [{"norm.name": "bn"}, {"data.root": "/elsewhere"}, {}], epochs=2)
    for run in tmp_path.iterdir():
        result = json.loads((run / "result.json").read_text())
        its = "ab" if run.name.startswith("run01") else "01"
        result["data"] = {"classes": ["road"], "train": f"{its}234567", "val": its}
        (run / "result.json").write_text(json.dumps(result))
    kept, notes = cells(read_runs(tmp_path))
    assert sorted(of.norm for of in kept) == ["agc", "bn"] and {len(seeds) for seeds in kept.values()} == {3}
    assert notes[0].startswith(
        "not compared with the others, for CamVid of /elsewhere (ab2345), not CamVid of the cache"
    )
    names = {f"{norm}, CamVid of the cache (012345)" for norm in ("AGC", "BN")}
    assert {*by_setting(read_runs(tmp_path))[0]} == {*names, "AGC, CamVid of /elsewhere (ab2345)"}


def test_of_unfinished_runs_the_root_of_the_data_tells_what_they_see(tmp_path):
    roots = ["/a", "/b", "/c", "/d"]
    make_sweep(tmp_path, [{"data.root": root} for root in roots[:2]], epochs=2, seeds=(1,))
    for number, run in enumerate(sorted(tmp_path.iterdir())):
        result = json.loads((run / "result.json").read_text()) | {"data": {"train": f"{number}2345678"}}
        (run / "result.json").write_text(json.dumps(result | {"processes": 2}))
    for root in roots:
        make_run(tmp_path / f"late{root[1:]}", {"data.root": root}, 2, 2, 30, reached=1)
    make_run(tmp_path / "changed", {"data.root": "/d"}, 3, 2, 30)
    make_run(tmp_path / "again", {"data.root": "/d"}, 4, 2, 30)
    for name in ("changed", "again"):
        result = json.loads((tmp_path / name / "result.json").read_text())
        (tmp_path / name / "result.json").write_text(json.dumps(result | {"data": {"train": f"{name}s"}}))
    groups, notes = by_setting(read_runs(tmp_path))
    assert not notes and {name: [*seeds] for name, seeds in groups.items()} == {
        "CamVid of /d (change), 1 processes": [3], "CamVid of /d (agains), 1 processes": [4],
        "CamVid of /a (023456), 2 processes": [1, 2], "CamVid of /b (123456), 2 processes": [1, 2],
        "CamVid of /c, 1 processes": [2], "CamVid of /d, 1 processes": [2],
    }  # fmt: skip


def test_unfinished_runs_at_one_root_see_the_same(tmp_path):
    make_sweep(tmp_path / "a", [{"data.root": "/a"}], epochs=2, reached=1)
    assert [*by_setting(read_runs(tmp_path / "a"))[0]] == ["AGC"]


def test_what_the_paper_varies_is_no_experiment_of_settings(tmp_path):
    make_figure1(tmp_path / "figure1", seeds=(1, 2), epochs=2)
    make_figure1(tmp_path / "pair", seeds=(1, 2), runs=RUNS[:7], epochs=2, name="pair")
    for name in ("figure1", "pair"):
        assert not of_settings(read_runs(tmp_path / name))
    groups, reference, _ = compared(read_runs(tmp_path / "pair"), "agc, minibatch 4, rate 0.08")
    assert reference == "AGC, minibatch 4, rate 0.08" and len(groups) == len({*RUNS[:7]})


def test_table_has_the_hand_computed_values(tmp_path):
    errors = [[30, 31, 35], [40, 42], [20], [28, 29, None]]
    make_sweep(
        tmp_path, [*GEMS, {"gems.mode": "map"}], epochs=6,
        error=lambda number, seed: (errors[number] + [errors[number][0]] * 3)[seed - 1],
    )  # fmt: skip
    for name in ("run01-seed3", "run02-seed2", "run02-seed3"):
        for file in (tmp_path / name).iterdir():
            file.unlink()
        (tmp_path / name).rmdir()
    rows = table(tmp_path)
    assert [*rows] == ["GEMS sample", "GEMS map", "no GEMS", "GEMS minibatch"]  # the best first
    low, high = t_interval([30, 31, 35])
    assert rows["no GEMS"]["error, %"] == f"32.0 ± {(high - low) / 2:.1f}" == "32.0 ± 6.6"
    assert rows["GEMS sample"]["gems"] == "sample" and rows["no GEMS"]["gems"] == "none"
    assert rows["no GEMS"]["mIoU, %"] == "68.0 ± 6.6"
    assert rows["no GEMS"]["loss"] == "0.640 ± 0.131"
    assert rows["GEMS minibatch"]["error, %"] == "41.0 (40.0, 42.0)"  # two seeds: no interval
    assert rows["GEMS sample"]["error, %"] == "**20.0**"
    assert rows["GEMS map"]["error, %"] == "28.5 (28.0, 29.0)"  # the diverged one's 70 % is not in it
    assert [row["n"] for row in rows.values()] == ["1", "2 (1 diverged)", "3", "2"]
    (run,) = [run for run in read_runs(tmp_path) if run.name == "run02-seed1"]
    values = 100 * np.array(run.column("pixel_error"))
    assert rows["GEMS sample"]["last three, %"] == f"**{values[-3:].mean():.1f}**"
    assert rows["GEMS sample"]["all epochs, %"] == f"**{values.mean():.1f}**"

    pairs = differences(tmp_path)
    low, high = t_interval([-2, -2, 0])
    assert list(pairs) == ["GEMS sample", "GEMS map", "GEMS minibatch"]
    assert pairs["GEMS minibatch"]["error, points"] == "+10.5 (+10.0, +11.0)"
    assert pairs["GEMS map"]["error, points"] == "-2.0 (-2.0, -2.0)" and pairs["GEMS map"]["n"] == "2 (1 diverged)"
    assert pairs["GEMS sample"]["error, points"] == "-10.0" and pairs["GEMS sample"]["loss"] == "-0.200"


def test_the_best_is_of_runs_on_the_same_images(tmp_path):
    make_sweep(
        tmp_path, [{"norm.name": norm, "data.root": root} for root in "ab" for norm in ("agc", "bn")], seeds=(1,)
    )
    for run in tmp_path.iterdir():
        result = json.loads((run / "result.json").read_text())
        result["data"] = {"train": "ab" if run.name < "run02" else "cd"}
        (run / "result.json").write_text(json.dumps(result))
    rows = table(tmp_path)
    assert [row["error, %"] for row in rows.values()] == ["**30.0**", "31.0", "**32.0**", "33.0"]


def test_columns_of_one_name_lose_nothing(tmp_path):
    settings = [{"norm.options.mean_scale": scale} for scale in (0, 1)]
    settings += [{"norm.name": "center", "norm.options": {"mean_scale": scale}} for scale in (0.0, 1.0)]
    make_sweep(tmp_path / "norms", settings, seeds=(1,))
    assert {(row["norm"], row["λ"]) for row in table(tmp_path / "norms").values()} == {
        ("AGC", "from 0"), ("AGC", "from 1"), ("center", "0"), ("center", "1"),
    }  # fmt: skip
    assert main([str(tmp_path / "norms")]) == 0
    assert "which differ in norm, λ. " in (tmp_path / "norms/report.md").read_text()
    flips = [{}, {"data.flip": True}, {"augment.flip": 0.5}]
    make_sweep(tmp_path / "flips", flips, seeds=(1,))
    rows = [*table(tmp_path / "flips").values()]
    assert len({(row["flip"], row["augment.flip"]) for row in rows}) == 3, rows


def test_differences_are_paired_by_seed(tmp_path):
    make_sweep(tmp_path, GEMS, epochs=3, error=lambda number, seed: 20 + 10 * seed + 0.5 * number)
    assert table(tmp_path)["no GEMS"]["error, %"] == "**40.0 ± 24.8**"
    assert differences(tmp_path)["GEMS sample"]["error, points"] == "+1.0 ± 0.0"
    assert differences(tmp_path, "gems sample")["no GEMS"]["error, points"] == "-1.0 ± 0.0"
    with pytest.raises(
        UserError, match="no setting is named 'gmes'; choose from: GEMS minibatch; GEMS sample; no GEMS"
    ):
        differences(tmp_path, "gmes")


def test_a_diverged_and_an_unfinished_setting_have_no_values(tmp_path):
    make_sweep(tmp_path, GEMS[:2], epochs=6, seeds=(1, 2), error=lambda number, seed: None if number else 30)
    make_run(tmp_path / "late", GEMS[2], 1, 6, 30, reached=3)
    rows = table(tmp_path)
    assert [row["n"] for row in rows.values()] == ["2", "0 (2 diverged)", "0 (1 unfinished)"]
    assert all(row["error, %"] == row["loss"] == "" for row in [*rows.values()][1:])
    assert differences(tmp_path)["GEMS minibatch"]["n"] == "0 (2 diverged)"


def test_speed_and_memory_are_compared_where_they_can_be(tmp_path):
    make_sweep(tmp_path / "a", GEMS[:2], epochs=6, seeds=(1, 2))
    assert {"img/s", "MiB"} <= table(tmp_path / "a")["no GEMS"].keys()
    file = tmp_path / "a" / "run00-seed2" / "metrics.csv"
    file.write_text(file.read_text().replace(",100.0,", ",60.0,"))  # as if something else ran beside it
    row = table(tmp_path / "a")["no GEMS"]
    assert "img/s" not in row and row["MiB"] == "500"
    assert "varied by 50%" in costs_compared(by_setting(read_runs(tmp_path / "a"))[0])[2]
    make_run(tmp_path / "a" / "elsewhere", GEMS[2], 1, 6, 30, device="Another GPU")
    assert not {"img/s", "MiB"} & table(tmp_path / "a")["no GEMS"].keys()
    assert "differ in device" in costs_compared(by_setting(read_runs(tmp_path / "a"))[0])[2]


def test_speed_and_memory_of_other_ways_to_compute_are_not_compared(tmp_path):
    make_sweep(tmp_path / "networks", [{}, {"network.name": "classnet"}], epochs=6)  # each with its own `recompute`
    assert {"img/s", "MiB"} <= table(tmp_path / "networks")["SegNet"].keys()
    more = {"norm.options.mean_scale": 0.0, "network.options": {"recompute": 0.0}}
    for name, changes, what in (
        ("graphs", {"norm.options.mean_scale": 0.0, "graph": True}, "differ in graph: False, True"),
        ("recomputed", more, "differ in network.options.recompute of segnet: 0.0, 0.001"),
    ):
        make_sweep(tmp_path / name, [{}, changes], epochs=6)
        assert not {"img/s", "MiB"} & [*table(tmp_path / name).values()][0].keys()
        assert what in costs_compared(by_setting(read_runs(tmp_path / name))[0])[2]
    center = {"norm.name": "center"}
    make_sweep(tmp_path / "center", [center, {**center, "minibatch": 8, "network.implementation": "literal"}], epochs=6)
    said = costs_compared(by_setting(read_runs(tmp_path / "center"))[0])[2]
    assert "differ in network.implementation: fast, literal" in said


def test_colours_stay_with_their_settings():
    names = [NAMES.get(norm, norm) for norm in NORM_TITLES]
    all_norms = setting_styles(names)
    more = setting_styles(["BN", "layer", "no norm, init he"])
    assert more["BN"] == all_norms["BN"] and more["no norm, init he"] not in all_norms.values()
    assert setting_styles(["BN", "layer"]) == {name: all_norms[name] for name in ("BN", "layer")}
    for styles in (all_norms, setting_styles([f"rate {i}" for i in range(12)])):
        assert len({(style["color"], str(style["ls"])) for style in styles.values()}) == len(styles) >= 11


def test_figure_of_settings(tmp_path):
    make_sweep(
        tmp_path, [*GEMS, {"gems.mode": "map"}], epochs=6,
        error=lambda number, seed: None if (number, seed) == (1, 2) else (30, 31, 32, 90)[number] + seed,
    )  # fmt: skip
    runs = read_runs(tmp_path)
    groups, reference, _ = compared(runs)
    fig = figure(groups, reference)
    fig.draw_without_rendering()
    top, other, rows, _ = fig.axes
    texts = [text.get_text() for text in rows.texts]
    assert texts[-4:] == ["no GEMS", "GEMS minibatch", "GEMS sample", "GEMS map"]  # by the final error
    assert "1 of 3 diverged ×" in texts and "92 →" in texts  # far off: written, so that the others have room
    assert rows.get_xlim()[1] < 60 and not any(
        "gems.mode" in text.get_text() for axis in fig.axes for text in axis.texts
    )
    assert top.get_legend() is None and other.get_legend() is None and not fig.legends
    styles = setting_styles([*groups])
    (plain,) = [line for line in top.lines if line.get_linewidth() == 2.6]  # the reference is thicker
    assert plain.get_color() == styles["no GEMS"]["color"]
    both = [100 * np.array(run.column("pixel_error")) for run in groups["no GEMS"].values()]
    assert plain.get_ydata() == pytest.approx(np.mean(both, 0))
    crosses = [line for line in top.lines if line.get_marker() == "x"]
    assert [(line.get_xdata()[0], line.get_color()) for line in crosses] == [(3, styles["GEMS minibatch"]["color"])]


def test_figure_of_settings_worse_than_the_commonest_class(tmp_path):
    """What is off the scale has no text, which would take the room of the axes."""
    make_sweep(tmp_path, GEMS, epochs=1, error=lambda number, seed: 90 + number + 0.1 * seed)
    groups, reference, _ = compared(read_runs(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure(groups, reference).draw_without_rendering()


def test_lambda_at_its_start_and_at_its_end(tmp_path):
    make_sweep(
        tmp_path, [{"norm.options.mean_scale": start} for start in (0, 0.5, 1)], seeds=(1, 2), epochs=4,
        lambdas=lambda start, level: 0.25 * start + level / 8, layer_columns=("common_mode", "dead", "lambda_above_1"),
    )  # fmt: skip
    runs, broken, _ = read_folders(tmp_path)
    groups, _, _ = compared(runs)
    starts = lambda_starts(groups)
    assert not broken and [*starts] == ["λ from 0", "λ from 0.5", "λ from 1"]
    assert lambda_memory(starts) == pytest.approx(0.25)
    (axis,) = lambda_starts_figure(starts, [*groups]).axes
    before = [line for line in axis.lines if line.get_linestyle() == ":" and len(line.get_xdata())]
    after = [line for line in axis.lines if line.get_marker() == "."]
    assert [line.get_ydata().mean() for line in before] == pytest.approx([0, 0.5, 1])
    levels = np.array([*range(5), *range(5)[::-1]])
    for line, start in zip(after, (0, 0.5, 1), strict=True):
        assert line.get_ydata() == pytest.approx(0.25 * start + levels / 8, abs=0.05)
        assert line.get_label() == f"λ from {start:g}, epoch 4, 2 seeds"
    assert [text.get_text() for text in axis.get_xticklabels()][:2] == ["encoder.0.0", "encoder.1.0"]
    long = {f"AGC, {name}, init identity, augmentation standard": seeds for name, seeds in starts.items()}
    wide = lambda_starts_figure(long, [*long])
    wide.canvas.draw()
    legend = wide.legends[0].get_window_extent()
    assert wide.bbox.x0 <= legend.x0 and legend.x1 <= wide.bbox.x1
    assert lambda_starts({name: groups[name] for name in ("λ from 0",)}) == {}


def test_program_compares_settings(tmp_path, capsys):
    settings = [*GEMS[:2], {"norm.name": "bn"}]
    make_sweep(tmp_path, settings, seeds=(1, 2), epochs=6, error=lambda number, seed: 30 + number + seed)
    assert main([str(tmp_path), "--reference", "AGC, GEMS minibatch"]) == 0
    out = capsys.readouterr().out
    text = (tmp_path / "report.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        "figure.png", "report.csv", "report.html", "report.md",
    ]  # fmt: skip
    assert "| AGC | minibatch | 2 | 32.5 (32.0, 33.0) |" in text
    assert "| setting − AGC, GEMS minibatch | n |" in text and "| BN | 2 | +1.0 (+1.0, +1.0) |" in text
    assert any(line.split()[:6] == ["AGC", "none", "2", "31.5", "(31.0,", "32.0)"] for line in out.splitlines())
    assert "claim 1" not in out and "not compared" not in out  # BN has no GEMS, as the reference has
    assert text.index("![validation error and loss") < text.index("## Results") < text.index("### Differences")
    before = (tmp_path / "report.md").read_bytes()
    assert main([str(tmp_path)]) == 0 and "claim 1: AGC equals" in capsys.readouterr().out
    assert "| setting − AGC | n |" in (tmp_path / "report.md").read_text()
    (tmp_path / "report.md").write_bytes(before)
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), "--reference", "agc, gmes"])
    out, err = capsys.readouterr()
    assert not out and err.startswith("agcseg-report: error: no setting is named 'agc, gmes'; choose from: BN; AGC; ")
    assert (tmp_path / "report.md").read_bytes() == before


def test_a_configuration_that_makes_no_sense_is_named(tmp_path):
    make_sweep(tmp_path, GEMS[:2], seeds=(1,), epochs=2)
    make_run(tmp_path / "odd", {"noise.gain": "much"}, 1, 2, 30)
    runs, (line,), _ = read_folders(tmp_path)
    assert len(runs) == 2 and line.startswith(f"{tmp_path / 'odd' / 'config.yaml'}: ")


def test_nothing_measured(tmp_path):
    make_sweep(tmp_path, GEMS, seeds=(1,), epochs=6, error=lambda number, seed: None)
    assert all(row["error, %"] == "" for row in table(tmp_path).values())
    groups, reference, _ = compared(read_runs(tmp_path))
    assert math.isfinite(figure(groups, reference).axes[0].get_ylim()[1])


def test_a_factorys_default_is_no_option_that_was_given(tmp_path):
    """Nobody knows what the default is: it may be the value of the other runs, and need not."""
    mine = {"network.name": "mine", "network.factory": "mynet:make"}
    make_sweep(tmp_path / "given", [mine | {"network.options": {"channels": 32}}], seeds=(1, 2), epochs=2)
    make_sweep(tmp_path / "left", [mine], seeds=(1,), epochs=2)
    groups, _, notes = compared(read_runs(tmp_path / "given", tmp_path / "left"))
    assert not notes and {name: len(seeds) for name, seeds in groups.items()} == {
        "channels 32": 2,
        "channels by default": 1,
    }


@pytest.mark.parametrize(
    ("changes", "key", "name"),
    [
        ({"network.name": "mine", "network.factory": "mynet:make"}, "source", "factory mynet:make ({})"),
        ({"init_from": "outputs/a/run"}, "start", "from a/run ({})"),
    ],
)
def test_files_and_weights_that_changed_between_runs_tell_them_apart(tmp_path, changes, key, name):
    make_sweep(tmp_path, [changes], epochs=2)
    for run, digest in zip(sorted(tmp_path.iterdir()), ("abcdef00", "12345600", "12345600"), strict=True):
        result = json.loads((run / "result.json").read_text())
        (run / "result.json").write_text(json.dumps(result | {key: digest}))
    groups, _, _ = compared(read_runs(tmp_path))
    assert {of: len(seeds) for of, seeds in groups.items()} == {name.format("123456"): 2, name.format("abcdef"): 1}


def test_dollars_in_names_are_no_formulas(tmp_path):
    for name in ("a", "b$_$"):
        make_sweep(tmp_path / name, [{}], epochs=2)
    assert main([str(tmp_path / "a"), str(tmp_path / "b$_$"), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report/figure.png").is_file()
