"""Your own data: patterns, class files and their drafts, the check, and what a run keeps of them."""

import json
import shutil
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_trained import ended

import agcseg
from agcseg.check import check
from agcseg.cli import eval as eval_program
from agcseg.cli import predict as predict_program
from agcseg.cli.data import DataProgram, inspect, write_draft
from agcseg.config import Config, DataConfig, FolderConfig, NetworkConfig
from agcseg.data import find_data, find_samples, open_data
from agcseg.data.folder import read_classes
from agcseg.data.labels import CAMVID, CITYSCAPES, IGNORE, UNKNOWN, Classes
from agcseg.data.layout import check as check_samples
from agcseg.data.layout import list_samples, scan
from agcseg.data.pictures import read_numbers, suffixes
from agcseg.errors import UserError
from agcseg.export import metadata
from agcseg.trained import start_from
from agcseg.training.dataset import open_wanted
from agcseg.training.run import run

COLORS = {0: (10, 20, 30), 1: (200, 0, 0), 2: (0, 200, 0), 255: (0, 0, 0)}
CLASSES = """\
classes:
- name: grass
  color: [10, 20, 30]
- name: roof
  color: [200, 0, 0]
- name: tree
  color: [0, 200, 0]
void:
  numbers: [255]
  colors: [[0, 0, 0]]
"""


def write_folder(
    root, train=6, val=2, colored=False, images="images/{}/{}.jpg", labels="labels/{}/{}.png", size=(40, 60)
):
    """Images and masks of three classes and void; the masks are numbers, or the colours of `COLORS`."""
    generator = np.random.default_rng(0)
    for split, n in (("train", train), ("val", val)):
        for i in range(n):
            numbers = generator.choice(np.array([*COLORS], np.uint8), size)
            mask = np.array([COLORS[number] for number in numbers.flat], np.uint8).reshape(*size, 3)
            picture = Image.fromarray((mask + generator.integers(0, 40, mask.shape)).clip(0, 255).astype(np.uint8))
            for pattern, content in ((images, picture), (labels, Image.fromarray(mask if colored else numbers))):
                path = root / pattern.format(split, f"{i:03}")
                path.parent.mkdir(parents=True, exist_ok=True)
                content.save(path)
    (root / "classes.yaml").write_text(CLASSES)
    return root


def data_of(root, **values) -> DataConfig:
    cache = str(root.parent / "cache")
    return DataConfig(
        "folder", str(root), cache, **{"size": [32, 64], "train_images": None, "val_images": None, **values}
    )


def configured(root, folder=None, **values) -> Config:
    data = data_of(root, folder=FolderConfig(**(folder or {})), **values)
    return Config(
        data=data, network=NetworkConfig(width=0.05, init="he_centered"), minibatch=2, epochs=1, device="cpu", images=1
    )


def test_numbers_and_colours_give_the_same_data(tmp_path):
    opened = [
        open_data(data_of(write_folder(tmp_path / name, colored=colored)))[1]
        for name, colored in (("numbers", False), ("colours", True))
    ]
    for split in ("train", "val"):
        numbers, colours = (cached[split] for cached in opened)
        assert np.array_equal(numbers.labels, colours.labels) and numbers.names == colours.names
        assert numbers.digest() == colours.digest() and set(np.unique(numbers.labels)) == {0, 1, 2, IGNORE}
    path = tmp_path / "colours/labels/train/000.png"
    Image.open(path).quantize(4).save(path)  # a palette of its own: the indices are other numbers
    with pytest.raises(UserError, match=r"000\.png: holds numbers that are no labels of colours"):
        open_data(data_of(tmp_path / "colours"))
    without = CLASSES.replace("- name: grass", "- name: grass\n  numbers: []").replace("  numbers: [255]\n", "")
    (tmp_path / "colours/classes.yaml").write_text(without)  # where no number means anything, a palette is colours
    assert open_data(data_of(tmp_path / "colours"))[1]["train"].digest() == opened[0]["train"].digest()


