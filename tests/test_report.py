"""The report on a made-up folder of runs."""

import base64
import csv
import io
import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fake_figure1 import make_figure1
from PIL import Image

from agcseg.cli.report import main
from agcseg.errors import UserError
from agcseg.figure1 import RUNS
from agcseg.report import by_setting, cells, read_folders, read_runs, write_report
from agcseg.report.compare import reference_of
from agcseg.report.figures import figure, figure1, lambda_figure
from agcseg.report.page import environment_table, reached_table, summarise
from agcseg.report.read import Run

ROOT = Path(__file__).parents[1]
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
    lines = [HEADER]
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
        "miou": 0.8, "val_loss": 0.4, "commonest_class_error": 0.6, "minutes": 3.5, "images_per_second": 94.5,
        "peak_memory_mib": 507.0, "training_memory_mib": None, "kept_for_backward_mib": None,
    }  # fmt: skip
    assert rows["agc_4"] == {key: pytest.approx(v) if isinstance(v, float) else v for key, v in expected.items()}
    assert rows["bn_4"]["mean_error_last5"] == pytest.approx(0.5)  # three epochs only
    assert (rows["bn_4"]["best_error"], rows["bn_4"]["best_epoch"]) == (0.4, 2)


def test_names_of_images_need_not_be_text(folder):
    content = b"image,wrong_pixels,labelled_pixels,loss\ncaf\xe9.png,1,4,0.5\n"
    (folder / "agc_4/images.csv").write_bytes(content)
    runs, broken, _ = read_folders(folder)
    (run,) = (run for run in runs if run.name == "agc_4")
    assert not broken and run.images["wrong"].to_list() == [0.25]


