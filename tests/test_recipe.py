"""Optimiser, schedule, averages, augmentation and the best checkpoint: off by default, the same after a resume."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch
from test_config import config
from torch import nn

import agcseg
from agcseg.check import check
from agcseg.cli import eval as cli_eval
from agcseg.config import AugmentConfig, Config, RateConfig, rate
from agcseg.data.augment import augmented, transform
from agcseg.data.labels import IGNORE
from agcseg.data.minibatches import Split, minibatches
from agcseg.errors import UserError
from agcseg.record.checkpoint import load_checkpoint
from agcseg.record.environment import environment
from agcseg.training.recipe import make_average, make_optimizer, make_schedule, parameter_groups
from agcseg.training.run import run

CPU = torch.device("cpu")
STANDARD = {"scale": (0.5, 2.0), "flip": 0.5, "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.05}


def rates(**values) -> list[float]:
    made = Config(**values)
    optimizer = make_optimizer(nn.Linear(1, 1), made)
    schedule, seen = make_schedule(optimizer, made), []
    for _ in range(made.epochs):
        seen.append(optimizer.param_groups[1]["lr"])
        optimizer.step()
        if schedule:
            schedule.step()
    return seen


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("schedule", ["constant", "poly", "cosine", "step"])
def test_the_rate_of_each_epoch(schedule, warmup):
    """Against the formula in `make_schedule`."""
    expected, epochs, full = [], 12, 0.08
    for e in range(1, epochs + 1):
        t, T = e - warmup - 1, epochs - warmup
        factor = {
            "constant": 1,
            "poly": (1 - max(t, 0) / T) ** 0.9,
            "cosine": (1 + math.cos(math.pi * t / T)) / 2,
            "step": 0.5 ** (t // 4),
        }[schedule]
        expected.append(full * (e / (warmup + 1) if e <= warmup else factor))
    lr = RateConfig(step_epochs=4, step_factor=0.5)
    assert rates(schedule=schedule, warmup=warmup, epochs=epochs, lr=lr) == pytest.approx(expected)
    assert min(expected) > 0
    if schedule == "constant" and not warmup:
        assert make_schedule(make_optimizer(nn.Linear(1, 1), Config()), Config()) is None


def test_optimisers():
    network = nn.Linear(2, 2)
    sgd = make_optimizer(network, Config(nesterov=True, weight_decay=0.1))
    assert type(sgd) is torch.optim.SGD and all(group["nesterov"] for group in sgd.param_groups)
    adamw = make_optimizer(network, Config(optimizer="adamw", lr=RateConfig(value=0.001), weight_decay=0.1))
    assert type(adamw) is torch.optim.AdamW
    assert [(g["lr"], g["betas"], g["weight_decay"]) for g in adamw.param_groups] == [
        (0.001, (0.9, 0.999), 0.1),
        (0.001, (0.9, 0.999), 0.0),
    ]


class Wide(nn.Module):
    """A norm of others whose γ has four dimensions."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 3, 1, 1))


def test_decay_by_module_not_by_dimension():
    WideNorm = type("GlobalResponseNorm", (Wide,), {})
    network = nn.Sequential(
        nn.Conv2d(3, 3, 1), WideNorm(), nn.LayerNorm((3, 2, 2)), agcseg.AGC2d(3), agcseg.nn.NORMS["dyt"](3),
        agcseg.nn.NORMS["ws"](3), nn.Linear(2, 2),
    )  # fmt: skip
    filters, others = (group["params"] for group in parameter_groups(network, 0.1))
    assert [id(p) for p in filters] == [id(network[0].weight), id(network[6].weight)]
    assert len(others) == len(list(network.parameters())) - 2


@pytest.mark.parametrize("norm", agcseg.nn.NORMS)
def test_decay_in_the_papers_networks_is_as_by_dimension(norm):
    network = agcseg.build("segnet", norm=norm, width=0.05)
    filters, others = (group["params"] for group in parameter_groups(network, 0.1))
    assert all(a is b for a, b in zip(filters, [p for p in network.parameters() if p.dim() > 1], strict=True))
    assert all(a is b for a, b in zip(others, [p for p in network.parameters() if p.dim() <= 1], strict=True))


def test_the_average_is_exponential():
    network = nn.BatchNorm2d(2)
    network.register_buffer("positions", torch.arange(-8, 160))
    average, expected = make_average(network, Config(ema=0.9)), None
    for step in range(4):
        nn.init.constant_(network.weight, step)
        network.running_mean.fill_(step)
        average.update_parameters(network)
        expected = step if expected is None else 0.9 * expected + 0.1 * step
    assert average.module.weight.tolist() == pytest.approx([expected] * 2)
    assert average.module.running_mean.tolist() == pytest.approx([expected] * 2)
    assert torch.equal(average.module.positions, network.positions)  # of integers there is no average
    assert make_average(network, Config()) is None


