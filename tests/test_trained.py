"""Trained networks in use: reading them, evaluating them, predicting pictures. Two tiny runs serve all tests."""

import dataclasses
import io
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import agcseg
from agcseg.cli import eval as eval_program
from agcseg.cli import predict as predict_program
from agcseg.config import Config, DataConfig, NetworkConfig, RateConfig
from agcseg.data import LAYOUTS
from agcseg.data.labels import Classes
from agcseg.data.layout import Sample, list_samples
from agcseg.data.layout import load as load_sample
from agcseg.data.minibatches import normalise
from agcseg.errors import UserError
from agcseg.evaluate import confusion_figure, evaluate, intervals
from agcseg.predict import find_images
from agcseg.trained import logits, prediction, start_from
from agcseg.training.run import run

TWO_CLASSES = Classes(("cat", "dog"), ((0, 0, 0), (255, 255, 255)), {0: 0, 1: 1})


@pytest.fixture(scope="module")
def runs(streets, tmp_path_factory):
    """Folders of a SegNet's run and a ClassNet's."""
    folder = tmp_path_factory.mktemp("runs")
    for network, size in (("segnet", [32, 64]), ("classnet", [128, 128])):
        data = DataConfig("streets", str(streets), str(folder / "cache"), size, None, None)
        made = NetworkConfig(network, width=0.05, init="he_centered")
        run(Config(network=made, data=data, minibatch=2, epochs=1, device="cpu"), folder / network)
    return folder


def changed(runs, tmp_path, **values):
    """A copy of SegNet's checkpoint with other content."""
    saved = torch.load(runs / "segnet/last.pt", weights_only=True)
    torch.save({**saved, **values}, tmp_path / "changed.pt")
    return tmp_path / "changed.pt"


def ended(program, *arguments):
    """Exit code of a program, however it ends."""
    try:
        return program.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("name", ["segnet", "classnet"])
def test_load(runs, name):
    trained = agcseg.load(runs / name)
    assert not any(module.training for module in trained.network.modules())
    saved = torch.load(runs / name / "last.pt", weights_only=True)
    loaded = trained.network.state_dict()
    assert all(torch.equal(loaded[key], saved["network"][key]) for key in saved["network"])
    assert trained.classes.names[0] == "road" and trained.classes.palette()[0].tolist() == [128, 64, 128]
    assert trained.epoch == 1 and trained.config.network.name == name and trained.config.minibatch == 2
    network, classes, *_ = agcseg.load(str(runs / name / "last.pt"))
    assert len(classes) == 19 and len(list(network.parameters())) == len(list(trained.network.parameters()))


def test_a_checkpoint_older_than_a_key_is_read(runs, tmp_path):
    config = torch.load(runs / "segnet/last.pt", weights_only=True)["config"]
    del config["contour"]
    assert agcseg.load(changed(runs, tmp_path, config=config)).config.contour.band == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"classes": ["cat", "dog"]}, "was written by another version of agcseg"),
        ({"classes": TWO_CLASSES.to_dict()}, "its weights do not fit its configuration's segnet: size mismatch"),
        ({"normalisation": {"mean": [0.5] * 3, "std": [1.0] * 3}}, "its images were normalised by"),
        (
            {"network": {"conv.weight": torch.zeros(1)}},
            "its weights do not fit its configuration's segnet: Missing key",
        ),
        ({"config": {"made_up": 1}}, "was written by another version of agcseg"),
        ({"config": {"network": {"name": "unet"}}}, "network='unet' is not known; choose from segnet, classnet"),
    ],
)
def test_what_does_not_fit_is_refused(runs, tmp_path, values, message):
    with pytest.raises(UserError) as error:
        agcseg.load(changed(runs, tmp_path, **values))
    assert message in str(error.value) and "\n" not in str(error.value) and "changed.pt" in str(error.value)


