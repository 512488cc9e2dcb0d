"""What may be wrong with data, disk and pipes, and what the programs say."""

import logging
import os

import numpy as np
import pytest
from PIL import Image
from test_data import LAYOUT, write_camvid, write_cityscapes
from test_folder import configured, data_of, write_folder
from test_trained import ended

import agcseg
from agcseg.cli import eval as eval_program
from agcseg.cli import export as export_program
from agcseg.cli import predict as predict_program
from agcseg.cli.data import DataProgram, inspect
from agcseg.config import DataConfig
from agcseg.data import open_data, streets_root
from agcseg.data.cache import open_cache
from agcseg.data.labels import CITYSCAPES
from agcseg.data.layout import check as check_samples
from agcseg.data.layout import list_samples, load
from agcseg.errors import UserError
from agcseg.networks import segnet
from agcseg.training.run import run


def train_ids(label):
    return CITYSCAPES.lookup()[label]


def quantised(label):
    return np.asarray(Image.fromarray(label).quantize(2))


def through_jpeg(label):
    buffer = Image.fromarray(label)
    buffer.save("label.jpg", quality=60)
    return np.asarray(Image.open("label.jpg"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (train_ids, r"holds class numbers \(training ids\), expected the label ids"),
        (quantised, "contradicts its instances|holds numbers that are no labels"),
        (through_jpeg, "contradicts its instances: one of the two|holds numbers that are no labels"),
        (lambda label: label[::-1], "contradicts its instances: one of the two belongs to another image"),
        (lambda label: np.where(np.arange(64)[:, None] < 4, 7, label).astype(np.uint8), "contradicts .* or edited"),
    ],
)
def test_labels_that_contradict_their_instances(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    (sample,) = list_samples(LAYOUT, write_cityscapes(tmp_path / "data"), "val")
    Image.fromarray(change(np.array(Image.open(sample.label)))).save(sample.label)
    (problem,) = check_samples([sample], LAYOUT)[0]
    assert str(problem).startswith(str(sample.label))
    with pytest.raises(UserError, match=message):
        load(sample, LAYOUT)


def test_exchanged_label_files_are_named(tmp_path):
    one, other = list_samples(LAYOUT, write_cityscapes(tmp_path), "train")
    one.label.rename(tmp_path / "away")
    other.label.rename(one.label)
    (tmp_path / "away").rename(other.label)
    problems = check_samples([one, other], LAYOUT)[0]
    assert len(problems) == 2 and all("belongs to another image" in str(problem) for problem in problems)


def test_instances_are_needed_by_networks_with_a_contour_only(tmp_path, caplog):
    root = write_cityscapes(tmp_path / "data")
    for path in [*root.glob("gtFine/*/*/*_instanceIds.png")][:2]:
        path.unlink()
    assert [sample.instance for sample in list_samples(LAYOUT, root, "train")] == [None, None]
    with pytest.raises(UserError, match="instanceIds.png: missing .it comes with gtFine"):
        list_samples(LAYOUT, root, "train", instances=True)
        list_samples(LAYOUT, root, "val", instances=True)
    for path in root.glob("gtFine/*/*/*_instanceIds.png"):
        path.unlink()
    small = LAYOUT._replace(expected={"train": 5, "val": 1})
    for wanted, problems in ((None, 0), (2, 0), (3, 1)):
        data = DataConfig("cityscapes", str(root), str(tmp_path), [32, 64], wanted, None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(agcseg.data.LAYOUTS, "cityscapes", small)
            assert inspect(DataProgram(data, build=False)) == problems, wanted
    assert "none with instances, which networks that find contours need" in caplog.text
    assert "a part of Cityscapes; that is enough for data.train_images=2" in caplog.text
    assert "train: 2 complete samples, data.train_images=3 asks for more" in caplog.text


def test_too_few_images_are_noticed_before_anything_is_cached(tmp_path):
    root = write_camvid(tmp_path / "data")
    data = DataConfig("camvid", str(root), str(tmp_path / "cache"), [32, 64], 4, None)
    with pytest.raises(UserError, match=f"data.train_images=4: there are 3 train images in {root}"):
        open_data(data)
    assert not (tmp_path / "cache").exists()


def test_archives_in_folders_of_their_own(tmp_path):
    root = write_cityscapes(tmp_path / "data")
    for archive, folder in (("images", "leftImg8bit"), ("labels", "gtFine")):
        (root / archive).mkdir()
        (root / folder).rename(root / archive / folder)
    with pytest.raises(
        UserError, match=f"no such folder .* but there is {root}/images/leftImg8bit/train: data.root must"
    ):
        list_samples(LAYOUT, root, "train")
    with pytest.raises(UserError, match=f"but there is {root}/images/leftImg8bit/train"):
        list_samples(LAYOUT, root / "images/leftImg8bit", "train")


def test_streets_are_made_in_an_empty_folder(tmp_path, caplog):
    (tmp_path / "x").mkdir()
    data = DataConfig("streets", str(tmp_path / "x"), str(tmp_path / "cache"), [32, 64], None, None)
    data.streets.train = data.streets.val = 1
    data.streets.size = [64, 128]
    assert inspect(DataProgram(data, build=False)) == 0 and len([*(tmp_path / "x").rglob("*.png")]) == 6


def test_nobody_listens(tmp_path, monkeypatch, capfd):
    """agcseg-eval RUN | head -1"""
    root = write_folder(tmp_path / "data")
    run(configured(root), tmp_path / "run")
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert ended(eval_program, tmp_path / "run") == 0
        monkeypatch.undo()
    assert "Traceback" not in capfd.readouterr().err and (tmp_path / "run/eval-folder-val-training.json").exists()


@pytest.mark.parametrize("kind", ["image", "label"])
def test_links_to_nothing_are_named(tmp_path, kind):
    layout, root = LAYOUT._replace(instances=None), write_cityscapes(tmp_path / "data")
    for sample in list_samples(layout, root, "train"):
        getattr(sample, kind).unlink()
        getattr(sample, kind).symlink_to(tmp_path / "nowhere.png")
    samples = list_samples(layout, root, "train")
    with pytest.raises(UserError, match="2 files of Cityscapes cannot be used:\n .*: missing, a link to nothing\n"):
        open_cache(layout, samples, (32, 64), tmp_path / "cache", "train")
    assert all("a link to nothing" in str(problem) for problem in check_samples(samples, layout)[0])


def test_what_a_killed_process_left_of_the_streets_is_removed(tmp_path):
    part = tmp_path / ".streets1-1+1-64x128-seed0.partial-1"
    part.mkdir()
    root = streets_root(tmp_path, 1, 1, (64, 128), 0, lambda line: None)
    assert root.is_dir() and not part.exists() and not [*tmp_path.glob("*.tmp")]


def test_a_log_whose_reader_is_gone_is_no_traceback(tmp_path, monkeypatch, capfd):
    """agcseg-data ... | head -1"""
    root = write_folder(tmp_path / "data")
    ours, theirs = os.pipe()
    os.close(ours)
    log, closed = logging.getLogger("agcseg"), os.fdopen(theirs, "w")
    handler = logging.StreamHandler(closed)
    log.addHandler(handler)
    try:
        assert inspect(DataProgram(data_of(root))) == 0
    finally:
        log.removeHandler(handler)
        with pytest.raises(BrokenPipeError):
            closed.close()
    assert "Traceback" not in capfd.readouterr().err


def test_an_error_without_a_file_gets_one(tmp_path, monkeypatch, capsys):
    """A full disk names no file; the programs do, and exit with 2."""
    monkeypatch.setattr(segnet, "STAGES", segnet.STAGES[:1])  # exporting all takes its time
    root = write_folder(tmp_path / "data")
    run(configured(root), tmp_path / "run")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    arguments = {
        eval_program: [f"output={tmp_path}"],
        predict_program: [f"input={root}/images/val", f"output={tmp_path}/out"],
        export_program: ["format=torch", f"output={tmp_path}/network.pt2"],
    }
    for program, given in arguments.items():
        assert ended(program, tmp_path / "run", *given) == 2
        said = capsys.readouterr().err
        assert str(tmp_path) in said and "No space left on device" in said and said.count("\n") == 1, said
    assert not [path for path in tmp_path.rglob(".*") if path.is_file() and path.name != ".lock"]
