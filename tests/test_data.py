"""Readers, checks, cache and minibatches on fake data sets in a temporary folder."""

import csv
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from agcseg.config import DataConfig
from agcseg.data import LAYOUTS, open_data, streets_root
from agcseg.data.cache import contours, open_cache
from agcseg.data.labels import CAMVID, CITYSCAPES, IGNORE, UNKNOWN
from agcseg.data.layout import check, list_samples, scan
from agcseg.data.minibatches import MEAN, STD, choose, histogram, minibatches, normalise, open_split, read_ahead
from agcseg.errors import UserError
from agcseg.training.run import run

CPU = torch.device("cpu")


def write_cityscapes(root, names=("aachen_000000_000019", "bochum_000001_000019"), size=(64, 128)):
    """A Cityscapes tree in small: `names` in train, the first in val; label ids 7 (road), 26 (car), 0 (unlabelled)."""
    generator = np.random.default_rng(0)
    for split, stems in (("train", names), ("val", names[:1])):
        for stem in stems:
            city = stem.split("_")[0]
            images, labels = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
            images.mkdir(parents=True, exist_ok=True)
            labels.mkdir(parents=True, exist_ok=True)
            label = generator.choice(np.array([0, 7, 26], dtype=np.uint8), size)
            Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(
                images / f"{stem}_leftImg8bit.png"
            )
            Image.fromarray(label).save(labels / f"{stem}_gtFine_labelIds.png")
            Image.fromarray(label.astype(np.uint16) * 1000).save(labels / f"{stem}_gtFine_instanceIds.png")
    return root