def test_what_is_no_checkpoint_is_refused(runs, tmp_path):
    (tmp_path / "last.pt").write_text("weights")
    torch.save({"network": {}}, tmp_path / "bare.pt")
    (tmp_path / "nothing.pt").touch()
    (tmp_path / "cut.pt").write_bytes((runs / "segnet/last.pt").read_bytes()[:3000])
    (tmp_path / "table.csv").write_text("epoch,samples\n1,8\n")
    torch.save({"network": None, "config": {}}, tmp_path / "other.pt")
    (tmp_path / "empty").mkdir()
    for path, message in (
        *((tmp_path / name, "it is empty, cut off, or not written") for name in ("nothing.pt", "cut.pt", "table.csv")),
        (tmp_path / "other.pt", "is not a checkpoint of agcseg"),
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path / "empty", "holds no last.pt"),
        (runs, f"holds 2 runs; give one of them, such as\n  {runs / 'classnet'}"),
        (tmp_path, "cannot be read as a checkpoint"),
        (tmp_path / "bare.pt", "it lacks config, classes, normalisation, epoch"),
    ):
        with pytest.raises(UserError) as error:
            agcseg.load(path)
        assert message in str(error.value) and str(path) in str(error.value)
        assert "weights_only" not in str(error.value)  # torch's advice to trust the file


@pytest.mark.parametrize("name", ["segnet", "classnet"])
def test_evaluation_at_training_size_is_the_runs(runs, name, capsys):
    assert ended(eval_program, runs / name, "minibatch=2") == 0
    assert "mIoU" in capsys.readouterr().out
    figures = json.loads((runs / name / "eval-streets-val-training.json").read_text(), parse_constant=pytest.fail)
    result = json.loads((runs / name / "result.json").read_text())
    same = ["pixel_error", "pixel_error_all", "miou"] + ["contour_iou", "contour_f"] * (name == "classnet")
    assert {key: figures[key] for key in same} == pytest.approx({key: result[key] for key in same}, abs=1e-6)
    assert figures["images"] == 4 and sum(map(sum, figures["confusion"])) > 0.9 * 4 * math.prod(
        figures["training_size"]
    )
    low, high = figures["pixel_error_interval"]
    assert low <= figures["pixel_error"] <= high and low < high
    with Image.open(runs / name / "eval-streets-val-training.png") as picture:
        assert min(picture.size) > 500


def test_evaluation_of_another_folder_replaces_nothing(runs, streets, tmp_path):
    other = tmp_path / "other-streets"
    other.symlink_to(streets)
    for arguments in ([], [f"data.root={streets}"], [f"data.root={other}"]):  # a link is the same folder
        assert ended(eval_program, runs / "segnet", f"output={tmp_path / 'same'}", *arguments) == 0
    assert len(list((tmp_path / "same").glob("*"))) == 2
    other.unlink()
    shutil.copytree(streets, other)
    assert ended(eval_program, runs / "segnet", f"output={tmp_path / 'same'}", f"data.root={other}") == 0
    figures = json.loads((tmp_path / "same/segnet-eval-streets-other-streets-val-training.json").read_text())
    assert figures["root"] == str(other) and len(list((tmp_path / "same").glob("*"))) == 4


def test_evaluation_of_another_folder_with_the_data_sets_name_replaces_nothing(runs, streets, tmp_path):
    shutil.copytree(streets, tmp_path / "other/streets")  # the run's own is called streets too, and is still there
    for root in (streets, tmp_path / "other/streets"):
        assert ended(eval_program, runs / "segnet", f"output={tmp_path / 'out'}", f"data.root={root}") == 0
    names = {path.name for path in (tmp_path / "out").glob("*.json")}
    assert names == {"segnet-eval-streets-val-training.json", "segnet-eval-streets-streets-val-training.json"}


def test_evaluation_of_a_few_images_does_not_replace_that_of_all(runs, tmp_path):
    for arguments in ([], ["images=2"]):
        assert ended(eval_program, runs / "segnet", f"output={tmp_path}", *arguments) == 0
    for name, images in (("training", 4), ("training-2images", 2)):
        figures = json.loads((tmp_path / f"segnet-eval-streets-val-{name}.json").read_text())
        assert figures["images"] == images and figures["run"].endswith("segnet/last.pt")  # others may lie beside it


def test_evaluation_of_a_run_that_diverged_later_says_so(runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs / "segnet", run)
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"state": "diverged", "epochs": 3}))
    assert ended(eval_program, run, "images=1") == 0
    said = "note: the run diverged after epoch 3; its last checkpoint, evaluated here, is of epoch 1"
    assert said in capsys.readouterr().out
    trained = agcseg.load(run)
    for content in (result | {"state": "diverged", "epochs": 1}, result | {"state": "finished", "epochs": 3}, {}, []):
        (run / "result.json").write_text(json.dumps(content))
        assert eval_program._behind(trained) == ""