def test_states_and_what_was_not_measured(folder):
    runs = {run.name: run for run in read_runs(folder)}
    assert {n: r.state for n, r in runs.items()} == {
        "bn_1": "diverged", "bn_4": "finished", "bn_8": "unfinished", "agc_4": "finished",
    }  # fmt: skip
    diverged = summarise(runs["bn_1"])
    assert [diverged[k] for k in ("rate", "epochs", "final_error", "best_error")] == [0.5, 2, None, 0.6]
    assert runs["bn_1"].reason == "the loss is nan"
    assert summarise(runs["bn_8"])["commonest_class_error"] is None
    assert runs["bn_8"].metrics.index.tolist() == [1] and math.isnan(runs["bn_8"].at("miou", 2))
    make_run(folder, "new", [], state="unfinished")
    new = summarise(next(run for run in read_runs(folder) if run.name == "new"))
    assert (new["epochs"], new["final_error"], new["best_epoch"], new["peak_memory_mib"]) == (0, None, None, None)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("metrics.csv", HEADER + "\n1,8,0.1,1,1,abc,1,1,1,1,1,1,1,\n", "line 2: could not convert"),
        ("metrics.csv", HEADER + "\n1,8\n", "line 2"),
        ("metrics.csv", HEADER + "\n,8,0.1,1,1,1,1,1,1,1,1,1,1,\n", "line 2: epoch nan, expected 1"),
        ("metrics.csv", HEADER + "\n0,8,0.1,1,1,1,1,1,1,1,1,1,1,\n", "line 2: epoch 0, expected 1"),
        ("metrics.csv", HEADER + "\n1,8,0.1,1,1,1,1,1,1,1,1,1,1," * 2, "line 3: epoch 1, expected 2"),
        ("metrics.csv", "", "columns epoch, pixel_error"),
        ("metrics.csv", "epoch,loss\n1,2\n", "expected the columns pixel_error, val_loss"),
        ("metrics.csv", b"\xff\xfe", "expected the columns epoch"),
        ("result.json", '{"state": ', "Expecting value"),
        ("result.json", '{"state": "fine"}', '"state" is neither'),
        ("config.yaml", "norm: [1, {", "line 1"),
        ("config.yaml", "norm: {name: bn}", "data.size and minibatch and epochs and seed: missing"),
        ("config.yaml", CONFIG.format(norm="bn", minibatch=1, seed="null", rate=1), "config.yaml: seed: missing"),
        ("result.json", '{"state": "finished", "commonest_class_error": "few"}', "few"),
        ("config.yaml", CONFIG.format(norm="bn", minibatch="many", seed=0, rate=1), "many"),
        ("config.yaml", CONFIG.format(norm="'${nothing}'", minibatch=1, seed=0, rate=1), "nothing"),
    ],
)
def test_broken_files_are_named_and_the_rest_is_read(folder, name, content, says):
    (folder / "agc_4" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    runs, (line,), notes = read_folders(folder)
    assert [run.name for run in runs] == ["bn_1", "bn_4", "bn_8"] and not notes
    assert line.startswith(f"{folder / 'agc_4' / name}: ") and says in line and "\n" not in line


def test_program_names_broken_files(folder, capsys):
    (folder / "agc_4" / "predictions.png").write_text("no picture")
    (folder / "bn_8" / "metrics.csv").write_text("")
    assert main([str(folder)]) == 1
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert len(lines) == 2 and "bn_8/metrics.csv: " in lines[0] and "agc_4/predictions.png: cannot" in lines[1]
    assert "1 diverged, 2 finished" in out and "minibatch 8" not in out
    assert "bn_8/metrics.csv" in (folder / "report.md").read_text()


def test_a_run_without_an_epoch_and_a_diverged_lambda_are_no_fault(folder):
    (folder / "agc_4/metrics.csv").write_text(HEADER + "\n")
    runs, broken, _ = read_folders(folder)
    assert [run.last_epoch for run in runs if run.name == "agc_4"] == [0] and not broken
    write_report(folder)


def test_what_cannot_be_written_leaves_nothing(folder):
    (folder / "report.html").mkdir()
    with pytest.raises(OSError, match=f"{folder / 'report.html'}"):
        write_report(folder)
    assert not [*folder.glob(".*")]


def test_half_a_run_is_noted(folder, capsys):
    (folder / "bn_4" / "metrics.csv").unlink()
    (folder / "unrelated").mkdir()
    runs, broken, notes = read_folders(folder)
    assert len(runs) == 3 and not broken and len(notes) == 1 and "bn_4" in notes[0] and "metrics.csv" in notes[0]
    assert main([str(folder)]) == 0 and "note: bn_4" in capsys.readouterr().out


def test_nothing_to_report(tmp_path, folder, capsys):
    (empty := tmp_path / "empty").mkdir()
    for path, says in ((empty, "no run to report"), (tmp_path / "typo", "no folder"), (folder / "bn_4", "parent")):
        with pytest.raises(UserError, match=says):
            read_runs(path)
        with pytest.raises(SystemExit, match="2"):
            main([str(path)])
        out, err = capsys.readouterr()
        assert not out and err.startswith("agcseg-report: error: ") and err.count("\n") == 1
        assert "agcseg-train -m experiment=demo" in err or says == "parent"


def test_files_written(folder):
    paths, _ = write_report(folder)
    assert sorted(p.name for p in paths) == [
        "figure.png", "forest.png", "predictions.png", "report.csv", "report.html", "report.md",
    ]  # fmt: skip
    assert not [p for p in folder.iterdir() if p.is_file() and p not in paths]  # no temporary files
    with open(folder / "report.csv", newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert float(rows["agc_4"]["mean_error_last5"]) == pytest.approx(0.152) and rows["bn_1"]["final_error"] == ""
    markdown = (folder / "report.md").read_text()
    assert "| agc_4 | finished | 7 | 20.00% | 15.20% | 10.00% | 4 | 21.00% | 80.00% | 0.400 |" in markdown
    assert (
        "| AGC | 4 | 0.08 | 1 |" in markdown and "4 runs with one seed: SegNet, width 0.25, streets, 64x128" in markdown
    )
    assert "bn_1 diverged: the loss is nan" in markdown
    with Image.open(folder / "predictions.png") as picture:
        assert picture.size == (1200, 36 + 2 * (150 + 30))  # 512x64 at 1200 pixels width, under a caption, for two runs


def ink(path):
    with Image.open(path) as picture:
        return picture.size, np.asarray(picture.convert("RGB")).reshape(-1, 3)


def drawn(runs):
    groups, _ = by_setting(runs)
    return figure(groups, reference_of(groups))


def test_figure_has_a_panel_for_each_norm_where_only_minibatch_and_rate_differ(folder, tmp_path):
    runs = read_runs(folder)
    axes = drawn(runs).axes
    assert [axis.get_title("left") for axis in axes[:4]] == [
        "Batch normalisation: validation pixel error, %", "AGC: validation pixel error, %",
        "Batch normalisation: validation loss", "AGC: validation loss",
    ]  # fmt: skip
    assert axes[0].get_ylim() == axes[1].get_ylim()
    fig = drawn(runs)
    fig.savefig(tmp_path / "all.png")
    _, pixels = ink(tmp_path / "all.png")
    for colour in ((0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73)):
        assert (pixels == colour).all(axis=1).sum() > 20
    assert len(drawn([run for run in runs if run.minibatch == 4]).axes) == 4  # two curves: one panel, not one each


def test_figure_of_several_seeds_twins_networks_and_nothing_measured(tmp_path):
    for seed in range(3):
        make_run(tmp_path, f"bn_s{seed}", [0.5, 0.4], seed=seed)
    make_run(tmp_path, "twin", [0.6, 0.5], "agc")
    make_run(tmp_path, "twin_b", [0.6, 1e9], "agc", state="diverged")
    make_run(tmp_path, "lost", [math.nan, math.inf], "group", state="diverged")
    make_run(tmp_path, "new", [], "other", state="unfinished")
    runs = read_runs(tmp_path)
    assert [run.norm for run in runs] == ["bn"] * 3 + ["agc"] * 2 + ["group", "other"]
    drawn(runs).draw_without_rendering()
    for run in runs[-2:]:
        drawn([run]).draw_without_rendering()
    write_report(tmp_path)
    assert "not compared, since twin" in (tmp_path / "report.md").read_text()


def test_title_names_the_data():
    fields = dict.fromkeys(Run.__dataclass_fields__)
    run = Run(**fields | {"network": "segnet", "width": 0.25, "data": "streets", "size": (64, 128), "epochs": 10})
    assert run.title == "SegNet, width 0.25, streets 64x128, 10 epochs"
    run.data = "cityscapes"
    assert run.title == "SegNet, width 0.25, Cityscapes 64x128, 10 epochs"


def test_program_prints_the_table(folder, capsys):
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == f"{folder}: 1 diverged, 2 finished, 1 unfinished"
    assert lines[1].startswith(
        "4 runs with one seed: SegNet, width 0.25, streets, 64x128, 10 epochs. 4 settings, which"
    )
    assert "Not all finished: 1 diverged, 1 unfinished." in lines[1] and "One seed does not say" in lines[1]
    assert "Pixel error of SegNet at epoch 3: AGC 20.0 %, BN 50.0 %." in lines[1]
    assert lines[-1] == f"tensorboard --logdir {folder}"
    assert f"wrote {folder / 'figure.png'}" in lines and "note: bn_1 diverged: the loss is nan" in lines
    (row,) = [line.split() for line in lines if line.split()[:2] == ["AGC", "4"]]
    assert row[:5] == ["AGC", "4", "0.08", "1", "20.0"]


def test_runs_that_learnt_nothing_are_named(tmp_path):
    for seed, errors in enumerate(([0.7, 0.3], [0.7, 0.6], [0.6, 0.8])):
        make_run(tmp_path, f"agc{seed}", errors, "agc", seed=seed)
        make_run(tmp_path, f"bn{seed}", [0.7, 0.59], seed=seed)
    make_run(tmp_path, "bn3", [0.9, math.nan], seed=3, state="diverged")
    write_report(tmp_path)
    said = "Runs that were never better, and learnt nothing, but count in the means: AGC (2 of 3)."
    assert said in (tmp_path / "report.md").read_text()


def test_program_help_and_imports(folder, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "agcseg-report outputs/demo" in out and "\nexamples:\n" in out
    check = (
        "import agcseg.report, sys; print([m for m in ('hydra', 'matplotlib.pyplot') if m in sys.modules]); "
        "import agcseg.cli.train; print([m for m in ('torchvision', 'torch._dynamo') if m in sys.modules])"  # slow ones
    )
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stdout == "[]\n[]\n"


def blocks_of(page):
    """Tags that are opened and not closed, and the sources of the pictures, of an HTML page."""

    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.sources, self.tags = [], [], []

        def handle_starttag(self, tag, attributes):
            self.tags.append(tag)
            self.sources += [value for key, value in attributes if key in ("src", "href")]
            if tag not in ("meta", "img"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    reader = Reader()
    reader.feed(page)
    return reader


def test_report_of_figure1(tmp_path, capsys):
    folder = make_figure1(
        tmp_path / "figure1", seeds=(1, 2), runs=[run for run in RUNS if run.rate != 0.32], epochs=12,
        diverged=lambda of, seed: of.rate == 0.64, reached=lambda of, seed: 9 if of.minibatch == 1 else 12,
    )  # fmt: skip
    picture = np.random.default_rng(0).integers(255, size=(128, 4 * 258, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "segnet-bn-mb4-lr0.08-seed1" / "predictions.png")
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        "figure1.png", "forest.png", "lambda.png", "predictions.png", "report.csv", "report.html", "report.md",
    ]  # fmt: skip
    lines = [line for line in out.splitlines() if line.startswith("claim ")]
    assert len(lines) == 7 and lines[0].startswith("claim 1: AGC equals batch normalisation (BN) in final error: ")
    assert lines[2].endswith(": not enough data")

    page, text = ((folder / name).read_text() for name in ("report.html", "report.md"))
    reader = blocks_of(page)
    assert not reader.open and "script" not in reader.tags and 'name="viewport"' in page
    assert len(reader.sources) == 4 and all(source.startswith("data:image/") for source in reader.sources)
    sizes = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).size for source in reader.sources]
    for size, name in zip(sizes, ("figure1.png", "predictions.png", "forest.png", "lambda.png"), strict=True):
        with Image.open(folder / name) as there:
            assert there.size == size and f"]({name})" in text
    assert '<td class="not-enough-data"><b>not enough data' in page and '<td class="supported"><b>supported' in page
    for content in (page, text):
        assert "11 of the 12 settings of Figure 1 are there" in content and "Cityscapes, 256x512, 150 epochs" in content
        assert "needs SegNet AGC, minibatch 8, rate 0.32" in content
        assert "segnet-agc-mb8-lr0.64-seed2 diverged: the loss became nan" in content
    panel = {line.split(" | ")[1]: line.split(" | ") for line in text.splitlines() if line.startswith("| h | ")}
    assert panel["SegNet AGC, minibatch 8, rate 0.32"][2:5] == ["0", "12", "no run"]
    assert panel["SegNet AGC, minibatch 8, rate 0.64"][4] == "2 diverged"
    assert "| d | ClassNet AGC, minibatch 4, rate 0.08 | 2 | 12 | " in text and " | 5.34% |" in text
    assert "| a | SegNet BN, minibatch 4, rate 0.08 | 2 | 9 | " in text  # where minibatch 1 has come to
    runs = {run.name: run for run in read_runs(folder)}
    both = [100 * runs[f"segnet-bn-mb4-lr0.08-seed{seed}"].at("pixel_error", 9) for seed in (1, 2)]
    assert f"| 2 | 9 | {np.mean(both):.2f}% ({min(both):.2f}% to {max(both):.2f}%) | 9.57% |" in text


def test_with_a_reference_it_is_no_figure1(tmp_path):
    make_figure1(tmp_path, seeds=(1,), runs=RUNS[:7], epochs=2)
    for reference, name in ((None, "figure1.png"), ("AGC, minibatch 4, rate 0.08", "figure.png")):
        paths, content = write_report(tmp_path, reference=reference)
        assert paths[0].name == name and content["alike"] == bool(reference)


def test_figure1_shows_what_is_there_and_names_what_is_not(tmp_path):
    make_figure1(tmp_path, seeds=(1, 2), runs=RUNS[:6], epochs=12, noise=0.5)
    kept, _ = cells(read_runs(tmp_path))
    axes = figure1(kept).axes
    texts = ["\n".join(text.get_text() for text in axis.texts) for axis in axes]
    lines = [[line for line in axis.lines if len(line.get_xdata())] for axis in axes]
    assert [len(drawn) for drawn in lines] == [3, 2, 2, 0, 2, 0, 2, 0]
    assert "no run" not in texts[0] and texts[1].endswith("no run of\nSegNet AGC, minibatch 8, rate 0.16")
    assert (
        texts[3].strip()
        == texts[5].strip()
        == "no run of\nClassNet BN, minibatch 4, rate 0.08\nClassNet AGC, minibatch 4, rate 0.08"
    )
    assert axes[0].get_ylim() == axes[1].get_ylim() and axes[0].get_xlim() == (0.5, 12.5)
    runs = [kept[RUNS[1]][seed] for seed in (1, 2)]
    both = 100 * np.array([run.column("pixel_error") for run in runs])
    (mean,) = [line for line in lines[2] if line.get_label().startswith("BN: ")]
    assert mean.get_ydata() == pytest.approx(both.mean(0)) and mean.get_label().endswith(
        f"{both[:, -1].mean():.1f} %, 2 seeds"
    )
    band = axes[2].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((both.min(), both.max()))
    legend = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert legend[0].startswith("minibatch 1, rate 0.02: ") and len(legend) == 3


def test_a_spike_does_not_squash_the_scale(tmp_path):
    make_figure1(tmp_path, seeds=(1,), runs=RUNS[:2], epochs=30)
    kept, _ = cells(read_runs(tmp_path))
    before = figure1(kept).axes[0].get_ylim()
    kept[RUNS[0]][1].metrics.loc[21, "pixel_error"] = 9.9
    axis = figure1(kept).axes[0]
    assert axis.get_ylim() == pytest.approx(before, abs=5)
    assert "off the scale: up to 990" in [text.get_text() for text in axis.texts]


def test_lambda_figure(tmp_path):
    make_figure1(tmp_path, seeds=(1,), runs=RUNS[5:6] + RUNS[-1:], epochs=6)
    runs = read_runs(tmp_path)
    axes = lambda_figure(runs).axes
    (left,) = [axis for axis in axes if "encoder.0.0" in [text.get_text() for text in axis.get_yticklabels()]][:1]
    dots = left.collections[-1].get_offsets()
    segnet = next(run for run in runs if run.network == "segnet")
    assert dots[:, 0].tolist() == pytest.approx(segnet.layers["lambda_mean"].iloc[-1].tolist())
    meshes = [axis.collections[0].get_array() for axis in axes if axis.get_title() == "mean λ over the epochs"]
    assert [mesh.shape for mesh in meshes] == [(10, 7), (10, 7)] and np.allclose(meshes[0][:, 0], 1)


def test_epochs_until_the_other_is_reached(tmp_path):
    make_run(tmp_path, "bn", [0.5, 0.4, 0.3])
    make_run(tmp_path, "agc", [0.3, 0.25, 0.2], "agc")
    make_run(tmp_path, "bn1", [0.5], minibatch=1, state="diverged")
    make_run(tmp_path, "agc1", [0.5, 0.4], "agc", minibatch=1, state="unfinished")
    kept, _ = cells(read_runs(tmp_path))
    assert reached_table(kept).values.tolist() == [
        ["SegNet", "1", "0.02", "0", "diverged", "", "40.00% at epoch 2", "not in 1 epochs"],
        ["SegNet", "4", "0.08", "0", "30.00%", "epoch 1", "20.00%", "not in 3 epochs"],
    ]


def test_older_runs_have_a_report_without_what_they_lack(tmp_path, capsys):
    folder = make_figure1(tmp_path / "figure1", seeds=(1,), runs=RUNS[:6], epochs=4, old=True)
    assert main([str(folder)]) == 0
    assert not (folder / "lambda.png").exists()
    text = (folder / "report.md").read_text()
    for needed in ("steps.npy", "layers.csv"):
        assert f"needs {needed} of segnet-" in text


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("steps.npy", b"no numbers", "steps.npy: "),
        ("steps.npy", {"a": np.zeros(3)}, "holds several arrays"),
        ("steps.npy", np.zeros(3), "expected numbers of shape (epochs, steps, parts)"),
        ("layers.csv", b"epoch,layer\n", "expected the columns"),
        ("layers.csv", lambda lines: lines[:-1], "layers in each of 5 epochs, found 49 rows"),
        ("layers.csv", lambda lines: [*lines, lines[-1]], "layers in each of 5 epochs, found 51 rows"),
        ("layers.csv", lambda lines: lines[:1] + lines[11:], "layers in each of 5 epochs, found 40 rows"),
        ("images.csv", b"image,wrong_pixels,labelled_pixels,loss\nx,1\n", "line 2"),
        ("images.csv", b"image,wrong_pixels,labelled_pixels,loss\nx,1,2,b\n", "line 2: could not"),
    ],
)
def test_a_run_without_its_broken_extras_is_still_reported(tmp_path, capsys, name, content, says):
    make_figure1(tmp_path, seeds=(1,), runs=RUNS[5:6], epochs=4)
    (path,) = tmp_path.iterdir()
    if callable(content):
        content = "\n".join(content((path / name).read_text().splitlines())).encode()
    if isinstance(content, bytes):
        (path / name).write_bytes(content)
    elif isinstance(content, dict):
        with open(path / name, "wb") as file:
            np.savez(file, **content)
    else:
        np.save(path / name, content)
    (run,), (line,), notes = read_folders(tmp_path)
    assert line.startswith(f"{path / name}: ") and says in line and not notes
    assert getattr(run, name.partition(".")[0]) is None and run.last_epoch == 4