def write_camvid(root, ending="png"):
    generator = np.random.default_rng(0)
    for split, n in (("train", 3), ("val", 2)):
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
        for i in range(n):
            Image.fromarray(generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(
                root / split / f"0001TP_{i}.{ending}"
            )
            Image.fromarray(generator.integers(0, 12, (60, 80), dtype=np.uint8)).save(
                root / f"{split}annot" / f"0001TP_{i}.png"
            )
    return root


def opened(name, root, size, cache_dir, **keys):
    return open_data(DataConfig(name, str(root), str(cache_dir), list(size), None, None), **keys)


LAYOUT = LAYOUTS["cityscapes"]._replace(expected=None, image_size=None)


def test_class_tables():
    assert len(CITYSCAPES) == 19 and CITYSCAPES.names[0] == "road" and CITYSCAPES.names[18] == "bicycle"
    table = CITYSCAPES.lookup()
    assert [table[i] for i in (7, 11, 33, 0, 6, 255, 34, 200)] == [0, 2, 18, *[IGNORE] * 3, *[UNKNOWN] * 2]
    assert sum(table < 19) == 19 and sum(table == UNKNOWN) == 256 - 35
    assert len(CAMVID) == 11 and CAMVID.lookup()[11] == IGNORE and CAMVID.lookup()[12] == UNKNOWN
    assert CAMVID.palette().shape == (256, 3) and CAMVID.palette()[255].tolist() == [0, 0, 0]


def test_cityscapes_is_listed_in_order_and_complete(tmp_path):
    root = write_cityscapes(tmp_path, names=("zurich_000000_000019", "aachen_000001_000019"))
    samples = list_samples(LAYOUT, root, "train")
    assert [sample.name for sample in samples] == ["aachen/aachen_000001_000019", "zurich/zurich_000000_000019"]
    assert samples[0].label.name == "aachen_000001_000019_gtFine_labelIds.png"
    assert samples[0].instance.name == "aachen_000001_000019_gtFine_instanceIds.png"
    assert check(samples, LAYOUT)[0] == []


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_camvid(tmp_path, ending):
    layout, cached = opened("camvid", write_camvid(tmp_path / "data", ending), (32, 64), tmp_path / "cache")
    assert cached["train"].images.shape == (3, 3, 32, 64) and cached["val"].labels.shape == (2, 32, 64)
    assert set(np.unique(cached["train"].labels)) == {*range(11), IGNORE}


def test_every_fault_is_named(tmp_path):
    names = [f"aachen_{i:06d}_000019" for i in range(8)]
    root = write_cityscapes(tmp_path, names)
    images, labels = root / "leftImg8bit/train/aachen", root / "gtFine/train/aachen"
    (labels / f"{names[0]}_gtFine_labelIds.png").unlink()
    (images / f"{names[1]}_leftImg8bit.png").unlink()
    truncated = images / f"{names[2]}_leftImg8bit.png"
    truncated.write_bytes(truncated.read_bytes()[:5000])
    Image.new("L", (64, 32)).save(labels / f"{names[3]}_gtFine_labelIds.png")
    Image.new("RGB", (128, 64)).save(labels / f"{names[4]}_gtFine_labelIds.png")
    Image.new("L", (128, 64), 77).save(labels / f"{names[5]}_gtFine_labelIds.png")
    (labels / f"{names[6]}_gtFine_labelIds.png").write_text("no picture")
    samples, missing, *_ = scan(LAYOUT, root, "train")
    missing = list(map(str, missing))
    assert [line.split(": ", 1)[1] for line in missing] == [
        "missing (it comes with gtFine_trainvaltest.zip)",
        "missing (it comes with leftImg8bit_trainvaltest.zip)",
    ]
    assert names[0] in missing[0] and names[1] in missing[1]
    broken = list(map(str, check(samples, LAYOUT)[0]))
    for line, name, what in zip(
        broken,
        names[2:7],
        (
            "truncated",
            "32x64, but its image is 64x128",
            "mode RGB",
            "holds numbers that are no labels of Cityscapes (77 on 8192 pixels)",
            "cannot be decoded",
        ),
        strict=True,
    ):
        assert name in line and what in line
    with pytest.raises(UserError) as error:
        open_cache(LAYOUT, samples, (32, 64), tmp_path / "cache", "train")
    assert "5 of 6 samples cannot be used" in str(error.value) and all(name in str(error.value) for name in names[2:7])
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_wrong_size_of_real_cityscapes(tmp_path):
    layout = LAYOUTS["cityscapes"]
    samples = list_samples(layout, write_cityscapes(tmp_path), "val")
    assert "64x128, expected 1024x2048" in str(check(samples, layout)[0][0])


def test_missing_data_set_says_where_what_and_what_else(tmp_path):
    with pytest.raises(UserError) as error:
        list_samples(LAYOUT, tmp_path / "nowhere", "train")
    for part in (
        str(tmp_path / "nowhere"),
        "gtFine_trainvaltest.zip",
        "leftImg8bit/train/CITY/CITY_000000_000019_leftImg8bit.png",
        "experiment=demo",
        "data.root=FOLDER",
    ):
        assert part in str(error.value)


def test_streets_are_made_once(tmp_path):
    said = []
    roots = [streets_root(tmp_path, 2, 1, (64, 128), 0, said.append) for _ in range(2)]
    assert roots[0] == roots[1] and len(said) == 1
    layout, cached = opened("streets", roots[0], (32, 64), tmp_path)
    assert len(cached["train"].names) == 2 and len(cached["val"].names) == 1


@pytest.mark.parametrize(
    ("key", "value", "its"), [("train", 9, 8), ("val", 3, 4), ("size", [64, 256], [64, 128]), ("seed", 1, 0)]
)
def test_scenes_that_are_there_are_not_made_again(streets, tmp_path, key, value, its):
    data = DataConfig("streets", str(streets), str(tmp_path), [32, 64], None, None)
    setattr(data.streets, key, its)
    open_data(data)
    setattr(data.streets, key, value)
    with pytest.raises(UserError) as error:
        open_data(data)
    assert f"data.streets.{key}={value}: the scenes in {streets} are there already, with " in str(error.value)


@pytest.fixture
def split(streets, tmp_path):
    _, cached = opened("streets", streets, (32, 64), tmp_path)
    return open_split(cached["train"], choose(8, 7, seed=0), CPU)


def test_choice_is_fixed_and_seeded():
    assert choose(2975, None, 0).tolist() == list(range(2975))
    chosen = choose(2975, 2750, 0)
    assert len(set(chosen.tolist())) == 2750 and (np.diff(chosen) > 0).all()
    assert np.array_equal(chosen, choose(2975, 2750, 0)) and not np.array_equal(chosen, choose(2975, 2750, 1))


def test_minibatches_of_training(split):
    def epoch(seed, number):
        return [images for images, _ in minibatches(split, 3, CPU, shuffle=(seed, number))]

    first = epoch(1, 1)
    assert [tuple(images.shape) for images in first] == [(3, 3, 32, 64)] * 2  # the seventh is dropped
    assert all(torch.equal(a, b) for a, b in zip(first, epoch(1, 1), strict=True))
    assert not torch.equal(first[0], epoch(1, 2)[0]) and not torch.equal(first[0], epoch(2, 1)[0])


def test_minibatches_of_validation_show_every_image_once(split):
    batches = list(minibatches(split, 3, CPU))
    assert [len(images) for images, _ in batches] == [3, 3, 1]
    labels = torch.cat([labels for _, labels in batches])
    assert torch.equal(labels, split.labels[torch.from_numpy(split.indices)])


def test_flip_mirrors_image_and_label_together(split):
    plain = list(minibatches(split, 7, CPU, shuffle=(1, 1)))[0]
    flipped = list(minibatches(split, 7, CPU, shuffle=(1, 1), flip=True))[0]
    mirrored = [not torch.equal(a, b) for a, b in zip(plain[0], flipped[0], strict=True)]
    assert 0 < sum(mirrored) < 7
    for i, was in enumerate(mirrored):
        for a, b in zip(plain, flipped, strict=True):
            assert torch.equal(b[i], a[i].flip(-1) if was else a[i])


def test_contours_come_when_wanted_and_are_flipped_too(streets, tmp_path, split):
    assert split.contours is None and all(len(batch) == 2 for batch in minibatches(split, 3, CPU))
    _, cached = opened("streets", streets, (32, 64), tmp_path)
    wanted = open_split(cached["train"], split.indices, CPU, contours=True)
    for flip in (False, True):
        (without,) = minibatches(split, 7, CPU, shuffle=(1, 1), flip=flip)
        (images, labels, marked) = list(minibatches(wanted, 7, CPU, shuffle=(1, 1), flip=flip))[0]
        assert torch.equal(images, without[0]) and torch.equal(labels, without[1])
        assert marked.dtype == torch.uint8 and set(marked.unique().tolist()) == {0, 1}
        assert not (marked.bool() & (labels == IGNORE)).any()
        # every border between classes is marked, mirrored or not
        between = torch.from_numpy(np.stack([contours(label, label) for label in labels.numpy()]))
        assert (marked.bool() | ~between).all()


def test_parts_are_read_ahead_by_a_thread():
    parts = [torch.arange(7).byte(), torch.rand(7, 2, 3)]
    rows = [torch.tensor(some) for some in ([6, 1, 0], [2, 2, 5], [3], [4, 0, 1], [5])]
    threads = threading.active_count()
    every = list(read_ahead(parts, rows, CPU))  # kept: no minibatch may be overwritten by a later one
    assert threading.active_count() == threads and len(every) == len(rows)
    for some, read in zip(rows, every, strict=True):
        assert all(torch.equal(part[some], one) for part, one in zip(parts, read, strict=True))


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_reading_ahead_ends_early(taken):
    threads = threading.active_count()
    reading = read_ahead([torch.arange(7)], [torch.tensor([k]) for k in range(7)], CPU)
    assert [next(reading)[0].item() for _ in range(taken)] == list(range(taken))
    reading.close()
    assert threading.active_count() == threads


def test_what_fails_while_reading_ahead_is_raised():
    threads = threading.active_count()
    reading = read_ahead([torch.arange(3)], [torch.tensor([0]), torch.tensor([9])], CPU)
    assert next(reading)[0].item() == 0
    with pytest.raises(IndexError, match="out of range"):
        next(reading)
    assert threading.active_count() == threads


def test_normalisation():
    image = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(v / 255 - m) / s for v, m, s in zip((0, 128, 255), MEAN, STD, strict=True)]
    torch.testing.assert_close(normalise(image).flatten(), torch.tensor(expected))


def test_histogram(split):
    labels = split.labels[torch.from_numpy(split.indices)]
    assert histogram(split, 19) == [(labels == k).sum().item() for k in range(19)]


def test_a_set_without_a_labelled_pixel_is_refused_before_training(streets, tiny, tmp_path):
    copy = shutil.copytree(streets, tmp_path / "copy")
    for path in copy.glob("gtFine/val/*/*_*Ids.png"):
        Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
    config = tiny()
    config.data.root = str(copy)
    with pytest.raises(UserError, match="the labels of the 4 validation images hold no labelled pixel"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_image_without_a_labelled_pixel_counts_in_no_average(streets, tiny, tmp_path):
    copy = shutil.copytree(streets, tmp_path / "copy")
    for path in sorted(copy.glob("gtFine/val/*/*_*Ids.png"))[:2]:  # of the first image
        Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
    config = tiny(epochs=1)
    config.data.root = str(copy)
    result = run(config, tmp_path / "run")
    with open(tmp_path / "run/images.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file)]
    assert [row["labelled_pixels"] == "0" for row in rows] == [True, False, False, False]
    assert result["val_loss"] == pytest.approx(np.mean([float(row["loss"]) for row in rows[1:]]))