def test_evaluation_that_cannot_be_written_does_not_start(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_program, "evaluate", lambda *_: pytest.fail("has started"))
    (tmp_path / "file").touch()
    assert ended(eval_program, runs / "segnet", f"output={tmp_path / 'file'}") == 2
    assert f"{tmp_path / 'file'}: cannot be read or written (File exists)" in capsys.readouterr().err
    monkeypatch.setattr(eval_program.os, "access", lambda path, mode: False)  # a colleague's run; root may write it
    assert ended(eval_program, runs / "segnet") == 2
    assert "segnet: cannot be written; give another folder with output=" in capsys.readouterr().err


@pytest.mark.parametrize("program", [eval_program, predict_program])
def test_stopped_by_hand(runs, streets, tmp_path, monkeypatch, capsys, program):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "find_device", stop)
    arguments = [] if program is eval_program else [f"input={streets}", f"output={tmp_path / 'out'}"]
    assert ended(program, runs / "segnet", *arguments) == 130
    assert "stopped" in capsys.readouterr().err


def test_evaluation_at_full_resolution(runs, streets):
    """Against logits resized all at once, and the pixels counted one by one in NumPy."""
    trained, layout = agcseg.load(runs / "segnet"), LAYOUTS["streets"]
    samples = list_samples(layout, streets, "val")
    figures = evaluate(trained, layout, samples, full=True, minibatch=1)
    expected = np.zeros((19, 19), dtype=int)
    for sample in samples:
        image, labels, _ = load_sample(sample, layout)
        small = image.resize((64, 32), Image.Resampling.BILINEAR)
        classes, _ = logits(trained, torch.from_numpy(np.array(small)).permute(2, 0, 1)[None])
        predicted = F.interpolate(classes, labels.shape, mode="bilinear").argmax(1)[0].numpy()
        np.add.at(expected, (labels[labels < 19], predicted[labels < 19]), 1)
    assert figures["confusion"] == expected.tolist() and labels.shape == (64, 128)
    union = expected.sum(0) + expected.sum(1) - expected.diagonal()
    for k, row in enumerate(figures["classes"]):
        assert row["iou"] == (pytest.approx(expected[k, k] / union[k]) if union[k] else None)
    assert figures["miou"] == pytest.approx((expected.diagonal()[union > 0] / union[union > 0]).mean())


def test_intervals():
    generator = np.random.default_rng(0)
    valid = torch.full((200,), 100)
    wrong = torch.from_numpy(generator.integers(0, 60, 200))
    confusions = torch.stack([torch.stack([100 - wrong, wrong]), torch.zeros(2, 200, dtype=torch.int64)]).permute(
        2, 0, 1
    )
    error, miou, of_classes = intervals(wrong, valid, confusions)
    share = (wrong / valid).double().numpy()
    half = 1.96 * share.std(ddof=1) / math.sqrt(200)  # what normal theory gives for a mean
    assert error == pytest.approx([share.mean() - half, share.mean() + half], abs=0.15 * half)
    assert of_classes[0] == pytest.approx([1 - error[1], 1 - error[0]]) and of_classes[1] == [0, 0]
    assert miou == pytest.approx([low / 2 for low in of_classes[0]])
    assert intervals(wrong, valid, confusions) == (error, miou, of_classes)  # seeded
    assert intervals(wrong[:1], valid[:1], confusions[:1]) is None
    unlabelled = torch.cat([valid, torch.zeros(50, dtype=torch.int64)])
    more = torch.cat([confusions, torch.zeros(50, 2, 2, dtype=torch.int64)])
    assert intervals(torch.cat([wrong, torch.zeros(50)]), unlabelled, more) == (error, miou, of_classes)


def test_confusion_figure_of_names_that_are_no_formulas():
    confusion_figure([[1, 0], [0, 1]], ("a$^$", "b"), "$x_$").savefig(io.BytesIO())