def pictures(n=6, size=(32, 48)):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8, generator=generator)
    labels = images[:, 0] // 32  # a picture's labels and contours can be told from its red
    return images, labels, (images[:, 0] > 200).to(torch.uint8)


def test_truth_goes_with_the_image():
    """Scaled, cut and mirrored together: without interpolation of the image, its labels can be told from it."""
    images, labels, contours = pictures()
    how = transform((32, 48), flip=0.5, crop=(16, 24))
    images, labels, contours = augmented(how, (1, 2), range(6), images, labels, contours)
    assert images.shape == (6, 3, 16, 24) and labels.shape == contours.shape == (6, 16, 24)
    assert torch.equal(labels, images[:, 0] // 32) and torch.equal(contours, (images[:, 0] > 200).to(torch.uint8))


@pytest.mark.parametrize("scale", [0.6, 0.9, 1.3, 1.9])
def test_truth_lies_where_the_image_does(scale):
    """Not half a pixel beside it: of ramps to the right and down, as image and as labels."""
    ramps = torch.stack([torch.arange(48).expand(32, 48), torch.arange(32)[:, None].expand(32, 48)]) * 5
    images, labels = ramps[:, None].expand(2, 3, 32, 48).to(torch.uint8), ramps.to(torch.uint8)
    images, labels = augmented(transform((32, 48), scale=(scale, scale)), (1, 2), range(2), images, labels)
    inside = labels != IGNORE
    for image, label, there in zip(images[:, 0].float(), labels.float(), inside, strict=True):
        apart = (image - label)[there] / 5 * scale  # in pixels of the result
        assert apart.abs().mean() > 0.01 and apart.mean().abs() < 0.1


def test_what_lies_beyond_the_image_does_not_count():
    images, labels, contours = pictures()
    images[:] = 200
    labels[:], contours[:] = 3, 1
    small = transform((32, 48), scale=(0.5, 0.5), hue=0.3)  # which leaves grey as it is
    images, labels, contours = augmented(small, (1, 2), range(6), images, labels, contours)
    inside = labels != IGNORE
    assert inside.sum((1, 2)).tolist() == [16 * 24] * 6 and (labels[inside] == 3).all()
    assert (images[:, 0][~inside] == 124).all() and (images[:, 0][inside] == 200).all()
    assert torch.equal(contours, inside.to(torch.uint8)) and images.dtype == labels.dtype == torch.uint8


def test_colours_are_the_images_alone_and_large_scales_fill_the_frame():
    images, labels, _ = pictures()
    how = transform((32, 48), brightness=0.3, hue=0.1)
    changed, same = augmented(how, (1, 2), range(6), images, labels)
    assert torch.equal(same, labels) and not torch.equal(changed, images)
    _, labels = augmented(transform((32, 48), scale=(1.5, 2.0)), (1, 2), range(6), images, labels)
    assert labels.shape == (6, 32, 48) and (labels != IGNORE).all()
    assert transform((32, 48)) is None


def test_a_picture_hangs_on_seed_epoch_and_place_alone():
    images, labels, _ = pictures()
    how, state = transform((32, 48), **STANDARD), torch.get_rng_state()
    whole = augmented(how, (1, 2), range(6), images, labels)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    some = augmented(how, (1, 2), [4, 1], images[[4, 1]], labels[[4, 1]])
    assert all(torch.equal(a[[4, 1]], b) for a, b in zip(whole, some, strict=True))
    for drawn in ((1, 3), (2, 2)):
        other = augmented(how, drawn, range(6), images, labels)
        assert not any(torch.equal(a, b) for a, b in zip(whole[0], other[0], strict=True))


def test_minibatches_of_processes_and_of_a_choice_are_the_same_pictures():
    images, labels, contours = pictures(8)
    how = transform((32, 48), **STANDARD)
    chosen = np.array([1, 3, 4, 5, 7])
    mapped = Split(images, labels, chosen, list("bdefh"), contours)
    moved = Split(images[chosen], labels[chosen], np.arange(5), list("bdefh"), contours[chosen])
    whole = list(minibatches(mapped, 4, CPU, (1, 1), augment=how))
    for a, b in zip(whole, minibatches(moved, 4, CPU, (1, 1), augment=how), strict=True):
        assert all(map(torch.equal, a, b))
    for k in (0, 1):
        (share,) = minibatches(mapped, 4, CPU, (1, 1), share=(k, 2), augment=how)
        assert all(torch.equal(part[k::2], own) for part, own in zip(whole[0], share, strict=True))


def test_the_order_is_that_of_the_indices():
    """As ever: a permutation of the chosen images, not of their places."""
    chosen = np.array([1, 3, 4, 5, 7])
    for seed in range(20):
        places = np.random.default_rng((seed, 1)).permutation(np.arange(5))
        assert (chosen[places] == np.random.default_rng((seed, 1)).permutation(chosen)).all()


def full(tiny, **values):
    augment = AugmentConfig("standard", [0.5, 2.0], [32, 32], 0.5, 0.3, 0.3, 0.3, 0.05)
    values = {"schedule": "poly", "warmup": 1, "clip_norm": 0.5, "ema": 0.9, "augment": augment, "epochs": 4, **values}
    return tiny("bn", nesterov=True, weight_decay=1e-4, **values)


def test_everything_on_goes_on_as_if_it_had_not_stopped(tiny, tmp_path, monkeypatch):
    straight = run(full(tiny), tmp_path / "straight")
    from agcseg.record.record import Record

    add = Record.add

    def stop(self, state, *rest):
        add(self, state, *rest)
        if state.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Record, "add", stop)
        patch.setattr("agcseg.record.record.time.monotonic", iter(range(0, 10**6, 10**4)).__next__)
        with pytest.raises(KeyboardInterrupt):
            run(full(tiny), tmp_path / "stopped")
    assert load_checkpoint(tmp_path / "stopped/last.pt")["epoch"] == 2
    again = run(full(tiny), tmp_path / "stopped")
    for key in ("pixel_error", "val_loss", "train_loss", "gradient_norm", "rate"):
        assert again[key] == straight[key], key
    for name in ("last.pt", "best.pt"):
        one, other = (load_checkpoint(tmp_path / folder / name) for folder in ("straight", "stopped"))
        assert one["epoch"] == other["epoch"]
        assert all(torch.equal(value, other["network"][key]) for key, value in one["network"].items())
    saved = load_checkpoint(tmp_path / "straight/last.pt")
    assert all(torch.equal(v, other_v) for v, other_v in zip(
        saved["average"].values(), load_checkpoint(tmp_path / "stopped/last.pt")["average"].values(), strict=True
    ))  # fmt: skip
    with open(tmp_path / "straight/metrics.csv") as file:
        written = [float(row["rate"]) for row in csv.DictReader(file)]
    assert written == pytest.approx(rates(schedule="poly", warmup=1, epochs=4))
    with pytest.raises(UserError, match="epochs: 4 there, 6 here"):  # another length is another schedule
        run(full(tiny, epochs=6), tmp_path / "straight")


