"""Readers, checks, cache and minibatches on fake data sets in a temporary folder."""

import csv
import errno
import multiprocessing
import os
import shutil
import signal
import threading
import time

import filelock
import numpy as np
import pytest
import torch
from PIL import Image

from agcseg.config import DataConfig
from agcseg.data import LAYOUTS, open_data, streets_root
from agcseg.data.cache import contours, digests, open_cache
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


def test_cache_holds_resized_images_and_nearest_labels(tmp_path):
    root = write_cityscapes(tmp_path / "data")
    samples = list_samples(LAYOUT, root, "train")
    cached = open_cache(LAYOUT, samples, (32, 64), tmp_path / "cache", "train")
    image = Image.open(samples[1].image).resize((64, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(cached.images[1].transpose(1, 2, 0), np.asarray(image))
    # A plain subsampling leaves the noise of single pixels; the antialiased resize averages it away.
    assert cached.images.std() < 0.7 * np.asarray(Image.open(samples[1].image)).std()
    assert set(np.unique(cached.labels)) == {0, 13, IGNORE}
    again = open_cache(LAYOUT, samples, (32, 64), tmp_path / "cache", "train", progress=None)  # would fail if it built
    assert again.folder == cached.folder and np.array_equal(again.images, cached.images)


def test_contours_by_hand():
    instances = np.array([[7, 7, 7, 26001], [7, 7, 26001, 26001], [7, 26002, 26002, 0], [7, 7, 0, 0]])
    labels = np.where(instances == 0, IGNORE, np.where(instances > 1000, 13, 0)).astype(np.uint8)
    expected = [[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 1, 0], [0, 1, 0, 0]]  # void has no border; two cars have one
    assert contours(labels, instances).astype(int).tolist() == expected
    assert contours(labels, labels).astype(int).tolist() == [[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0], [0, 1, 0, 0]]
    assert not contours(np.full((3, 3), IGNORE, np.uint8), np.arange(9).reshape(3, 3)).any()


def test_cached_contours_are_those_of_the_cached_labels_and_instances(tmp_path):
    root = write_cityscapes(tmp_path / "data")
    samples = list_samples(LAYOUT, root, "train")
    ids = np.array(Image.open(samples[0].label)).astype(np.uint16)
    ids[ids == 26] = 26000 + np.arange(64 * 128).reshape(64, 128)[ids == 26] // (128 * 20)  # cars in bands of 20 rows
    Image.fromarray(ids).save(samples[0].instance)
    cached = open_cache(LAYOUT, samples, (32, 64), tmp_path / "cache", "train")
    labels, instances = cached.labels[0], ids[1::2, 1::2]  # nearest: the odd rows and columns
    assert np.array_equal(labels, LAYOUT.classes.lookup()[np.minimum(np.where(instances > 99, 26, instances), 255)])
    assert np.array_equal(cached.contours[0], contours(labels, instances))
    assert not np.array_equal(cached.contours[0], contours(labels, labels))
    assert np.array_equal(cached.contours[1], contours(cached.labels[1], cached.labels[1]))  # one instance per label
    os.utime(samples[0].instance, ns=(1, 1))
    assert open_cache(LAYOUT, samples, (32, 64), tmp_path / "cache", "train").folder != cached.folder


def test_camvid_contours_are_those_of_the_classes(tmp_path):
    _, cached = opened("camvid", write_camvid(tmp_path / "data"), (32, 64), tmp_path / "cache")
    for split in cached.values():
        for labels, marked in zip(split.labels, split.contours, strict=True):
            assert np.array_equal(marked, contours(labels, labels))


def test_cache_is_keyed_by_files_and_size(tmp_path):
    root = write_cityscapes(tmp_path / "data")
    samples = list_samples(LAYOUT, root, "train")
    folders = [open_cache(LAYOUT, samples, size, tmp_path, "train").folder for size in ((32, 64), (64, 64))]
    os.utime(samples[0].label, ns=(1, 1))
    folders.append(open_cache(LAYOUT, samples, (32, 64), tmp_path, "train").folder)
    folders.append(open_cache(LAYOUT, samples[:1], (32, 64), tmp_path, "train").folder)
    assert len(set(folders)) == 4


def _open(samples, cache_dir, queue, pause):
    def slowly(items, total):
        for item in items:
            time.sleep(pause)
            yield item

    built = []

    def progress(items, total):
        built.append(total)
        return slowly(items, total)

    cached = open_cache(LAYOUT, samples, (32, 64), cache_dir, "train", progress, say=lambda line: None)
    queue.put((bool(built), cached.images.sum(dtype=np.int64)))


def test_two_processes_share_one_build(tmp_path):
    samples = list_samples(LAYOUT, write_cityscapes(tmp_path / "data"), "train")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_open, args=(samples, tmp_path / "cache", queue, 0.3)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert results[0][1] == results[1][1]
    assert sum(built for built, _ in results) == 1


def test_killed_build_leaves_nothing_that_counts(tmp_path):
    samples = list_samples(LAYOUT, write_cityscapes(tmp_path / "data"), "train")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_open, args=(samples, tmp_path / "cache", queue, 30))
    process.start()
    deadline = time.time() + 60
    while not list(tmp_path.glob("cache/*.tmp/labels.npy")) and time.time() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert list(tmp_path.glob("cache/*.tmp"))  # it was in the middle of it
    cached = open_cache(LAYOUT, samples, (32, 64), tmp_path / "cache", "train")
    assert len(cached.images) == 2 and not list(tmp_path.glob("cache/*.tmp"))


def test_full_disk(tmp_path, monkeypatch):
    samples = list_samples(LAYOUT, write_cityscapes(tmp_path / "data"), "train")
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.terminal_size((0, 0)) and type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="data.cache_dir="):
        open_cache(LAYOUT, samples, (32, 64), tmp_path / "cache", "train")


