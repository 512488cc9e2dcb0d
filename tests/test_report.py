"""The report on a made-up folder of runs."""

import csv
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from agcseg.cli.report import main
from agcseg.errors import UserError
from agcseg.report import Run, figure, read_folder, read_runs, summarise, write_report

HEADER = (
    "epoch,samples,rate,train_loss,val_loss,pixel_error,pixel_error_all,miou,gradient_norm,images_per_second,seconds,"
    "peak_memory_mib,iou/road,remark"
)
CONFIG = """
network: {{name: segnet, width: 0.25}}
norm: {{name: {norm}}}
minibatch: {minibatch}
epochs: 10
seed: {seed}
lr: {{base: 0.02, value: {rate}}}
data: {{name: streets, size: [64, 128]}}
"""


def make_run(folder, name, errors, norm="bn", minibatch=4, seed=0, rate="null", state="finished", picture=False):
    path = folder / name
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(CONFIG.format(norm=norm, minibatch=minibatch, seed=seed, rate=rate))
    lines = [HEADER, "0,0,,,3.0,0.01,0.99,0.01,,,,,,untrained"]  # better than any epoch: must never be the best
    for epoch, error in enumerate(errors, start=1):
        cells = (epoch, epoch * 8, 0.08, 1.1, 2 * error, error, error + 0.01, 1 - error, 0.5, 90 + epoch, 30 * epoch)
        lines.append(",".join(map(str, cells)) + f",{500 + epoch},,text")
    (path / "metrics.csv").write_text("\n".join(lines) + "\n")
    if state != "unfinished":
        reason = "the loss is nan" if state == "diverged" else ""
        result = {"state": state, "reason": reason, "commonest_class_error": 0.6}
        (path / "result.json").write_text(json.dumps(result))
    if picture:
        Image.new("RGB", (512, 3 * 64), "navy").save(path / "predictions.png")
    return path


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "demo"
    make_run(folder, "agc_4", [0.5, 0.3, 0.2, 0.1, 0.14, 0.12, 0.2], "agc", picture=True)
    make_run(folder, "bn_4", [0.6, 0.4, 0.5], picture=True)
    make_run(folder, "bn_1", [0.6, math.nan], minibatch=1, rate=0.5, state="diverged")
    make_run(folder, "bn_8", [0.4], minibatch=8, state="unfinished")
    return folder


def test_rate_of_matched_momentum(tmp_path):
    path = make_run(tmp_path, "twin", [0.5], minibatch=2)
    with open(path / "config.yaml", "a") as file:
        file.write("momentum_match: 8\n")
    assert read_runs(tmp_path)[0].rate == pytest.approx(0.02 * 2 * 2 / 8)


def test_table_has_the_hand_computed_values(folder):
    rows = {run.name: summarise(run) for run in read_runs(folder)}
    assert list(rows) == ["bn_1", "bn_4", "bn_8", "agc_4"]
    expected = {
        "run": "agc_4", "network": "segnet", "width": 0.25, "data": "streets", "size": "64x128", "norm": "agc",
        "minibatch": 4, "rate": 0.08, "seed": 0, "epochs": 7, "epochs_planned": 10, "state": "finished",
        "final_error": 0.2, "mean_error_last5": 0.152, "best_error": 0.1, "best_epoch": 4, "error_all_pixels": 0.21,
        "miou": 0.8, "val_loss": 0.4, "commonest_class_error": 0.6, "minutes": 3.5, "images_per_second": 94.0,
        "peak_memory_mib": 507.0,
    }  # fmt: skip
    assert rows["agc_4"] == {key: pytest.approx(v) if isinstance(v, float) else v for key, v in expected.items()}
    assert rows["bn_4"]["mean_error_last5"] == pytest.approx(0.5)  # three epochs only
    assert (rows["bn_4"]["best_error"], rows["bn_4"]["best_epoch"]) == (0.4, 2)