def test_margin_of_the_program(tmp_path, capsys):
    folder = make_figure1(tmp_path / "a", seeds=(1, 2), runs=RUNS[1:2] + RUNS[5:6], epochs=4, noise=0.01, name="pair")
    assert main([str(folder), "--margin", "2"]) == 0
    assert "| within ±2 |" in (folder / "report.md").read_text()
    before = (folder / "report.md").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main([str(folder), "--margin", "0"])
    out, err = capsys.readouterr()
    assert not out and err.startswith("agcseg-report: error: margin 0: must be positive") and err.count("\n") == 1
    assert (folder / "report.md").read_bytes() == before


def test_several_folders(tmp_path, capsys):
    make_run(tmp_path / "a", "bn", [0.5, 0.4])
    make_run(tmp_path / "b", "agc", [0.5, 0.3], "agc")
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert f"wrote {tmp_path / 'a+b' / 'report.html'}" in capsys.readouterr().out
    assert "claim" in (tmp_path / "a+b" / "report.md").read_text() and not (tmp_path / "a" / "report.md").exists()
    make_run(tmp_path / "b", "bn", [0.5, 0.45])  # now both hold the same run: the folder tells them apart
    runs = read_runs(tmp_path / "a", tmp_path / "b")
    assert sorted(run.name for run in runs) == ["a/bn", "b/agc", "b/bn"]
    groups, notes = by_setting(runs)
    assert [*groups] == ["BN, folder a", "BN, folder b", "AGC, folder b"] and not notes
    with pytest.raises(UserError, match="no folder"):
        read_runs(tmp_path / "a", tmp_path / "c")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    capsys.readouterr()
    assert main([str(tmp_path / "a"), f"{tmp_path}/a/../a/", str(tmp_path / "link")]) == 0
    assert "1 finished\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(make_run(tmp_path / f"{i:0200}", "bn", [0.5]).parent) for i in range(2)])
    assert "2 folders: say where their report goes, with --out FOLDER" in capsys.readouterr().err