def test_a_cache_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/cache"):
        with pytest.raises(UserError, match="cannot be written .* give another folder with data.cache_dir="):
            streets_root(folder, 1, 1, (64, 128), 0)
        with pytest.raises(UserError, match="cannot be written .* give another folder with data.cache_dir="):
            open_cache(LAYOUTS["streets"], [], (32, 64), folder, "val")


def test_streets_are_made_once(tmp_path):
    said = []
    roots = [streets_root(tmp_path, 2, 1, (64, 128), 0, said.append) for _ in range(2)]
    assert roots[0] == roots[1] and len(said) == 1
    layout, cached = opened("streets", roots[0], (32, 64), tmp_path)
    assert len(cached["train"].names) == 2 and len(cached["val"].names) == 1


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


def test_digest_of_the_data_as_used(streets, tmp_path):
    """It knows the chosen images, their names, pixels and labels, and contours where they are wanted."""
    layout, cached = opened("streets", streets, (32, 64), tmp_path)
    train = cached["train"]
    assert train.digests[2] == digests(train.images[2], train.labels[2], train.contours[2])
    split = open_split(train, choose(8, 7, seed=0), CPU)
    assert split.digest == train.digest(split.indices) != train.digest() == train.digest(range(8))
    assert open_split(train, split.indices, CPU, contours=True).digest == train.digest(split.indices, True)
    copy = shutil.copytree(streets, tmp_path / "copy")
    assert opened("streets", copy, (32, 64), tmp_path)[1]["train"].digest() == train.digest()
    its = list_samples(layout, copy, "train")[3]
    before = [path.read_bytes() for path in its[1:]]
    image, label, instance = (np.array(Image.open(path)) for path in its[1:])
    cars = np.where(label == 26, 26000 + np.arange(64)[:, None] // 4, instance).astype(np.uint16)
    for changed, pixels in (
        ((255 - image, label, instance), True),
        ((image, label[::-1], instance[::-1]), True),
        ((image, label, cars), False),  # a network without contours knows nothing of instances
    ):
        for path, content in zip(its[1:], changed, strict=True):
            Image.fromarray(content).save(path)
        other = opened("streets", copy, (32, 64), tmp_path)[1]["train"]
        assert (other.digest() != train.digest()) == pixels and other.digest(None, True) != train.digest(None, True)
        assert other.digest([0, 1, 2, 4], True) == train.digest([0, 1, 2, 4], True)
        for path, content in zip(its[1:], before, strict=True):
            path.write_bytes(content)


@pytest.mark.parametrize("part", ["images.npy", "labels.npy", "contours.npy", "index.json", "all"])
@pytest.mark.parametrize("fault", ["removed", "empty", "cut"])
def test_a_damaged_cache_is_built_anew_and_says_so(tmp_path, part, fault):
    samples = list_samples(LAYOUT, write_cityscapes(tmp_path / "data"), "train")
    cached = open_cache(LAYOUT, samples, (32, 64), tmp_path / "cache", "train")
    digest = cached.digest(contours=True)
    for path in cached.folder.iterdir() if part == "all" else [cached.folder / part]:
        content = path.read_bytes()
        path.unlink()
        if fault != "removed":
            path.write_bytes(content[: len(content) // 2 if fault == "cut" else 0])
    said = []
    again = open_cache(LAYOUT, samples, (32, 64), tmp_path / "cache", "train", say=said.append)
    assert again.folder == cached.folder and again.digest(contours=True) == digest
    assert "is damaged (" in said[0] and str(cached.folder) in said[0]


def test_rebuilt_on_demand(tmp_path):
    """A label changed with its size and time kept is found by nothing, so there is a way to say it."""
    layout = LAYOUT._replace(instances=None)
    samples = list_samples(layout, write_cityscapes(tmp_path / "data"), "train")
    label = np.array(Image.open(samples[0].label))
    Image.fromarray(label[::-1]).save(samples[0].label, compress_level=0)  # one size, whatever is in it
    os.utime(samples[0].label, ns=(1, 1))
    before = open_cache(layout, samples, (32, 64), tmp_path / "cache", "train")
    Image.fromarray(label).save(samples[0].label, compress_level=0)
    os.utime(samples[0].label, ns=(1, 1))
    assert open_cache(layout, samples, (32, 64), tmp_path / "cache", "train").digest() == before.digest()
    after = open_cache(layout, samples, (32, 64), tmp_path / "cache", "train", rebuild=True)
    assert after.folder == before.folder and after.digest() != before.digest()


def test_one_cache_for_all_names_of_a_folder_and_older_ones_are_named(tmp_path):
    root = write_cityscapes(tmp_path / "data")
    (tmp_path / "link").symlink_to(root)
    roots = (root, tmp_path / "link", tmp_path / "data/../data")
    folders = [
        open_cache(LAYOUT, list_samples(LAYOUT, path, "train"), (32, 64), tmp_path / "cache", "train").folder
        for path in roots
    ]
    assert len(set(folders)) == 1
    samples, said = list_samples(LAYOUT, root, "train"), []
    os.utime(samples[0].label, ns=(1, 1))
    open_cache(LAYOUT, samples, (32, 64), tmp_path / "cache", "train", say=said.append)
    assert said[0].startswith("caching 2 train images at 32x64 in ")
    assert "older caches" in said[1] and str(folders[0]) in said[1]


def test_no_space_left_while_the_files_are_made(tmp_path, monkeypatch):
    """Space is taken before anything is mapped: a full disk is an error, and no signal."""
    samples = list_samples(LAYOUT, write_cityscapes(tmp_path / "data"), "train")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=r"npy: cannot be written \(No space left .* data.cache_dir="):
        open_cache(LAYOUT, samples, (32, 64), tmp_path / "cache", "train")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    monkeypatch.delattr(os, "posix_fallocate")  # macOS; or a disk without it
    cached = open_cache(LAYOUT, samples, (32, 64), tmp_path / "cache", "train")
    blocks = (cached.folder / "images.npy").stat().st_blocks
    assert 512 * blocks >= cached.images.nbytes and cached.images.any()


def test_a_complete_cache_on_a_read_only_disk_serves(tmp_path, monkeypatch):
    samples = list_samples(LAYOUT, write_cityscapes(tmp_path / "data"), "train")
    cached = open_cache(LAYOUT, samples, (32, 64), tmp_path / "cache", "train")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("mkdir", "touch", "write_text"):
        monkeypatch.setattr(f"pathlib.Path.{name}", refuse)
    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    assert open_cache(LAYOUT, samples, (32, 64), tmp_path / "cache", "train").digest() == cached.digest()
    (cached.folder / "index.json").unlink()
    with pytest.raises(UserError, match="cannot be written .Read-only"):
        open_cache(LAYOUT, samples, (32, 64), tmp_path / "cache", "train")


def test_a_lock_that_nobody_gives_back(tmp_path, monkeypatch):
    """A wait says for which file, and ends where the other process shows no life."""
    samples, said = list_samples(LAYOUT, write_cityscapes(tmp_path / "data"), "train"), []
    folder = open_cache(LAYOUT, samples, (32, 64), tmp_path / "cache", "train").folder
    shutil.rmtree(folder)
    monkeypatch.setattr("agcseg.data.cache.PATIENCE", 0.1)
    with filelock.FileLock(f"{folder}.lock"), pytest.raises(UserError, match="lock: another process .* delete the"):
        open_cache(LAYOUT, samples, (32, 64), tmp_path / "cache", "train", say=said.append)
    assert said == [f"waiting for another process that makes {folder} (its lock is {folder}.lock)"]


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
