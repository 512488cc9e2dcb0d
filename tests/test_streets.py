"""The generator of street scenes: the same seed gives the same bytes, labels are exact, the layout is Cityscapes'."""

import numpy as np
import pytest
from PIL import Image

from agcseg.data import streets
from agcseg.data.labels import CITYSCAPES
from agcseg.data.streets import make_streets, street
from agcseg.errors import UserError

SIZE = (64, 128)
THINGS = {24, 25, 26, 27, 28, 31, 32, 33}


def files(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.png")}


def scene(index, size=SIZE, seed=0):
    return street(np.random.default_rng([seed, 0, index]), size)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_streets(tmp_path_factory.mktemp("streets") / "set", train=3, val=1, size=SIZE)


def test_layout_and_modes(made):
    stems = ["train/ashford/ashford_000000_000019", "train/brixen/brixen_000000_000019",
             "train/ashford/ashford_000001_000019", "val/corvey/corvey_000000_000019"]  # fmt: skip
    modes = {
        "leftImg8bit/{}_leftImg8bit": "RGB",
        "gtFine/{}_gtFine_labelIds": "L",
        "gtFine/{}_gtFine_instanceIds": "I;16",
    }
    wanted = {pattern.format(stem) + ".png": mode for pattern, mode in modes.items() for stem in stems}
    assert set(files(made)) == set(wanted)
    for name, mode in wanted.items():
        with Image.open(made / name) as image:
            assert (image.mode, image.size) == (mode, (SIZE[1], SIZE[0])), name


def test_files_hold_what_street_returns(made):
    image, labels, instances = scene(1)
    stem = "train/brixen/brixen_000000_000019"
    assert (np.asarray(Image.open(made / f"leftImg8bit/{stem}_leftImg8bit.png")) == image).all()
    assert (np.asarray(Image.open(made / f"gtFine/{stem}_gtFine_labelIds.png")) == labels).all()
    assert (np.asarray(Image.open(made / f"gtFine/{stem}_gtFine_instanceIds.png")) == instances).all()


def test_same_seed_same_bytes(made, tmp_path):
    assert files(make_streets(tmp_path / "again", train=3, val=1, size=SIZE)) == files(made)
    other = files(make_streets(tmp_path / "other", train=3, val=1, size=SIZE, seed=1))
    assert all(other[name] != data for name, data in files(made).items())


def test_a_scene_does_not_depend_on_how_many_there_are(made, tmp_path):
    fewer, all_files = files(make_streets(tmp_path / "fewer", train=2, val=0, size=SIZE)), files(made)
    assert len(fewer) == 6
    assert all(all_files[name] == data for name, data in fewer.items())


def test_labels_and_instances():
    seen = np.zeros(256, int)
    for index in range(60):
        image, labels, instances = scene(index)
        assert (image.dtype, labels.dtype, instances.dtype) == (np.uint8, np.uint8, np.uint16)
        assert set(np.unique(labels)) <= set(CITYSCAPES.from_file)
        thing = np.isin(labels, list(THINGS))
        assert (instances[thing] // 1000 == labels[thing]).all()
        assert (instances[~thing] == labels[~thing]).all()
        seen[np.unique(CITYSCAPES.lookup()[labels])] += 1
    assert (seen[: len(CITYSCAPES)] >= 3).all(), dict(zip(CITYSCAPES.names, seen, strict=False))
    assert 0 < seen[255] < 60


def test_another_size_shows_the_same_street():
    small, large = scene(4, (64, 128))[1], scene(4, (128, 256))[1]
    assert (small == large[::2, ::2]).mean() > 0.9


@pytest.mark.parametrize("size", [(96, 160), (65, 131), (64, 64)])
def test_odd_sizes(size):
    for index in range(3):
        image, labels, instances = scene(index, size)
        assert image.shape == (*size, 3)
        assert labels.shape == instances.shape == size


def test_an_empty_folder_is_taken_and_a_full_one_refused(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    assert make_streets(str(root), train=1, val=0, size=SIZE) == root
    before = files(root)
    with pytest.raises(UserError, match="not an empty folder"):
        make_streets(root, train=1, val=0, size=SIZE)
    assert files(root) == before


@pytest.mark.parametrize("wrong", [{"train": -1}, {"seed": -1}, {"size": (8, 256)}])
def test_numbers_out_of_range(tmp_path, wrong):
    with pytest.raises(UserError, match="or more"):
        make_streets(tmp_path / "set", **wrong)


def test_nothing_is_left_when_interrupted(tmp_path, monkeypatch):
    calls = []

    def interrupted(rng, size):
        calls.append(size)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return street(rng, size)

    monkeypatch.setattr(streets, "street", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_streets(tmp_path / "set", train=4, val=0, size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_progress_sees_every_scene(tmp_path):
    seen = []

    def progress(jobs):
        for job in jobs:
            seen.append(job)
            yield job

    make_streets(tmp_path / "set", train=2, val=1, size=SIZE, progress=progress)
    assert len(seen) == 3