def test_a_run_made_twice_in_one_folder_is_no_twin_of_folders(tmp_path):
    for name in ("run", "run-2"):
        make_run(tmp_path / "bn", name, [0.5, 0.4])
    make_run(tmp_path / "agc", "run", [0.5, 0.3], "agc")
    groups, notes = by_setting(read_runs(tmp_path / "bn", tmp_path / "agc"))
    assert [*groups] == ["BN", "AGC"] and notes == [
        "not compared, since bn/run has the same settings and seed: bn/run-2"
    ]


def test_of_several_folders_one_without_runs_is_noted(tmp_path, capsys):
    make_run(tmp_path / "a", "bn", [0.5, 0.4])
    make_run(tmp_path / "b", "agc", [0.5, 0.3], "agc")
    for _ in range(2):  # what the first report is written into has no runs
        assert main([str(path) for path in sorted(tmp_path.iterdir())]) == 0
        out = capsys.readouterr().out
    assert f"note: no run to report in {tmp_path / 'a+b'}: looked for " in out and "2 finished" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a+b", "b"]
    (tmp_path / "c").mkdir()
    assert main([str(tmp_path / "a"), str(tmp_path / "c")]) == 0 and (tmp_path / "a/report.md").is_file()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "a+b"), str(tmp_path / "c")])
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.count("no run to report") == 2 and "experiment=demo" in err
    with pytest.raises(UserError, match="single run: give its parent"):
        read_runs(tmp_path / "a/bn", tmp_path / "c")
    with pytest.raises(UserError, match=f"give one of the folders in it that hold runs: {tmp_path / 'a'}, "):
        read_runs(tmp_path)