def test_states_and_what_was_not_measured(folder):
    runs = {run.name: run for run in read_runs(folder)}
    assert {n: r.state for n, r in runs.items()} == {
        "bn_1": "diverged", "bn_4": "finished", "bn_8": "unfinished", "agc_4": "finished",
    }  # fmt: skip
    diverged = summarise(runs["bn_1"])
    assert [diverged[k] for k in ("rate", "epochs", "final_error", "best_error")] == [0.5, 2, None, 0.6]
    assert runs["bn_1"].reason == "the loss is nan"
    assert summarise(runs["bn_8"])["commonest_class_error"] is None
    assert len(runs["bn_8"].rows["epoch"]) == 2 and math.isnan(runs["bn_8"].rows["train_loss"][0])
    make_run(folder, "new", [], state="unfinished")
    new = summarise(next(run for run in read_runs(folder) if run.name == "new"))
    assert (new["epochs"], new["final_error"], new["best_epoch"], new["peak_memory_mib"]) == (0, None, None, None)


def test_resumed_run_counts_the_later_pass(folder):
    file = folder / "bn_4" / "metrics.csv"
    file.write_text(file.read_text() + "2,,,,1,0.3,,,,,,,,\n")
    (run,) = [run for run in read_runs(folder) if run.name == "bn_4"]
    assert run.column("epoch") == [1, 2] and run.column("pixel_error") == [0.6, 0.3]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("metrics.csv", HEADER + "\n1,8,0.1,1,1,abc,1,1,1,1,1,1,1,\n", "line 2: could not convert"),
        ("metrics.csv", HEADER + "\n1,8\n", "line 2"),
        ("metrics.csv", HEADER + "\n,8,0.1,1,1,1,1,1,1,1,1,1,1,\n", "line 2"),
        ("metrics.csv", "", "columns epoch, pixel_error and val_loss"),
        ("metrics.csv", b"\xff\xfe", "decode"),
        ("result.json", '{"state": ', "Expecting value"),
        ("result.json", '{"state": "fine"}', '"state" is neither'),
        ("config.yaml", "norm: [1, {", "line 1"),
        ("config.yaml", "norm: {name: bn}", "minibatch is missing"),
        ("config.yaml", CONFIG.format(norm="bn", minibatch="many", seed=0, rate=1), "many"),
        ("config.yaml", CONFIG.format(norm="'${nothing}'", minibatch=1, seed=0, rate=1), "nothing"),
    ],
)
def test_broken_files_are_named_and_the_rest_is_read(folder, name, content, says):
    (folder / "agc_4" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    runs, (line,), notes = read_folder(folder)
    assert [run.name for run in runs] == ["bn_1", "bn_4", "bn_8"] and not notes
    assert line.startswith(f"{folder / 'agc_4' / name}: ") and says in line and "\n" not in line


def test_program_names_broken_files(folder, capsys):
    (folder / "agc_4" / "predictions.png").write_text("no picture")
    (folder / "bn_8" / "metrics.csv").write_text("")
    assert main([str(folder)]) == 1
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert len(lines) == 2 and "bn_8/metrics.csv: " in lines[0] and "agc_4/predictions.png: cannot" in lines[1]
    assert "bn_4 " in out and "agc_4 " in out and "bn_8 " not in out
    assert "bn_8/metrics.csv" in (folder / "report.md").read_text()


def test_half_a_run_is_noted(folder, capsys):
    (folder / "bn_4" / "metrics.csv").unlink()
    (folder / "unrelated").mkdir()
    runs, broken, notes = read_folder(folder)
    assert len(runs) == 3 and not broken and len(notes) == 1 and "bn_4" in notes[0] and "metrics.csv" in notes[0]
    assert main([str(folder)]) == 0 and "note: bn_4" in capsys.readouterr().out


def test_nothing_to_report(tmp_path, folder, capsys):
    for path, says in ((tmp_path, "no run to report"), (tmp_path / "typo", "no folder"), (folder / "bn_4", "parent")):
        with pytest.raises(UserError, match=says):
            read_runs(path)
        assert main([str(path)]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("agcseg-report: error: ") and err.count("\n") == 1
        assert "agcseg-train -m experiment=demo" in err or says == "parent"


def test_files_written(folder):
    paths = write_report(folder)
    assert sorted(p.name for p in paths) == ["figure.png", "predictions.png", "report.csv", "report.md"]
    assert not [p for p in folder.iterdir() if p.is_file() and p not in paths]  # no temporary files
    with open(folder / "report.csv", newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert float(rows["agc_4"]["mean_error_last5"]) == pytest.approx(0.152) and rows["bn_1"]["final_error"] == ""
    markdown = (folder / "report.md").read_text()
    assert "| agc_4 | segnet | 0.25 | streets | 64x128 | agc | 4 | 0.08 | 0 | 7 | finished | 20.00% |" in markdown
    assert "bn_1 diverged: the loss is nan" in markdown
    with Image.open(folder / "predictions.png") as picture:
        assert picture.size == (1200, 2 * (150 + 36))  # 512x64 at 1200 pixels width, under a caption, for two runs


def ink(path):
    with Image.open(path) as picture:
        return picture.size, np.asarray(picture.convert("RGB")).reshape(-1, 3)


def test_figure_is_drawn(folder, tmp_path):
    runs = read_runs(folder)
    figure(runs, tmp_path / "all.png")
    size, pixels = ink(tmp_path / "all.png")
    assert size == (1176, 696)
    for colour in ((0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73)):  # one per minibatch
        assert (pixels == colour).all(axis=1).sum() > 20
    figure([r for r in runs if r.minibatch == 4], tmp_path / "part.png")
    assert not (ink(tmp_path / "part.png")[1] == (0x00, 0x9E, 0x73)).all(axis=1).any()


def test_figure_of_several_seeds_twins_networks_and_nothing_measured(tmp_path):
    for seed in range(3):
        make_run(tmp_path, f"bn_s{seed}", [0.5, 0.4], seed=seed)
    make_run(tmp_path, "twin", [0.6, 0.5], "agc")
    make_run(tmp_path, "twin_b", [0.6, 1e9], "agc", state="diverged")
    make_run(tmp_path, "lost", [math.nan, math.inf], "group", state="diverged")
    make_run(tmp_path, "new", [], "other", state="unfinished")
    runs = read_runs(tmp_path)
    assert [run.norm for run in runs] == ["bn"] * 3 + ["agc"] * 2 + ["group", "other"]
    figure(runs, tmp_path / "figure.png")
    assert ink(tmp_path / "figure.png")[0] == (2040, 696)
    runs[0].network = "other"  # a pair of rows of its own
    figure(runs, tmp_path / "figure.png")
    assert ink(tmp_path / "figure.png")[0] == (2040, 1392)
    for run in runs[-2:]:
        figure([run], tmp_path / "figure.png")


def test_title_names_the_data():
    fields = dict.fromkeys(Run.__dataclass_fields__)
    run = Run(**fields | {"network": "segnet", "width": 0.25, "data": "streets", "size": (64, 128), "epochs": 10})
    assert run.title == "SegNet, width 0.25, streets 64x128, 10 epochs"
    run.data, run.width = "cityscapes", None
    assert run.title == "SegNet, Cityscapes 64x128, 10 epochs"


def test_program_prints_the_table(folder, capsys):
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == f"{folder}: 1 diverged, 2 finished, 1 unfinished"
    assert lines[1] == "network segnet, width 0.25, data streets, size 64x128, seed 0, commonest class 60.00%"
    assert lines[-1] == f"tensorboard --logdir {folder}"
    assert f"wrote {folder / 'figure.png'}" in lines and "note: bn_1 diverged: the loss is nan" in lines
    (row,) = [line.split() for line in lines if line.startswith("agc_4 ")]
    assert row[:8] == ["agc_4", "agc", "4", "0.08", "7", "finished", "20.00%", "15.20%"]


def test_program_help_and_imports(folder, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "agcseg-report outputs/demo" in capsys.readouterr().out
    check = "import agcseg.report, sys; print([m for m in ('hydra', 'matplotlib.pyplot') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stdout == "[]\n"
