"""The cache: what it holds, when it is built, and what may happen to its files."""

import errno
import multiprocessing
import os
import shutil
import signal
import time

import filelock
import numpy as np
import pytest
import torch
from PIL import Image
from test_data import LAYOUT, opened, write_camvid, write_cityscapes

from agcseg.data import LAYOUTS, streets_root
from agcseg.data.cache import contours, digests, open_cache
from agcseg.data.labels import IGNORE
from agcseg.data.layout import list_samples
from agcseg.data.minibatches import choose
from agcseg.errors import UserError

CPU = torch.device("cpu")


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


def test_digest_of_the_data_as_used(streets, tmp_path):
    """It knows the chosen images, their names, pixels and labels, and contours where they are wanted."""
    layout, cached = opened("streets", streets, (32, 64), tmp_path)
    train = cached["train"]
    assert train.digests[2] == digests(train.images[2], train.labels[2], train.contours[2])
    chosen = choose(8, 7, seed=0)
    assert train.digest(chosen) != train.digest() == train.digest(range(8)) != train.digest(None, True)
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