def test_what_runs_were_made_with(tmp_path):
    for number in range(3):
        path = make_run(tmp_path, f"run{number}", [0.5], seed=number)
        about = {"commit": "abc" if number else "def", "command": f"run {number}", "packages": {"numpy": "2.0"}}
        (path / "environment.json").write_text(json.dumps(about))
    make_run(tmp_path, "old", [0.5], seed=7)
    table = environment_table(read_runs(tmp_path))
    assert table.values.tolist() == [["commit", "abc (2 runs); def (1 runs)"]]
    (path / "environment.json").write_text("[")
    assert "environment.json: " in read_folders(tmp_path)[1][0]


def test_a_record_of_what_never_got_on(tmp_path):
    make_run(tmp_path / "runs", "bn", [])
    (tmp_path / "runs/bn/metrics.csv").unlink()
    for arguments in (["runs", "record"], ["--unpack", "record", "again"], ["--unpack", "runs", "again"]):
        done = subprocess.run(
            [sys.executable, ROOT / "scripts/record", *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        assert "Traceback" not in done.stderr
    assert done.returncode == 1 and "runs is no record, it holds no runs.json" in done.stderr
    assert (tmp_path / "again/bn/config.yaml").is_file()


def test_a_record_makes_the_same_report_again(tmp_path):
    folder = make_figure1(tmp_path / "a" / "runs", seeds=(1, 2), runs=RUNS[1:2] + RUNS[5:6], epochs=12)
    about = {"command": "/opt/bin/agcseg-train 'a=[1]'", "packages": {"torch": "2.9", "elsewhere": "1.0"}}
    for run in folder.glob("*/"):
        (run / "environment.json").write_text(json.dumps(about))
    record, again = tmp_path / "record", tmp_path / "b" / "runs"
    for arguments in ([folder, record], ["--unpack", record, again], [again, tmp_path / "twice"]):
        subprocess.run([sys.executable, ROOT / "scripts/record", *arguments], check=True)
    for path in record.iterdir():
        assert path.suffix == ".npz" or path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes()
    kept = {path.read_text() for path in again.glob("*/environment.json")}
    assert kept == {json.dumps({"command": "agcseg-train 'a=[1]'", "packages": {"torch": "2.9"}})}
    write_report(folder)
    write_report(again)
    for name in ("report.md", "report.csv"):
        assert (folder / name).read_text() == (again / name).read_text()
    assert not [*record.glob("**/*.png")]
    some = [sys.executable, ROOT / "scripts/record", "--unpack", record, tmp_path / "some"]
    subprocess.run([*some, "*-seed2*"], check=True)
    assert {path.name for path in (tmp_path / "some").iterdir()} == {run.name for run in again.glob("*-seed2*")}
    for run in (tmp_path / "some").iterdir():
        assert all(path.read_bytes() == (again / run.name / path.name).read_bytes() for path in run.iterdir())
    about |= {"command": "/opt/lib/agcseg/cli/train.py norm=bn", "system": "Linux-6.1-mine"}
    for run in again.glob("*/"):
        (run / "environment.json").write_text(json.dumps(about))
    subprocess.run([sys.executable, ROOT / "scripts/record", again, tmp_path / "third"], check=True)
    made_with = [run["environment"] for run in json.loads((tmp_path / "third/runs.json").read_text()).values()]
    assert {(one["command"], one["system"]) for one in made_with} == {("agcseg-train norm=bn", "Linux")}
    none = subprocess.run([*some, "nothing-*"], capture_output=True, text=True)
    assert none.returncode == 1 and f"no run nothing-* in {record}" in none.stderr