def test_confusion_figure_of_a_class_that_does_not_occur():
    texts = confusion_figure([[3, 1], [0, 0]], ("road", "train"), "title").axes[0].texts
    assert [text.get_text() for text in texts] == ["75", "25"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["split=test"], "no such folder"),
        (["split=../train"], "split=../train: must be the name of a folder"),
        (["images=9"], "images=9: there are 4 val images"),
        (["images=0"], "images=0: must be a number, at least 1"),
        (["resolution=half"], "resolution=half: choose from training, full"),
        (["data=kitti"], "data=kitti: choose from cityscapes, camvid, streets, folder"),
        (["data=cityscapes"], "data=cityscapes: give its folder with data.root="),
        (["data_root=/data"], "did you mean data.root"),
        (["device=cuda:9"], "device=cuda:9: cannot be used here"),
        (["images=2", "images=3"], "images=3: images=2 is given too; give one of the two"),
    ],
)
def test_mistakes_in_evaluating(runs, capsys, arguments, message):
    before = sorted((runs / "segnet").iterdir())
    assert ended(eval_program, runs / "segnet", *arguments) == 2
    assert message in capsys.readouterr().err
    assert sorted((runs / "segnet").iterdir()) == before


def test_other_classes_are_refused(runs):
    trained = agcseg.load(runs / "segnet")
    with pytest.raises(UserError, match="tells road, .* apart; CamVid has sky, "):
        evaluate(trained, LAYOUTS["camvid"], [])


def test_a_run_that_starts_from_another(runs, tiny, tmp_path):
    first = agcseg.load(runs / "segnet").network.state_dict()
    run(tiny(init_from=str(runs / "segnet"), lr=RateConfig(value=1e-30), epochs=1), tmp_path / "run")
    start = agcseg.load(tmp_path / "run").network.state_dict()
    assert all(torch.equal(start[key], first[key]) for key in first)
    assert f"weights from {runs / 'segnet/last.pt'}" in (tmp_path / "run/run.log").read_text()
    moved = tiny(init_from=str(runs / "segnet"), lr=RateConfig(value=1e-30), epochs=2)
    (runs / "segnet/last.pt").rename(runs / "segnet/away.pt")  # a continuation does not need it
    try:
        assert run(moved, tmp_path / "run")["epochs"] == 2
        with pytest.raises(UserError, match=r"segnet: holds no last\.pt"):
            run(moved, tmp_path / "another")
    finally:
        (runs / "segnet/away.pt").rename(runs / "segnet/last.pt")


def test_start_from_other_classes(runs):
    for name, new in (("segnet", {"head.weight", "head.bias"}), ("classnet", None)):
        network = agcseg.build(name, width=0.05, num_classes=11)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        said, after = start_from(network, runs / name), network.state_dict()
        saved = agcseg.load(runs / name).network.state_dict()
        for key, value in after.items():
            fits = saved[key].shape == value.shape
            assert torch.equal(value, saved[key] if fits else before[key])
            assert fits != (key in said.split(": ")[1].split(", "))
        assert new is None or new == {key for key in saved if saved[key].shape != after[key].shape}


def test_start_from_as_many_classes_is_of_the_same_widths(runs):
    names = agcseg.load(runs / "classnet").classes.names
    network = agcseg.build("classnet", width=0.05, contour_width=9)
    with pytest.raises(UserError, match=r"is a network of another kind, norm or width \(lateral"):
        start_from(network, runs / "classnet", classes=names)


def test_the_best_of_a_folder_only(runs):
    with pytest.raises(UserError, match=r"checkpoint=best: .*last.pt is the last one"):
        agcseg.load(runs / "segnet/last.pt", "best")
    assert agcseg.load(runs / "segnet/best.pt", "best").path.name == "best.pt"


@pytest.mark.parametrize("values", [{"norm": "bn"}, {"width": 0.1}, {"network": "classnet"}])
def test_start_from_another_network_is_refused(runs, values):
    network = agcseg.build(**{"network": "segnet", "width": 0.05, **values})
    with pytest.raises(UserError, match="init_from=.*: is a network of another kind, norm or width"):
        start_from(network, runs / "segnet")


def test_start_from_a_norm_with_the_same_weights_is_refused(runs, tiny, tmp_path):
    with pytest.raises(UserError, match="was trained with norm=agc, not norm=center"):
        run(tiny("center", init_from=str(runs / "segnet"), epochs=1), tmp_path / "run")