@pytest.mark.parametrize(
    ("images", "labels", "folder"),
    [
        (
            "leftImg8bit/{}/city/{}_image.jpg",
            "gtFine/{}/city/{}_labelcolors.PNG",
            {"images": "leftImg8bit/{split}/*/{name}_image.jpg", "labels": "gtFine/{split}/*/{name}_labelcolors.png"},
        ),  # IDD
        (
            "images/10k/{}/{}.JPG",
            "labels/sem_seg/masks/{}/{}.png",
            {"images": "images/10k/{split}/{name}.jpg", "labels": "labels/sem_seg/masks/{split}/{name}.png"},
        ),  # BDD100K
        (
            "{}/images/{}.bmp",
            "{}/v2.0/labels/{}.png",
            {"images": "{split}/images/{name}", "labels": "{split}/v2.0/labels/{name}"},
        ),  # Mapillary
        (
            "{}/deep/er/{}/image.png",
            "masks/{}_{}.png",
            {"images": "{split}/**/{name}/image.png", "labels": "masks/{split}_{name}"},
        ),  # whose names are those of folders
        ("images/{}/a/b/{}.tif", "labels/{}/a/b/{}.TIFF", {}),
    ],
)
def test_other_trees(tmp_path, images, labels, folder):
    root = write_folder(tmp_path / "data", images=images, labels=labels)
    layout, _ = find_data(data_of(root, folder=FolderConfig(**folder)))
    listing = scan(layout, root, "train")
    assert not listing.problems and len(listing.samples) == 6
    assert check_samples(listing.samples, layout)[0] == []
    stems = [f"{i:03}" for i in range(6)]
    assert [sample.name.rpartition("/")[2] for sample in listing.samples] == stems
    for i, sample in enumerate(listing.samples):
        assert stems[i] in str(sample.image) and stems[i] in str(sample.label)


def test_frames_of_one_name_in_several_folders(tmp_path):
    """Frames are numbered anew in each film; where nobody has instances their pattern does not matter."""
    root = tmp_path / "data"
    for film in "ab":
        write_folder(root, images=f"images/{{}}/{film}/{{}}.jpg", labels=f"labels/{{}}/{film}/{{}}.png")
    data = data_of(root, folder=FolderConfig("images/{split}/*/{name}.jpg", "./labels/{split}//*/{name}.png"))
    listing = scan(*find_data(data), "train")
    assert not listing.problems and len(listing.samples) == 12
    assert all(sample.image.parent.name == sample.label.parent.name for sample in listing.samples)


def test_instances_that_were_asked_for_are_missed(tmp_path):
    root = write_folder(tmp_path / "data")
    folder = FolderConfig(instances="instnaces/{split}/{name}.png")
    assert "instnaces/train: no such folder" in str(scan(*find_data(data_of(root, folder=folder)), "train").problems[0])
    shutil.copytree(root / "labels/val", root / "instances/val")
    assert "instances/train: no such folder" in str(scan(*find_data(data_of(root)), "train").problems[0])
    assert not scan(*find_data(data_of(root)), "val").problems
    assert not scan(*find_data(data_of(root, folder=FolderConfig(instances=None))), "train").problems


def test_splits_of_other_names_and_a_share_for_validation(tmp_path):
    root = write_folder(tmp_path / "data", train=10)
    (root / "images/train").rename(root / "images/training")
    (root / "labels/train").rename(root / "labels/training")
    data = data_of(root, val_share=0.2, folder=FolderConfig(train="training"))
    layout, _ = find_data(data)
    parts = {split: find_samples(data, layout, root, split) for split in ("train", "val")}
    assert [len(part) for part in parts.values()] == [8, 2]
    assert {sample.image.stem for part in parts.values() for sample in part} == {f"{i:03}" for i in range(10)}
    assert parts == {split: find_samples(data, layout, root, split) for split in ("train", "val")}
    assert (
        find_samples(data_of(root, val_share=0.2, choice_seed=1, folder=data.folder), layout, root, "val")
        != parts["val"]
    )
    with pytest.raises(UserError, match=r"data.val_share=0.01: 0 of 10 images would be for validation"):
        find_samples(data_of(root, val_share=0.01, folder=data.folder), layout, root, "val")