def test_accumulation_sees_the_same_pictures(tiny, tmp_path):
    losses = []
    for parts in (1, 2):
        made = full(tiny, accumulate=parts)
        made.norm.name, made.epochs, made.warmup = "agc", 1, 0
        run(made, tmp_path / str(parts))
        losses.append(torch.from_numpy(np.load(tmp_path / f"{parts}/steps.npy")))
    torch.testing.assert_close(*losses)


def test_the_average_is_validated_saved_and_loaded(tiny, tmp_path):
    run(tiny(ema=0.999, epochs=1), tmp_path / "run")
    saved, trained = load_checkpoint(tmp_path / "run/last.pt"), agcseg.load(tmp_path / "run")
    own = trained.network.state_dict()
    assert all(torch.equal(value, saved["average"][f"module.{key}"]) for key, value in own.items())
    assert not all(torch.equal(value, saved["network"][key]) for key, value in own.items())
    assert cli_eval.main([str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run/eval-streets-val-training.json").read_text())["pixel_error"]
    assert found == pytest.approx(json.loads((tmp_path / "run/result.json").read_text())["pixel_error"], abs=1e-3)


def test_clipping(tiny, tmp_path):
    """The step is as long as the clipped gradient; what is told of it is its norm before."""
    moved = {}
    for clip in (None, 1e-6):
        run(tiny(clip_norm=clip, epochs=1, momentum=0.0), tmp_path / str(clip))
        saved = load_checkpoint(tmp_path / f"{clip}/last.pt")
        moved[clip] = saved["network"], saved["rows"][0]["gradient_norm"], saved["rows"][0]["train_loss"]
    torch.manual_seed(1)
    start = agcseg.build("segnet", width=0.05, init="he_centered").state_dict()
    far, near = (sum((net[k] - v).square().sum() for k, v in start.items()).sqrt() for net, _, _ in moved.values())
    assert 0 < near <= 2 * 0.08 * 1e-6 * 1.5 and far > 1e3 * near and moved[1e-6][1] > 1e-3


def test_best_is_the_epoch_with_the_lowest_error(tiny, tmp_path, monkeypatch):
    errors = iter([0.5, 0.3, 0.4, 0.3])
    from agcseg.training import run as module

    validate = module.validate

    def told(*arguments):
        figures, *rest = validate(*arguments)
        return figures | {"pixel_error": next(errors)}, *rest

    monkeypatch.setattr(module, "validate", told)
    run(tiny(epochs=4), tmp_path / "run")
    assert agcseg.load(tmp_path / "run").epoch == 4
    best = agcseg.load(tmp_path / "run", "best")
    assert best.epoch == 2 and best.path.name == "best.pt" and agcseg.load(tmp_path / "run/best.pt").epoch == 2
    assert "optimizer" not in load_checkpoint(tmp_path / "run/best.pt")
    assert cli_eval.main([str(tmp_path / "run"), "checkpoint=best"]) == 0
    assert json.loads((tmp_path / "run/eval-streets-val-training-best.json").read_text())["epoch"] == 2
    with pytest.raises(UserError, match="checkpoint=first: choose from last, best"):
        agcseg.load(tmp_path / "run", "first")
    (tmp_path / "run/best.pt").unlink()
    with pytest.raises(UserError, match="holds no best.pt"):
        agcseg.load(tmp_path / "run", "best")


def test_environment(tiny, tmp_path):
    run(tiny(epochs=1), tmp_path / "run")
    found = json.loads((tmp_path / "run/environment.json").read_text())
    assert found == environment(CPU)
    assert found["torch"] == torch.__version__ and found["packages"]["numpy"] == np.__version__
    assert found["agcseg"] == agcseg.__version__ and found["device"] and found["driver"] is None and found["command"]


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_commit_and_changes(tmp_path, monkeypatch):
    import subprocess

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        )

    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setattr(agcseg, "__file__", str(tmp_path / "__init__.py"))
    assert (environment(CPU)["commit"], environment(CPU)["clean"]) == (None, None)
    git("init"), git("add", "."), git("commit", "-m", "one")
    assert (environment(CPU)["commit"], environment(CPU)["clean"]) == (git("rev-parse", "HEAD").stdout.strip(), True)
    (tmp_path / "__init__.py").write_text("changed = 1")
    assert environment(CPU)["clean"] is False


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule=linear"], "schedule=linear: choose from constant, poly, cosine, step"),
        (["optimizer=adam"], "optimizer=adam: choose from sgd, adamw"),
        (["optimizer=adamw"], "optimizer=adamw: its rate does not go with the minibatch; give lr.value=0.001"),
        (["optimizer=adamw", "lr.value=0.001", "nesterov=true"], "nesterov=true: of optimizer=sgd only"),
        (["nesterov=true", "momentum=0"], "nesterov=true: needs a momentum"),
        (["warmup=150"], "warmup=150: must be at least 0 and below epochs=150"),
        (["lr.power=0"], "lr.power=0.0: must be positive"),
        (["lr.step_factor=2"], "lr.step_factor=2.0: must be above 0 and at most 1"),
        (["clip_norm=0"], "clip_norm=0.0: must be positive and finite, or null"),
        (["ema=1"], "ema=1.0: must be above 0 and below 1"),
        (["ema=0"], "ema=0.0: must be above 0 and below 1"),
        (["augment.crop=[288,512]"], "augment.crop=[288, 512]: is larger than the images, data.size=[256, 512]"),
        (["augment.crop=[100,512]"], "augment.crop=[100, 512]: segnet takes [height,width] in multiples of 32"),
        (["augment.scale=[2,1]"], "augment.scale=[2.0, 1.0]: must be [smallest,largest]"),
        (["augment.flip=2"], "augment.flip=2.0: a probability"),
        (["augment.hue=0.6"], "augment.hue=0.6: must be from 0 to 0.5"),
        (["augment.contrast=-1"], "augment.contrast=-1.0: must be from 0 to 100"),
        (["augment=flip", "data.flip=true"], "data.flip=true: augment.flip does it already"),
    ],
)
def test_bad_recipes_are_refused(overrides, message):
    with pytest.raises(UserError) as error:
        check(config(*overrides))
    assert message in str(error.value)


@pytest.mark.parametrize("augment", ["none", "flip", "standard"])
def test_augmentations_by_name(augment):
    made = config(f"augment={augment}")
    check(made)
    assert made.augment.name == augment and rate(made) == 0.08
    assert (made.augment.flip, made.augment.scale != [1, 1]) == {"none": (0, False), "flip": (0.5, False)}.get(
        augment, (0.5, True)
    )