@pytest.fixture
def pictures(streets, tmp_path):
    """A folder as people have them: many sizes and modes, and two files that are no pictures."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    scene = Image.open(next(streets.glob("leftImg8bit/val/*/*.png")))
    scene.save(folder / "scene.png")
    scene.resize((47, 33)).convert("L").save(folder / "grey.JPG", "jpeg")
    scene.resize((300, 31)).convert("RGBA").save(folder / "more/clear.png")
    scene.convert("P").save(folder / "more/scene.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    scene.save(folder / "turned.jpg", exif=turned)
    (folder / "text.png").write_text("not a picture")
    (folder / "cut.png").write_bytes((folder / "scene.png").read_bytes()[:900])
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(folder / "deep.png")
    (folder / "notes.txt").write_text("left alone")
    return folder


def test_predict_a_folder(runs, pictures, capsys):
    arguments = (runs / "classnet", f"input={pictures}", f"output={pictures / 'out'}", "minibatch=3")
    assert ended(predict_program, *arguments, "probabilities=true") == 1
    said = capsys.readouterr()
    for line in ("text.png: cannot be decoded", "cut.png: cannot be decoded", "deep.png: mode I;16, expected 8 bits"):
        assert line in said.err
    assert "5 of 8 pictures predicted" in said.out and "Traceback" not in said.err
    sizes = {
        "scene": (128, 64),
        "grey": (47, 33),
        "more/clear": (300, 31),
        "more/scene": (128, 64),
        "turned": (64, 128),
    }
    written = {path.relative_to(pictures / "out").as_posix() for path in pictures.glob("out/**/*") if path.is_file()}
    kinds = ("classes.png", "overlay.png", "contour.png", "probabilities.npz")
    assert written == {f"{name}_{kind}" for name in sizes for kind in kinds}
    palette = agcseg.load(runs / "classnet").classes.palette()
    for name, size in sizes.items():
        numbers, overlay, contour = (Image.open(pictures / "out" / f"{name}_{kind}") for kind in kinds[:3])
        assert numbers.size == overlay.size == contour.size == size
        assert (numbers.mode, overlay.mode, contour.mode) == ("P", "RGB", "L") and np.asarray(numbers).max() < 19
        assert np.array_equal(np.asarray(numbers.convert("RGB")), palette[np.asarray(numbers)])
    stored = np.load(pictures / "out/grey_probabilities.npz")
    assert stored["probabilities"].shape == (19, 128, 128) and stored["classes"][0] == "road"
    assert np.allclose(stored["probabilities"].astype(float).sum(0), 1, atol=0.01)
    again = {path: path.read_bytes() for path in pictures.glob("out/**/*") if path.is_file()}
    assert ended(predict_program, *arguments) == 1  # its own output is no input
    assert again == {path: path.read_bytes() for path in pictures.glob("out/**/*") if path.is_file()}


def test_predictions_are_the_networks(runs, pictures):
    """A pattern, one picture, and what they give against the network asked directly."""
    for wanted in (pictures / "sce*.png", pictures / "scene.png"):
        assert ended(predict_program, runs / "segnet", f"input={wanted}", f"output={pictures / 'out'}") == 0
        assert sorted(path.name for path in pictures.glob("out/*")) == ["scene_classes.png", "scene_overlay.png"]
        trained = agcseg.load(runs / "segnet")
        scene = Image.open(pictures / "scene.png")
        small = np.array(scene.resize((64, 32), Image.Resampling.BILINEAR))
        classes, contour = logits(trained, torch.from_numpy(small).permute(2, 0, 1)[None])
        expected = F.interpolate(classes, (64, 128), mode="bilinear").argmax(1)[0].numpy()
        numbers = Image.open(pictures / "out/scene_classes.png")
        assert contour is None and np.array_equal(np.asarray(numbers), expected)
        overlay = np.asarray(Image.open(pictures / "out/scene_overlay.png")).astype(int)
        assert abs(2 * overlay - np.asarray(scene).astype(int) - np.asarray(numbers.convert("RGB"))).max() <= 2


@pytest.mark.parametrize("size", [(5, 7), (11, 3), (3, 4)])
def test_prediction_is_argmax_of_resized_logits(size):
    scores = torch.randn(6, 5, 7)
    scores[4] = scores[2]  # a tie goes to the first
    expected = F.interpolate(scores[None], size, mode="bilinear").argmax(1)[0]
    assert torch.equal(prediction(scores, size).long(), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["output=out"], "input= is missing"),
        (["input=nowhere.png", "output=out"], "input=nowhere.png: no such file or folder"),
        (["input=.", "output=out"], "input=.: no pictures there"),
        (["input=*.png", "output=out"], "input=*.png: no pictures there"),
        (["input=a.png", "output=out", "submission=yes"], "submission=yes: must be true or false"),
        (["input=a.png", "output=out", "submission=true", "probabilities=true"], "leave out probabilities=true"),
        (["input=a.png", "outputs=out"], "did you mean output or input?"),
        (["input=a.png", "out"], "out: expected KEY=VALUE"),
    ],
)
def test_mistakes_in_predicting(runs, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert ended(predict_program, runs / "segnet", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_picture_whose_name_is_too_long_for_its_prediction(runs, pictures, capsys):
    for name in ("\u56fe" * 82, "x" * 246):  # 250 bytes with .png; its prediction's would be longer
        shutil.copy(pictures / "scene.png", pictures / f"{name}.png")
    assert (
        ended(predict_program, runs / "segnet", f"input={pictures}/[sx\u56fe]*.png", f"output={pictures / 'out'}") == 1
    )
    said = capsys.readouterr()
    assert "1 of 3 pictures predicted" in said.out and said.err.count("is too long for its prediction") == 2
    assert all(path.name.startswith("scene") for path in (pictures / "out").iterdir())


def test_the_run_comes_first(capsys):
    assert ended(predict_program, "input=a.png", "output=out") == 2
    assert "the run comes first: agcseg-predict RUN input=a.png" in capsys.readouterr().err


def test_output_among_the_pictures_is_refused(tmp_path):
    (tmp_path / "a.png").touch()
    for wanted in (tmp_path, tmp_path / "*.png"):
        with pytest.raises(UserError, match="all pictures there lie in the output folder"):
            find_images(str(wanted), tmp_path)


def test_a_pattern_over_a_link_to_a_folder_above(tmp_path):
    (tmp_path / "film/late").mkdir(parents=True)
    for name in ("film/a.png", "film/late/b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "film/late/above").symlink_to(tmp_path / "film")
    found = find_images(f"{tmp_path}/film/**/*.png", tmp_path / "out")
    assert sorted(found) == ["a", "late/b"]


def test_two_pictures_for_one_name(tmp_path):
    for name in ("a.png", "a.jpg"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"a\.png and .*a\.jpg: their predictions would get the same name"):
        find_images(str(tmp_path), tmp_path / "out")


@pytest.fixture(scope="module")
def benchmark(streets, tmp_path_factory):
    """Two images with the names and the size of the benchmark, and their labels."""
    folder = tmp_path_factory.mktemp("benchmark")
    for i, sample in enumerate(list_samples(LAYOUTS["streets"], streets, "val")[:2]):
        for path, ending in ((sample.image, "leftImg8bit"), (sample.label, "gtFine_labelIds")):
            picture = Image.open(path).resize((2048, 1024), Image.Resampling.NEAREST)
            picture.save(folder / f"bonn_00000{i}_000019_{ending}.png", compress_level=1)
    return folder


def test_submission(runs, benchmark, tmp_path, capsys):
    wanted, output = f"input={benchmark}/*_leftImg8bit.png", tmp_path / "to-upload"
    assert ended(predict_program, runs / "segnet", wanted, f"output={output}", "submission=true") == 0
    assert (
        "all files are as the benchmark wants them\nnote: the benchmark's test set has 1525" in capsys.readouterr().out
    )
    names = [f"bonn_00000{i}_000019_labelIds.png" for i in range(2)]
    assert sorted(path.name for path in output.iterdir()) == names
    plain = tmp_path / "plain"
    assert ended(predict_program, runs / "segnet", wanted, f"output={plain}") == 0
    for i, name in enumerate(names):
        ids, numbers = Image.open(output / name), Image.open(plain / f"bonn_00000{i}_000019_leftImg8bit_classes.png")
        assert ids.mode == "L" and ids.size == (2048, 1024)
        assert np.array_equal(LAYOUTS["cityscapes"].classes.lookup()[np.asarray(ids)], np.asarray(numbers))

    (output / "bonn_000000_000019_other.png").touch()  # the benchmark would find two files for one image
    small = tmp_path / "bonn_000000_000019_leftImg8bit.png"
    Image.new("RGB", (64, 32)).save(small)
    Image.new("RGB", (64, 32)).save(tmp_path / "photo.png")
    assert (
        ended(predict_program, runs / "segnet", f"input={tmp_path}/*.png", f"output={output}", "submission=true") == 1
    )
    said = capsys.readouterr()
    for line in ("32x64, the benchmark's images are 1024x2048", "photo.png: the benchmark's images are called CITY_0"):
        assert line in said.err
    assert "bonn_000000_000019_other.png: is not of this submission" in said.err and "as the bench" not in said.out


def test_submission_wants_cityscapes_classes(runs, benchmark, tmp_path, monkeypatch, capsys):
    trained = agcseg.load(runs / "segnet")
    other = trained._replace(classes=LAYOUTS["camvid"].classes)
    monkeypatch.setattr(agcseg, "load", lambda *arguments: other)
    arguments = (f"input={benchmark}", f"output={tmp_path / 'out'}", "submission=true")
    assert ended(predict_program, runs / "segnet", *arguments) == 2
    assert "submission=true" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_figures_are_those_of_the_official_evaluation(runs, benchmark, tmp_path):
    """Class IoU and its mean at full resolution, from the files that would be uploaded."""
    official = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    trained, layout = agcseg.load(runs / "segnet"), LAYOUTS["streets"]
    ended(
        predict_program,
        runs / "segnet",
        f"input={benchmark}/*_leftImg8bit.png",
        f"output={tmp_path}",
        "submission=true",
    )
    official.args.evalInstLevelScore = official.args.evalPixelAccuracy = False
    official.args.JSONOutput, official.args.quiet = False, True
    images, labels = (sorted(benchmark.glob(f"*_{ending}.png")) for ending in ("leftImg8bit", "labelIds"))
    predicted = sorted(map(str, tmp_path.glob("*_labelIds.png")))
    theirs = official.evaluateImgLists(predicted, [*map(str, labels)], official.args)
    samples = [Sample("", image, label, None) for image, label in zip(images, labels, strict=True)]
    ours = evaluate(trained, layout, samples, full=True)
    assert theirs["averageScoreClasses"] == pytest.approx(ours["miou"], abs=1e-9)
    for row in ours["classes"]:
        score = theirs["classScores"][row["class"]]
        assert math.isnan(score) if row["iou"] is None else score == pytest.approx(row["iou"], abs=1e-9)


@pytest.mark.parametrize("program", [eval_program, predict_program])
def test_help(program, capsys):
    assert ended(program, "--help") == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: agcseg-") and "examples:" in said and "exit code:" in said
    assert all(f"  {key}=" in said for key in program.KEYS)


@pytest.mark.parametrize("channels_last", [False, True])
def test_bf16_run(runs, channels_last):
    """A run in bf16 is asked in bf16 and in its own layout, and answers in float32."""
    trained = agcseg.load(runs / "segnet")
    half = trained._replace(config=dataclasses.replace(trained.config, precision="bf16", channels_last=channels_last))
    images = torch.randint(0, 256, (1, 3, 32, 64), dtype=torch.uint8)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = trained.network(normalise(images).contiguous(memory_format=layout))
    answer, _ = logits(half, images)
    assert expected.dtype == torch.bfloat16 and answer.dtype == torch.float32 and torch.equal(answer, expected.float())
    assert not torch.equal(answer, logits(trained, images)[0])


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_a_gpu_rounds_as_in_training(runs, precision, monkeypatch):
    """torch's own default is TF32 in convolutions."""
    trained, seen = agcseg.load(runs / "segnet"), []
    trained = trained._replace(config=dataclasses.replace(trained.config, precision=precision))
    trained.network.head.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision == "fp32")
    logits(trained, torch.zeros(1, 3, 32, 64, dtype=torch.uint8))
    assert seen == [precision == "tf32"] and torch.backends.cudnn.allow_tf32 == (precision == "fp32")


def test_a_run_from_weights_that_changed_is_another(runs, tiny, tmp_path):
    """Of one name, in one place: finished or not, it is told."""
    source = shutil.copytree(runs / "segnet", tmp_path / "source")
    config = tiny(init_from=str(source), epochs=1)
    first = run(config, tmp_path / "run")
    assert run(config, tmp_path / "run") == first
    saved = torch.load(source / "last.pt")
    saved["network"]["head.bias"] += 1
    torch.save(saved, source / "last.pt")
    for epochs in (1, 2):
        with pytest.raises(UserError, match=f"init_from: {source} holds other weights now"):
            run(dataclasses.replace(config, epochs=epochs), tmp_path / "run")