def test_classes_file(tmp_path):
    (tmp_path / "classes.yaml").write_text(
        "classes:\n- name: a\n  numbers: [4, 300]\n  color: [1, 2, 3]\n  colors: [[4, 5, 6]]\n- name: b\n  numbers: 7\n"
        "- name: c\n  numbers: []\nvoid:\n  numbers: [0, 255]\n"
    )
    classes = read_classes(tmp_path, "classes.yaml")
    assert classes.names == ("a", "b", "c") and classes.colors[0] == (1, 2, 3) and len(set(classes.colors)) == 3
    assert classes.from_file == {4: 0, 300: 0, 7: 1, 0: IGNORE, 255: IGNORE}
    assert classes.from_color == {(1, 2, 3): 0, (4, 5, 6): 0}
    deep = np.array([[4, 300, 7], [0, 255, 9], [65000, 301, 299]], np.uint16)
    assert classes.translate(deep).tolist() == [[0, 0, 1], [IGNORE, IGNORE, UNKNOWN], [UNKNOWN] * 3]
    far = Classes(("a",), ((0, 0, 0),), {0: 0, 2**31 - 1: IGNORE})
    assert far.translate(np.array([[0, 1, 2**31 - 1, -1]], np.int32)).tolist() == [[0, UNKNOWN, IGNORE, UNKNOWN]]
    (tmp_path / "names.yaml").write_text("classes: [a, b]")
    assert read_classes(tmp_path, "names.yaml").from_file == {0: 0, 1: 1}
    assert read_classes(tmp_path, "cityscapes") == CITYSCAPES and read_classes(tmp_path, "camvid") == CAMVID
    for table in (classes, CITYSCAPES, CAMVID):
        assert Classes.from_dict(table.to_dict()) == table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("classes:\n- color: [1, 2, 3]", "class 1 has no name"),
        ("classes:\n- name: a\n- name: ''", "class 2 has no name"),
        ("classes:\n- name: no", "class 1 has no name: False is not text, quote it"),
        ("classes: [a, a]", "two classes are called a"),
        ("classes: []", "expected a list of classes, such as"),
        ("just text", "expected a list of classes, such as"),
        ("classes: {a: 1}", "expected a list of classes, such as"),
        ("classes: [a\n", "is not YAML"),
        ("classes: [a]\nvoids: []", "voids: is not a key here; there are classes and void"),
        ("classes:\n- {name: a, colour: [1, 2, 3]}", "a: colour: is not a key of a class; there are color, colors"),
        ("classes:\n- {name: a, numbers: [1]}\n- {name: b, numbers: [1]}", "b: number 1 is that of a already"),
        ("classes:\n- {name: a, numbers: [1]}\nvoid: {numbers: [1]}", "void: number 1 is that of a already"),
        ("classes:\n- {name: a, numbers: [x]}", "a: numbers: x: expected whole numbers"),
        ("classes:\n- {name: a, numbers: [-1]}", "a: numbers: -1: expected whole numbers"),
        ("classes:\n- {name: a, color: [1, 2]}", r"a: color \[1, 2\]: expected \[red, green, blue\], 0 to 255"),
        ("classes:\n- {name: a, color: [1, 2, 256]}", "expected .red, green, blue."),
        ("classes:\n- {name: a, color: [1, 2, 3]}\n- {name: b, color: [1, 2, 3]}", "b: colour .* is that of a already"),
        ("classes: [a]", "names one class only, so there is nothing to tell apart"),
        ("classes:\n- {name: a, colors: 5}", "a: colors: 5: expected a list of .red, green, blue."),
        ("classes:\n- {name: a, color: [1, 2, 3.0]}", "expected .red, green, blue."),
        ("classes: &a [*a]", "is not YAML"),
        ("classes: [a, b]\nvoid: 0", r"void: expected numbers: \[...\] or colors"),
        ("classes: [a]\nvoid: [255]", r"void: expected numbers: \[...\] or colors"),
        (f"classes: {list(map(str, range(255)))}", "names 255 classes; there can be 254"),
    ],
)
def test_mistakes_in_a_classes_file(tmp_path, text, message):
    (tmp_path / "classes.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_classes(tmp_path, "classes.yaml")
    assert str(error.value).startswith(f"{tmp_path / 'classes.yaml'}: ")


def test_a_missing_classes_file_says_how_to_get_one(tmp_path):
    with pytest.raises(
        UserError, match=f"classes.yaml: missing; .* agcseg-data data=folder data.root={tmp_path} draft"
    ):
        read_classes(tmp_path, "classes.yaml")


@pytest.mark.parametrize("colored", [False, True])
def test_draft(tmp_path, monkeypatch, colored):
    """Written to be edited, and usable as it is; an older file stays."""
    root = write_folder(tmp_path / "data", colored=colored)
    (root / "classes.yaml").unlink()
    monkeypatch.chdir(tmp_path)
    data = data_of(root, folder=FolderConfig(classes="mine.yaml"))
    write_draft(data, [])
    text, classes = (root / "mine.yaml").read_text(), read_classes(root, "mine.yaml")
    assert f"drafted from {8} label files" in text and "% of the pixels, in 8 files" in text
    assert len(classes) == 4 if colored else classes.from_file == {0: 0, 1: 1, 2: 2, 255: IGNORE}
    assert set(classes.from_color) == set(COLORS.values()) if colored else "a guess" in text
    layout, _ = find_data(data)
    assert check_samples(list_samples(layout, root, "train"), layout)[0] == []
    with pytest.raises(UserError, match="mine.yaml: is there already"):
        write_draft(data, [])
    assert (root / "mine.yaml").read_text() == text


def test_draft_of_black_and_white_masks(tmp_path):
    """White is a class then, not void: else there were one class, in which no network can err."""
    root = write_folder(tmp_path / "data")
    (root / "classes.yaml").unlink()
    for path in root.glob("labels/*/*.png"):
        Image.open(path).point(lambda number: 255 * (number > 0)).save(path)
    write_draft(data_of(root), [])
    assert read_classes(root, "classes.yaml").from_file == {0: 0, 255: 1}


def in_palette(path, order) -> None:
    """Stores a mask of numbers in a palette with the colours of `COLORS`, the numbers in another order."""
    numbers = np.asarray(Image.open(path))
    indices = np.select([numbers == number for number in order], range(len(order))).astype(np.uint8)
    picture = Image.fromarray(indices, "P")
    picture.putpalette([value for number in order for value in COLORS[number]])
    picture.save(path)


def test_palettes_that_contradict_each_other(tmp_path, caplog):
    root = write_folder(tmp_path / "data")
    for path in root.glob("labels/*/*.png"):
        in_palette(path, (0, 1, 2, 255))
    (root / "classes.yaml").write_text(CLASSES.replace("[255]", "[3]"))
    assert not inspect(DataProgram(data_of(root), build=False))
    in_palette(root / "labels/val/001.png", (2, 1, 255, 0))
    assert inspect(DataProgram(data_of(root), build=False)) == 1
    assert "001.png: its palette contradicts its numbers (0 is grass, and [0, 200, 0] another class's" in caplog.text
    (root / "classes.yaml").unlink()
    with pytest.raises(UserError, match=r"001.png: 0 is \(0, 200, 0\) in its palette, and \(10, 20, 30\) in that of"):
        write_draft(data_of(root), [])


def with_palette(path, numbers, colors) -> None:
    """Store the mask anew: these numbers, from left to right, with a palette."""
    picture = Image.fromarray(np.resize(np.repeat(numbers, 15).astype(np.uint8), (40, 60)), "P")
    picture.putpalette([value for color in colors for value in color])
    picture.save(path)


def test_a_palette_of_greys_may_hold_the_numbers(tmp_path):
    """As oxipng stores a mask of numbers: the indices are in an order of their own."""
    root = write_folder(tmp_path / "data")
    for path in root.glob("labels/*/*.png"):
        with_palette(path, [0, 1, 2, 3], [(2, 2, 2), (1, 1, 1), (0, 0, 0), (255, 255, 255)])
    (root / "classes.yaml").write_text("classes: [a, b, c, d]\nvoid:\n  numbers: [255]\n")
    with pytest.raises(
        UserError, match=r"its palette of greys may hold the numbers; .*000\.png \(0 is grey 2, and both"
    ):
        open_data(data_of(root))
    for path in root.glob("labels/*/*.png"):  # greys that are no numbers of classes mean nothing
        with_palette(path, [0, 1, 2, 3], [(0, 0, 0), (85, 85, 85), (170, 170, 170), (255, 255, 255)])
    assert set(np.unique(open_data(data_of(root))[1]["train"].labels)) == {0, 1, 2, 3}


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_palette_in_another_order(tmp_path, split):
    """Its colours are no class's, so only other files show that its numbers mean something else."""
    root = write_folder(tmp_path / "data")
    colors = [(9, 9, 90), (9, 90, 9), (90, 9, 9)]
    for path in root.glob("labels/*/*.png"):
        with_palette(path, [0, 1, 2], colors)
    (root / "classes.yaml").write_text("classes: [a, b, c]\n")
    with_palette(root / "labels/train/002.png", [0, 1, 1], colors[:2])  # a shorter one is no other
    assert not inspect(DataProgram(data_of(root), build=False))
    for path in root.glob("labels/val/*.png") if split == "val" else [root / "labels/train/001.png"]:
        with_palette(path, [1, 0, 2], [colors[1], colors[0], colors[2]])
    assert inspect(DataProgram(data_of(root), build=False)) == (2 if split == "val" else 1)
    with pytest.raises(UserError, match=r"its palette gives its numbers other colours .*0 is \(9, 90, 9\), elsewhere"):
        open_data(data_of(root))


def test_splits_that_are_stored_in_two_ways(tmp_path):
    root = write_folder(tmp_path / "data", train=3, val=3)
    for path in root.glob("labels/val/*.png"):
        in_palette(path, (255, 2, 1, 0))
    (root / "classes.yaml").write_text("classes: [a, b, c]\nvoid:\n  numbers: [3, 255]\n")
    assert inspect(DataProgram(data_of(root), build=False)) == 3
    with pytest.raises(
        UserError, match="3 of 3 samples cannot be used:\n.*3 files|holds numbers with a palette, where most"
    ):
        open_data(data_of(root))


def test_a_palette_beside_colours_without_numbers(tmp_path):
    """Without numbers of their own the classes are counted, but not against what the palette says."""
    root = write_folder(tmp_path / "data")
    for path in root.glob("labels/*/*.png"):
        with_palette(path, [0, 0, 1, 2], [(0, 0, 0), (128, 64, 128), (70, 130, 180)])
    named = "classes:\n- {name: sky, color: [70, 130, 180]}\n- {name: road, color: [128, 64, 128]}\n- {name: car"
    (root / "classes.yaml").write_text(f"{named}, color: [0, 0, 142]}}\n")
    with pytest.raises(
        UserError, match=r"its palette contradicts its numbers; .*\(2 is car, and \[70, 130, 180\] another"
    ):
        open_data(data_of(root))
    numbered = named.replace("sky,", "sky, numbers: [0],").replace("road,", "road, numbers: [1],")
    (root / "classes.yaml").write_text(f"{numbered}, numbers: [2]}}\n")
    assert set(np.unique(open_data(data_of(root))[1]["train"].labels)) == {0, 1, 2}


def test_a_draft_paints_no_two_classes_alike(tmp_path):
    root = write_folder(tmp_path / "data")
    (root / "classes.yaml").unlink()
    for path in root.glob("labels/*/*.png"):
        with_palette(path, [0, 1, 7, 8], [(0, 0, 0)] * 7 + [(128, 64, 128), (244, 35, 232)])
    write_draft(data_of(root), [])
    assert not inspect(DataProgram(data_of(root), build=False))


def test_classes_of_other_data_are_not_taken(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "data")
    (root / "classes.yaml").unlink()
    (tmp_path / "classes.yaml").write_text(CLASSES)
    (tmp_path / "cityscapes").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{root}/classes.yaml: missing"):
        open_data(data_of(root))
    assert len(read_classes(root, "./classes.yaml")) == 3 and len(read_classes(root, "cityscapes")) == 19


def test_names_with_letters_in_two_parts(tmp_path):
    """As macOS writes them."""
    root = write_folder(tmp_path / "data")
    for folder, form in (("images", "NFC"), ("labels", "NFD")):
        for path in root.glob(f"{folder}/*/000.*"):
            path.rename(path.with_name(unicodedata.normalize(form, f"\u00e9{path.suffix}")))
    assert "\u00e9" in open_data(data_of(root))[1]["train"].names


@pytest.mark.parametrize(
    ("colored", "mode", "message"),
    [
        (True, "L", "holds numbers, where most label files hold colours"),
        (True, "P", "holds numbers with a palette, where most label files hold colours"),
        (False, "P", "holds numbers with a palette, where most label files hold numbers"),
        (False, "1", "holds numbers of 1 bit, where most label files hold numbers"),
    ],
)
def test_a_mask_that_is_stored_in_another_way(tmp_path, colored, mode, message):
    """As by a program that makes files smaller: all black, it would be read as the first class."""
    root = write_folder(tmp_path / "data", colored=colored)
    Image.new("RGB", (60, 40)).convert(mode).save(root / "labels/train/001.png")
    with pytest.raises(UserError, match=f"labels/train/001.png: {message}; store all label files in one way"):
        open_data(data_of(root))


@pytest.mark.parametrize(
    ("suffix", "options"),
    [("avif", {}), ("jp2", {}), ("tif", {"compression": "jpeg"}), ("webp", {}), ("webp", {"lossless": True})],
)
def test_masks_stored_with_losses(tmp_path, suffix, options):
    path = tmp_path / f"mask.{suffix}"
    if path.suffix not in suffixes():
        pytest.skip(f"this Pillow knows no {suffix}")
    Image.new("RGB", (60, 40), (10, 20, 30)).save(path, **options)
    if options.get("lossless"):
        assert (read_numbers(path) == (10, 20, 30)).all()
        return
    with pytest.raises(UserError, match="which changes the numbers in it; store labels and instances as PNG"):
        read_numbers(path)


def test_training_ids_are_not_the_numbers_of_cityscapes(tmp_path):
    folder = FolderConfig(labels="gtFine/{split}/*/{name}_gtFine_labelTrainIds.png", classes="cityscapes")
    with pytest.raises(UserError, match="numbers of labelIds; for trainIds name the 19 classes, 0 to 18, in a file"):
        find_data(data_of(tmp_path, folder=folder))


def test_names_that_are_no_text(tmp_path):
    try:
        root = write_folder(tmp_path / "latin-\udce9")
        (root / "images/val/001.jpg").rename(root / "images/val/\udce9.jpg")
    except OSError:
        pytest.skip("this disk takes names in UTF-8 only")
    (root / "labels/val/001.png").rename(root / "labels/val/\udce9.png")
    run(configured(root), tmp_path / "run")
    assert ended(eval_program, tmp_path / "run") == 0


def test_what_cannot_be_drafted(tmp_path):
    root = write_folder(tmp_path / "data")
    (root / "classes.yaml").unlink()
    Image.open(root / "labels/val/000.png").convert("RGB").save(root / "labels/val/000.png")
    with pytest.raises(UserError, match="000.png holds numbers, .*000.png colours; all labels must be of one kind"):
        write_draft(data_of(root), [])
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for path in root.glob("labels/*/*.png"):
        Image.fromarray(noise).save(path)
    with pytest.raises(UserError, match="2400 different colours, more than 254 classes"):
        write_draft(data_of(root), [])
    (root / "labels/val/000.png").write_bytes(b"")
    with pytest.raises(UserError, match="these label files cannot be read:\n .*000.png: cannot be decoded"):
        write_draft(data_of(root), [])
    shutil.rmtree(root / "labels")
    with pytest.raises(UserError, match="labels/train: no such folder"):
        write_draft(data_of(root), [])
    shutil.move(root / "images/train", root / "flat")
    shutil.rmtree(root / "images")
    shutil.move(root / "flat", root / "images")
    with pytest.raises(UserError, match="images holds pictures itself: .*'images/{name}' .* data.val_share=0.2"):
        write_draft(data_of(root), [])
    with pytest.raises(UserError, match="drafts the classes of data=folder"):
        write_draft(DataConfig("camvid", str(root)), [])


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (lambda root: (root / "labels/train/001.png").unlink(), ["labels/train/001.png: missing (or another kind"]),
        (lambda root: (root / "images/val/001.jpg").unlink(), ["images/val/001.png: missing (or another kind"]),
        (
            lambda root: shutil.copy(root / "images/val/001.jpg", root / "images/val/001.jpeg"),
            ["images/val/001.jpg: has the name of another file", "rename or remove one of them"],
        ),
        (
            lambda root: Image.new("L", (60, 40), 9).save(root / "labels/val/001.png"),
            ["labels/val/001.png: holds numbers that are no labels of data (9 on 2400 pixels)"],
        ),
        (
            lambda root: Image.new("RGB", (60, 40), (9, 8, 7)).save(root / "labels/val/001.png"),
            ["labels/val/001.png: holds colours that are no labels of data ((9, 8, 7) on 2400 pixels)"],
        ),
        (
            lambda root: Image.new("L", (40, 60)).save(root / "labels/val/001.png"),
            ["another size than its image (60x40, but its image is 40x60)"],
        ),
        (
            lambda root: (root / "labels/val/001.png").write_bytes((root / "images/val/001.jpg").read_bytes()),
            ["labels/val/001.png: is a JPEG, which changes the numbers in it; store labels and instances as PNG"],
        ),
        (
            lambda root: [Image.new("L", (60, 40), 9).save(path) for path in root.glob("labels/*/*.png")],
            ["train: 6 samples, 0 missing, 6 broken", "8 files: holds numbers that are no labels of data. Such as"],
        ),
        (lambda root: (root / "images/val/notes.txt").touch(), ["val: 1 other file left out: notes.txt", "are good"]),
        (
            lambda root: [Image.new("L", (60, 40), 1).save(path) for path in root.glob("labels/val/*.png")],
            ["val: no pixel of grass, tree", "are good"],
        ),
        (lambda root: shutil.rmtree(root / "labels"), ["labels/train: no such folder"]),
    ],
)
def test_every_fault_is_named(tmp_path, caplog, change, lines):
    root = write_folder(tmp_path / "data")
    change(root)
    problems = inspect(DataProgram(data_of(root), build=False))
    assert bool(problems) == ("are good" not in lines) and all(line in caplog.text for line in lines)
    assert str(root) in caplog.text


def test_every_file_by_name_on_demand(tmp_path, caplog):
    root = write_folder(tmp_path / "data")
    for path in root.glob("images/train/*.jpg"):
        path.write_bytes(b"")
    assert inspect(DataProgram(data_of(root), every=True)) == 6
    assert caplog.text.count("cannot be decoded") == 6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"folder": {"images": "images/{split}/*.jpg"}}, "data.folder.images=.* must hold {name}"),
        (
            {"folder": {"labels": "labels/{name}.png"}},
            "data.folder.labels=.* must hold {split}; or give data.val_share",
        ),
        ({"folder": {"images": "images/{split}/{city}/{name}.png"}}, "only {split} and {name} can stand in braces"),
        ({"folder": {"labels": "/data/{split}/{name}.png"}}, "data.folder.labels=.* must be a path below data.root"),
        ({"folder": {"images": "images/{split}/{name}.*"}}, "must end in a suffix such as .png; or"),
        ({"folder": {"images": "images/{split}/img.{name}"}}, "must end in a suffix such as .png; or"),
        ({"folder": {"train": "{train,extra}"}}, "data.folder.train={train,extra}: must be the name of one folder"),
        ({"val_share": 1.0}, "data.val_share=1.0: must be between 0 and 1"),
        ({"folder": {"instance_divisor": 1}}, "data.folder.instance_divisor=1: must be above 1"),
    ],
)
def test_mistakes_in_the_configuration(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        check(configured(tmp_path, **values))


def test_validation_on_training_images_is_said(tmp_path, caplog):
    root = write_folder(tmp_path / "data")
    shutil.copy(min(root.glob("images/train/*")), root / "images/val/again.jpg")
    shutil.copy(min(root.glob("labels/train/*")), root / "labels/val/again.png")
    open_wanted(configured(root))
    assert "1 of the 3 validation images are training images too" in caplog.text
    caplog.clear()
    open_wanted(configured(root, {"val": "train"}))
    assert "6 of the 6 validation images are training images too" in caplog.text


def test_a_run_on_a_folder(tmp_path, monkeypatch, capsys):
    """Classes live in the checkpoint: evaluation, prediction, export and fine-tuning need no file of classes."""
    root = write_folder(tmp_path / "data")
    run(configured(root), tmp_path / "outputs/n/run")
    trained = agcseg.load(tmp_path / "outputs/n/run")
    layout, _ = find_data(data_of(root))
    assert trained.classes == layout.classes and trained.classes.names == ("grass", "roof", "tree")
    about = metadata(trained)
    assert about["classes"] == ["grass", "roof", "tree"] and about["colors"][1] == [200, 0, 0]
    (root / "classes.yaml").unlink()
    assert ended(eval_program, tmp_path / "outputs/n/run") == 0
    assert "roof" in capsys.readouterr().out
    assert (tmp_path / "outputs/n/run/eval-folder-val-training.json").exists()
    assert ended(predict_program, tmp_path / "outputs/n/run", f"input={root}/images/val", f"output={tmp_path}/out") == 0
    painted = Image.open(tmp_path / "out/000_classes.png").convert("RGB")
    assert {color for _, color in painted.getcolors()} <= set(trained.classes.colors)
    # Of other names, though as many, the classifier starts anew.
    network = agcseg.build("segnet", width=0.05, num_classes=3)
    assert "new" not in start_from(network, tmp_path / "outputs/n/run", "agc", ("grass", "roof", "tree"))
    said = start_from(network, tmp_path / "outputs/n/run", "agc", ("sky", "sea", "land"))
    assert said.endswith("; new, for other classes: head.weight, head.bias")


def test_evaluation_on_a_folder_with_labels_of_its_own(tmp_path, capsys):
    """The same classes by other numbers, in another tree."""
    root = write_folder(tmp_path / "data")
    run(configured(root), tmp_path / "run")
    other = write_folder(tmp_path / "other", colored=True, images="{}/{}.png", labels="masks/{}/{}.png")
    (other / "classes.yaml").rename(tmp_path / "other.yaml")
    arguments = [f"data.root={other}", "data.folder.images={split}/{name}", "data.folder.labels=masks/{split}/{name}"]
    assert ended(eval_program, tmp_path / "run", *arguments, f"data.folder.classes={tmp_path}/other.yaml") == 0
    written = tmp_path / "run/eval-folder-other-val-training.json"
    figures = written.read_text()
    swapped = CLASSES.replace("[10, 20, 30]", "[9, 9, 9]").replace("[200, 0, 0]", "[10, 20, 30]")
    (other / "classes.yaml").write_text(swapped.replace("[9, 9, 9]", "[200, 0, 0]"))
    assert ended(eval_program, tmp_path / "run", *arguments) == 0  # a file of its own counts too
    shares = [[one["share"] for one in json.loads(text)["classes"]] for text in (figures, written.read_text())]
    assert shares[1] == [shares[0][1], shares[0][0], shares[0][2]] != shares[0]
    (tmp_path / "other.yaml").write_text("classes: [grass, roof, hedge]\nvoid: {numbers: [255]}")
    assert ended(eval_program, tmp_path / "run", *arguments, f"data.folder.classes={tmp_path}/other.yaml") == 2
    assert "tells grass, roof, tree apart; other has grass, roof, hedge" in capsys.readouterr().err


def test_evaluation_by_other_patterns_replaces_nothing(tmp_path, capsys):
    root = write_folder(tmp_path / "data")
    run(configured(root, val_images=1), tmp_path / "run")
    assert ended(eval_program, tmp_path / "run") == 0
    own = (tmp_path / "run/eval-folder-val-training.json").read_text()
    write_folder(root, val=3, images="night/{}/{}.jpg", labels="masks/{}/{}.png")
    capsys.readouterr()
    patterns = ["data.folder.images=night/{split}/{name}", "data.folder.labels=masks/{split}/{name}"]
    assert ended(eval_program, tmp_path / "run", *patterns) == 0
    said = capsys.readouterr().out
    assert "val, 3 images" in said and "note" not in said
    assert "eval-folder-data-night_split_name-masks_split_name-val-training.json" in said
    assert (tmp_path / "run/eval-folder-val-training.json").read_text() == own


def test_evaluation_of_another_folder_takes_all_of_it(tmp_path, capsys):
    root = write_folder(tmp_path / "data")
    run(configured(root, train_images=2, val_images=1), tmp_path / "some")
    run(configured(root, val_share=0.2), tmp_path / "share")
    other = write_folder(tmp_path / "other", train=5, val=4)
    for name, split, images in (("some", "val", 4), ("some", "train", 5), ("share", "val", 4)):
        assert ended(eval_program, tmp_path / name, f"data.root={other}", f"split={split}") == 0
        assert f"{split}, {images} images" in capsys.readouterr().out
    assert ended(eval_program, tmp_path / "some") == 0 and "val, 1 images" in capsys.readouterr().out


def test_evaluation_of_a_single_folder(tmp_path, capsys):
    """The run's share of its own images, all of others; it has no other splits."""
    patterns = {"images": "images/{name}", "labels": "labels/{name}"}
    for name in ("data", "other"):
        root = write_folder(tmp_path / name, train=5)
        for kind in ("images", "labels"):
            shutil.rmtree(root / kind / "val")
            for path in (root / kind / "train").iterdir():
                path.rename(root / kind / path.name)
            (root / kind / "train").rmdir()
    run(configured(tmp_path / "data", patterns, val_share=0.2), tmp_path / "run")
    for arguments, said in (([], "val, 1 images"), ([f"data.root={tmp_path / 'other'}"], "val, 5 images")):
        assert ended(eval_program, tmp_path / "run", *arguments) == 0 and said in capsys.readouterr().out
    assert ended(eval_program, tmp_path / "run", "split=test") == 2
    assert "split=test: data has one folder of images, images/{name}, for all splits" in capsys.readouterr().err


def test_evaluation_of_other_images_than_the_runs_says_so(tmp_path, capsys):
    root = write_folder(tmp_path / "data")
    run(configured(root), tmp_path / "run")
    assert ended(eval_program, tmp_path / "run") == 0 and "note:" not in capsys.readouterr().out
    picture = Image.open(root / "images/val/000.jpg").rotate(180)
    picture.save(root / "images/val/000.jpg")
    assert ended(eval_program, tmp_path / "run") == 0
    said = capsys.readouterr().out
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert ("note: the images or their labels have changed since the run" in said) == ("data" in saved)
    for kind, ending in (("images", "jpg"), ("labels", "png")):
        (root / kind / f"val/000.{ending}").rename(root / kind / f"val/009.{ending}")
    assert ended(eval_program, tmp_path / "run") == 0
    assert "1 of its 2 are not among them, 1 of them are new" in capsys.readouterr().out


def test_relative_paths_are_found_again_from_elsewhere(tmp_path, monkeypatch):
    write_folder(tmp_path / "project/mine")
    monkeypatch.chdir(tmp_path / "project")
    config = configured(tmp_path / "project/mine")
    config.data.root, config.data.cache_dir = "mine", "cache"
    run(config, tmp_path / "project/outputs/mine/run")  # the runs are called as the data
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    assert ended(eval_program, "../project/outputs/mine/run") == 0
    shutil.move(tmp_path / "project", tmp_path / "moved")
    assert ended(eval_program, "../moved/outputs/mine/run") == 0


@pytest.mark.parametrize("split", ["train_extra", "val-night", "val.2"])
def test_splits_of_any_name_are_evaluated(tmp_path, split):
    root = write_folder(tmp_path / "data")
    run(configured(root), tmp_path / "run")
    for kind in ("images", "labels"):
        (root / kind / "val").rename(root / kind / split)
    assert ended(eval_program, tmp_path / "run", f"split={split}") == 0
    assert (tmp_path / f"run/eval-folder-{split}-training.json").exists()


def test_classes_belong_to_a_run_and_their_file_does_not(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "data")
    run(configured(root), tmp_path / "run")
    (root / "classes.yaml").rename(tmp_path / "moved.yaml")
    moved = {"classes": str(tmp_path / "moved.yaml")}
    assert run(configured(root, moved), tmp_path / "run")["epochs"] == 1
    longer = replace(configured(root, moved), epochs=2)
    for change, message in (
        (("roof", "house"), "classes: grass, roof, tree there, grass, house, tree here"),
        (("  color: [10, 20, 30]", "  numbers: [0, 1]"), "classes|the images or their labels are others"),
    ):
        (tmp_path / "moved.yaml").write_text(CLASSES.replace(*change))
        with pytest.raises(UserError, match=message):
            run(longer, tmp_path / "run")
    (tmp_path / "moved.yaml").write_text(CLASSES)
    assert run(longer, tmp_path / "run")["epochs"] == 2


def test_a_share_for_validation_is_evaluated_as_in_training(tmp_path, capsys):
    root = write_folder(tmp_path / "data")
    shutil.rmtree(root / "images/val")
    shutil.rmtree(root / "labels/val")
    result = run(configured(root, val_share=0.34), tmp_path / "run")
    assert ended(eval_program, tmp_path / "run") == 0 and "note:" not in capsys.readouterr().out
    figures = json.loads((tmp_path / "run/eval-folder-val-training.json").read_text())
    assert figures["images"] == 2 and figures["pixel_error"] == pytest.approx(result["pixel_error"], abs=1e-6)
    assert ended(eval_program, tmp_path / "run", "split=train") == 0
    assert json.loads((tmp_path / "run/eval-folder-train-training.json").read_text())["images"] == 4
