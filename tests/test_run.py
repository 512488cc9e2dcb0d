"""The run: what it leaves, how it goes on, what it refuses. Tiny networks on tiny streets."""

import csv
import dataclasses
import errno
import io
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import agcseg.losses
import agcseg.record.folder
import agcseg.record.record
import agcseg.training.passes
import agcseg.training.run
import agcseg.training.step
from agcseg.config import GemsConfig, NetworkConfig, NoiseConfig, NormConfig, RateConfig
from agcseg.errors import UserError
from agcseg.losses import segmentation_loss
from agcseg.networks import build, segnet
from agcseg.record.files import write, write_json
from agcseg.record.folder import new_folder
from agcseg.record.identity import differences
from agcseg.record.tensorboard import TensorBoard
from agcseg.training.lines import Bar
from agcseg.training.machine import added_memory, idle_memory, keeping, reset_peak_memory
from agcseg.training.recipe import parameter_groups
from agcseg.training.run import run
from agcseg.training.state import begin

replace = dataclasses.replace


def rows(folder, name="metrics.csv"):
    with open(folder / name) as file:
        return list(csv.DictReader(file))


TIMED = ("images_per_second", "seconds", "peak_memory_mib", "training_memory_mib")


def untimed(folder):
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows(folder)]


def weights(folder):
    return torch.load(folder / "last.pt", weights_only=True)["network"]


def scalars(folder, tag):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_run_leaves_a_complete_record(tiny, tmp_path):
    config, folder = tiny(minibatch=2, epochs=3), tmp_path / "run"
    result = run(config, folder)
    assert result["state"] == "finished" and result["epochs"] == 3
    assert result == json.loads((folder / "result.json").read_text())
    table = rows(folder)
    assert [row["epoch"] for row in table] == ["1", "2", "3"] and table[-1]["samples"] == "24"
    assert float(table[-1]["rate"]) == pytest.approx(0.04)
    assert 0 < float(table[-1]["pixel_error"]) < 1 and 0 < result["commonest_class_error"] < 1
    expected = {"train_loss", "val_loss", "miou", "gradient_norm", "iou/road", "kept_for_backward_mib", *TIMED}
    assert expected <= table[0].keys()
    steps = np.load(folder / "steps.npy")
    assert steps.shape == (3, 4, 1) and steps.dtype == np.float32
    assert steps.mean((1, 2)) == pytest.approx([float(row["train_loss"]) for row in table])
    layers = rows(folder, "layers.csv")
    assert len(layers) == 4 * 25 and {row["role"] for row in layers} == {"encoder", "decoder"}
    assert all(row["lambda_mean"] == row["gamma_mean"] == "1.0" for row in layers[:25])
    for row in layers[25:]:
        ordered = [float(row[key]) for key in ("lambda_min", "lambda_q05", "lambda_q50", "lambda_q95", "lambda_max")]
        assert ordered == sorted(ordered) and 0 <= float(row["lambda_inside"]) <= 1
    for row in layers:
        assert 0 < float(row["common_mode"]) < 1 and 0 <= float(row["active"]) < 1
        assert 0 <= int(row["dead"]) <= int(row["num_features"]) and row["kernel_size"] == "3"
    assert (layers[0]["height"], layers[0]["width"]) == ("32", "64") != (layers[5]["height"], layers[5]["width"])
    lambdas = np.load(folder / "lambdas.npz")
    assert lambdas["step"].tolist() == [0, 1, 2, 4, 8, 12]  # 4 steps per epoch
    assert lambdas.files[1:] == [row["layer"] for row in layers[:25]]
    assert (lambdas["encoder.0.0"][0] == 1).all() and (np.ptp(lambdas["encoder.0.0"], axis=0) > 0).any()
    assert lambdas[layers[-1]["layer"]][-1].mean() == pytest.approx(float(layers[-1]["lambda_mean"]))
    images = rows(folder, "images.csv")
    shares = [int(row["wrong_pixels"]) / int(row["labelled_pixels"]) for row in images]
    assert np.mean(shares) == pytest.approx(float(table[-1]["pixel_error"])) and len(images) == len(
        set(map(str, images))
    )
    assert np.mean([float(row["loss"]) for row in images]) == pytest.approx(float(table[-1]["val_loss"]))
    assert result["processes"] == 1 and result["device"]
    assert "minibatch: 2" in (folder / "config.yaml").read_text()
    assert json.loads((folder / "class_weights.json").read_text())["mean"] == pytest.approx(1)
    assert list((tmp_path / "cache").glob("streets-train-*-enet-8-choice0.json"))
    assert (folder / "predictions.png").stat().st_size > 500
    assert "epoch   3/3" in (folder / "run.log").read_text()
    assert [step for step, _ in scalars(folder, "curves/pixel_error")] == [1, 2, 3]
    assert [step for step, _ in scalars(folder / "samples", "curves_by_samples/pixel_error")] == [8, 16, 24]
    assert len(scalars(folder, "lambda_mean/encoder.0.0")) == 3 and len(scalars(folder, "lambda_q95/decoder.0.1")) == 3
    saved = torch.load(folder / "last.pt", weights_only=True)
    assert (
        saved["classes"]["names"][0] == "road" and saved["normalisation"]["mean"] and saved["config"]["minibatch"] == 2
    )
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["samples"]  # no extra TensorBoard run


def points(folder):
    """Every point that TensorBoard shows, but for times."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
    timed = tuple(f"run/{key}" for key in TIMED)
    found = {
        tag: [(e.step, None if tag in timed else e.value) for e in events.Scalars(tag)] for tag in events.scalars.Keys()
    }
    found |= {tag: [(e.step, e.encoded_image_string) for e in events.Images(tag)] for tag in events.images.Keys()}
    found |= {tag: [(e.step, str(e.tensor_proto)) for e in events.Tensors(tag)] for tag in events.tensors.Keys()}
    return {tag: sorted(map(repr, points)) for tag, points in found.items()}


def files(folder):
    """Everything that a run left in its folder, but for times: what is in each file, and the points of TensorBoard."""
    left = {}
    for path in folder.iterdir():
        if path.name == "last.pt":
            saved = torch.load(path, weights_only=True)
            for row in saved["rows"]:
                row.update(dict.fromkeys(TIMED))
            left["last.pt"] = {key: repr(value) for key, value in saved.items() if key not in ("events", "network")}
            left["weights"] = [(key, value.numpy().tobytes()) for key, value in saved["network"].items()]
            left["momentum"] = [s["momentum_buffer"].numpy().tobytes() for s in saved["optimizer"]["state"].values()]
        elif path.name == "best.pt":
            best = torch.load(path, weights_only=True)
            weights = [(key, value.numpy().tobytes()) for key, value in best["network"].items()]
            left["best.pt"] = best["epoch"], weights
        elif path.name == "metrics.csv":
            left[path.name] = untimed(folder)
        elif path.name == "result.json":
            left[path.name] = json.loads(path.read_text()) | dict.fromkeys(TIMED)
        elif path.name == "environment.json":  # somebody may edit or commit while the tests run
            left[path.name] = json.loads(path.read_text()) | dict.fromkeys(("commit", "clean"))
        elif path.is_file() and "tfevents" not in path.name and path.name not in ("run.log", ".lock"):
            left[path.name] = path.read_bytes()
    return left | points(folder) | {f"by samples: {tag}": found for tag, found in points(folder / "samples").items()}


@pytest.mark.parametrize(
    ("network", "norm", "epochs", "save_every"),
    [("segnet", "agc", 2, 0), ("segnet", "bn", 3, 1e9), pytest.param("classnet", "agc", 2, 0, marks=pytest.mark.slow)],
)
def test_killed_at_any_write_and_straight_runs_are_equal(
    tiny, tmp_path, monkeypatch, network, norm, epochs, save_every
):
    """Whatever is on the disk at any moment between two writes goes on to what a straight run leaves."""
    config = tiny(norm, network=NetworkConfig(network, width=0.02), epochs=epochs, minibatch=1, save_every=save_every)
    config.data.size = [32, 64] if network == "segnet" else [128, 128]
    config.data.train_images, config.data.val_images = 2, 1
    folder, moments = tmp_path / "straight", []

    def watched(original):
        def write(*arguments, **options):
            moments.append(shutil.copytree(folder, tmp_path / str(len(moments))))
            return original(*arguments, **options)

        return write

    monkeypatch.setattr(segnet, "STAGES", segnet.STAGES[:2])  # there are some forty runs
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", watched(os.replace))
        patch.setattr(SummaryWriter, "flush", watched(SummaryWriter.flush))
        run(config, folder)
    straight = files(folder)
    saved = {len(torch.load(moment / "last.pt")["rows"]) for moment in moments if (moment / "last.pt").exists()}
    assert saved == ({1, 3} if save_every else set(range(1, epochs + 1))) and len(moments) > 20
    for moment in moments:
        assert run(config, moment)["epochs"] == epochs
        left = files(moment)
        assert left.keys() == straight.keys()  # no half-written file either
        assert [key for key in left if left[key] != straight[key]] == []


def test_what_is_not_finite_is_null_in_json(tmp_path):
    write_json(tmp_path / "a.json", {"contour_f": math.nan, "rows": [{"loss": math.inf}, 1.5, True], "pair": (1, None)})
    expected = {"contour_f": None, "rows": [{"loss": None}, 1.5, True], "pair": [1, None]}
    assert json.loads((tmp_path / "a.json").read_text()) == expected


def test_a_kill_within_an_epoch_costs_that_epoch(tiny, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*arguments):
        raise Killed

    config = tiny(epochs=3)
    run(config, tmp_path / "straight")
    run(replace(config, epochs=1), tmp_path / "broken")
    with monkeypatch.context() as patch:
        patch.setattr(agcseg.training.run, "validate", killed)
        with pytest.raises(Killed):
            run(config, tmp_path / "broken")
    assert not (tmp_path / "broken/result.json").exists()
    run(config, tmp_path / "broken")
    assert files(tmp_path / "broken") == files(tmp_path / "straight")


def test_interrupted_run_with_noise_and_gems_is_bit_identical(tiny, tmp_path):
    """Both go on where they were: the noise's generator and the averages of GEMS are in the checkpoint."""
    config = tiny(epochs=3, noise=NoiseConfig(0.2, 0.2), gems=GemsConfig("minibatch", ema=0.9, gate="grad"))
    run(config, tmp_path / "straight")
    run(replace(config, epochs=2), tmp_path / "broken")
    run(config, tmp_path / "broken")
    straight, broken = weights(tmp_path / "straight"), weights(tmp_path / "broken")
    assert all(torch.equal(straight[key], broken[key]) for key in straight)
    assert untimed(tmp_path / "straight") == untimed(tmp_path / "broken")
    assert 1 <= scalars(tmp_path / "straight", "gems_mean/encoder.0.1")[-1][1] <= 10


def test_noise_leaves_images_and_initial_weights_as_they_are(tiny, tmp_path, monkeypatch):
    original, seen = agcseg.training.step.backward, []

    def watched(model, images, *arguments):
        seen.append((images.sum().item(), model.encoder[0][0].conv.weight.sum().item(), model.training))
        return original(model, images, *arguments)

    monkeypatch.setattr(agcseg.training.step, "backward", watched)
    for name, noise in (("plain", NoiseConfig()), ("noisy", NoiseConfig(0.1, 0.1))):
        run(tiny(noise=noise), tmp_path / name)
    plain, noisy = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert plain[0] == noisy[0] and [images for images, *_ in plain] == [images for images, *_ in noisy]
    assert plain[1][1] != noisy[1][1]  # the weights go their own way
    assert untimed(tmp_path / "plain") != untimed(tmp_path / "noisy")


@pytest.mark.parametrize("gems", [GemsConfig("map"), GemsConfig("minibatch", limit=1)])
def test_gems(tiny, tmp_path, gems):
    """Accumulation changes nothing, and a limit of 1 is as good as off."""
    config = tiny(minibatch=4, epochs=1, gems=gems, network=NetworkConfig(width=0.05, implementation="literal"))
    run(config, tmp_path / "whole")
    run(replace(config, accumulate=2), tmp_path / "parts")
    run(replace(config, gems=GemsConfig()), tmp_path / "off")
    whole, parts, off = (weights(tmp_path / name) for name in ("whole", "parts", "off"))
    for key in whole:
        torch.testing.assert_close(parts[key], whole[key], rtol=1e-3, atol=1e-5)
    assert all(torch.equal(whole[key], off[key]) for key in whole) == (gems.limit == 1)


def test_momentum_match_reaches_the_optimiser(tiny, tmp_path):
    run(tiny(minibatch=1, epochs=1, momentum_match=8), tmp_path / "run")
    group = torch.load(tmp_path / "run/last.pt", weights_only=True)["optimizer"]["param_groups"][0]
    assert (group["momentum"], group["lr"]) == pytest.approx((0.9875, 0.0025))


def test_noise_of_another_kind_of_device_begins_anew(tiny):
    """A GPU's generator has another state, of 16 bytes."""
    state = begin(tiny(noise=NoiseConfig(0.1)), 19, 4, torch.device("cpu"))
    own = state.noise.get_state()
    state.load(state.saved() | {"noise": [torch.zeros(16, dtype=torch.uint8)]})
    assert torch.equal(state.noise.get_state(), own)
    state.load(state.saved() | {"noise": [torch.Generator().manual_seed(5).get_state()]})
    assert state.noise.initial_seed() == 5


@pytest.mark.parametrize("before", [False, True])
def test_momentum_follows_its_weights_into_another_memory_layout(tiny, before):
    """A fused optimiser pairs weights and buffers as they lie in memory."""
    states, images = [], torch.randn(2, 3, 32, 64)
    for channels_last in (before, before, not before):
        state = begin(tiny(momentum=0.9, channels_last=channels_last), 19, 4, torch.device("cpu"))
        if states:
            state.load(states[0].saved() | {"rows": []})
        for step in range(1 if states else 2):
            state.optimizer.zero_grad()
            (state.network(images) * torch.linspace(0, 1 + step, 19).view(-1, 1, 1)).mean().backward()
            state.optimizer.step()
        states.append(state)
    _, straight, other = (dict(state.network.named_parameters()) for state in states)
    assert all(torch.allclose(straight[key], other[key], atol=1e-5, rtol=1e-3) for key in straight)


def test_same_seed_same_run_other_seed_other_run(tiny, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tiny(seed=seed), tmp_path / name)
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b") != untimed(tmp_path / "c")


def test_finished_run_is_skipped_and_can_be_prolonged(tiny, tmp_path):
    first = run(tiny(epochs=2), tmp_path / "run")
    written = (tmp_path / "run/last.pt").stat().st_mtime_ns
    assert run(tiny(epochs=2), tmp_path / "run") == first
    assert (tmp_path / "run/last.pt").stat().st_mtime_ns == written
    assert run(tiny(epochs=3), tmp_path / "run")["epochs"] == 3
    run(tiny(epochs=3), tmp_path / "straight")
    assert untimed(tmp_path / "run") == untimed(tmp_path / "straight")


def test_resume_false_makes_a_folder_that_is_nobody_elses(tmp_path):
    """Also when many ask at the same time."""
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: new_folder(tmp_path / "a/run"), range(40)))
    assert len(set(made)) == 40 and made[0].parent == tmp_path / "a"


def test_resume_false_starts_beside(tiny, tmp_path):
    run(tiny(epochs=1), tmp_path / "run")
    before = (tmp_path / "run/last.pt").read_bytes()
    run(tiny(epochs=1, resume=False), tmp_path / "run")
    assert (tmp_path / "run-2/result.json").exists() and (tmp_path / "run/last.pt").read_bytes() == before


def test_another_run_in_the_folder_is_refused_and_kept(tiny, tmp_path):
    run(tiny(epochs=1), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    for epochs in (1, 2):  # finished, and to be prolonged
        with pytest.raises(UserError) as error:
            run(tiny(epochs=epochs, momentum=0.5), tmp_path / "run")
        assert "momentum: 0.9 there, 0.5 here" in str(error.value) and "name=" in str(error.value)
    log = tmp_path / "run/run.log"
    assert {path: path.read_bytes() for path in before if path != log} == {p: b for p, b in before.items() if p != log}


def test_what_makes_two_runs_the_same(tiny, monkeypatch, tmp_path):
    """Decided from what takes effect, wherever things lie and however a key is written."""
    monkeypatch.chdir(tmp_path)

    def differ(one, other, processes=(1, 1)):
        runs = [
            {"config": dataclasses.asdict(config), "processes": n}
            for config, n in zip((one, other), processes, strict=True)
        ]
        return differences(*runs)

    plain, bn = tiny(), tiny("bn")
    assert not differ(plain, tiny(epochs=9, device="cuda", images=0, compile=True, save_every=1, deterministic=True))
    assert not differ(plain, tiny(lr=RateConfig(value=0.08))) and differ(plain, tiny(lr=RateConfig(value=0.081)))
    assert not differ(tiny(minibatch=1, momentum_match=4), tiny(minibatch=1, momentum=0.975, lr=RateConfig(0.005)))
    places = ("a/run", "./a/run/last.pt", f"../{tmp_path.name}/a/run", str(tmp_path / "a/run"))
    for place in places:
        assert not differ(tiny(init_from="a/run"), tiny(init_from=place))
    assert differ(tiny(init_from="a/run"), tiny(init_from="b/run")) and differ(tiny(), tiny(init_from="b/run"))
    assert differ(bn, bn, (2, 1)) == ["images per process: 2 there, 4 here"] and not differ(plain, plain, (2, 1))
    assert not differ(*2 * [tiny("bn", sync_bn=True)], (2, 1)) and not differ(bn, bn, (None, 2))
    assert "norm.name: agc there, bn here" in differ(plain, bn)
    for values in ({"seed": 2}, {"weight_decay": 0.1}, {"precision": "bf16"}, {"accumulate": 2}):
        assert len(differ(plain, tiny(**values))) == 1


@pytest.mark.parametrize(
    ("stdout", "stderr", "level"), [(1, 1, logging.DEBUG), (0, 1, logging.INFO), (1, 0, logging.INFO)]
)
def test_a_line_for_each_epoch_where_no_bar_is_seen(tiny, monkeypatch, caplog, stdout, stderr, level):
    """`agcseg-train > file` on a terminal has a bar on the terminal, and the lines in the file."""

    class Stream(io.StringIO):
        def isatty(self):
            return self.terminal

    for name, terminal in (("stdout", stdout), ("stderr", stderr)):
        stream = Stream()
        stream.terminal = bool(terminal)
        monkeypatch.setattr(sys, name, stream)
    figures = dict.fromkeys(("train_loss", "val_loss", "pixel_error", "miou", "images_per_second", "seconds"), 1.0)
    state = begin(tiny(), 19, 4, torch.device("cpu"))
    state.rows.append({"epoch": 1, **figures})
    bar = Bar(tiny(), state)
    bar.end_epoch(2)
    bar.close()
    assert [record.levelno for record in caplog.records if "epoch   1/2" in record.message] == [level]


@pytest.mark.parametrize("norm", ["agc", "bn", "none"])
def test_a_layer_that_dies_is_told_once(tiny, tmp_path, monkeypatch, caplog, norm):
    def killed(*arguments):
        state = begin(*arguments)
        for name, parameter in state.network.named_parameters():
            if name in ("decoder.4.0.norm.bias", "decoder.4.0.conv.bias"):
                parameter.data.fill_(-100)
        return state

    run(tiny(norm, epochs=2), tmp_path / "alive")
    assert "is dead" not in caplog.text
    monkeypatch.setattr(agcseg.training.run, "begin", killed)
    run(tiny(norm, epochs=2), tmp_path / "dead")
    said = [record.message for record in caplog.records if "is dead" in record.message]
    assert len(said) == 1 and "epoch 0: decoder.4.0 is dead: no point of its 3 maps" in said[0]
    assert said[0] in (tmp_path / "dead/run.log").read_text()


def test_a_full_disk_is_said_of_the_event_files(tmp_path, monkeypatch):
    board = TensorBoard(tmp_path, 0, 0, [], {})
    monkeypatch.setattr(SummaryWriter, "flush", lambda self: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    row = dict.fromkeys(("epoch", "samples", "train_loss", "val_loss", "pixel_error", "pixel_error_all", "miou"), 1)
    with pytest.raises(OSError) as error:
        board.log(row, [], None)
    assert error.value.filename.startswith(f"{tmp_path}/events.out.tfevents")
    board.close()


def test_a_run_older_than_a_key_goes_on(tiny, tmp_path):
    """Keys that its configuration lacks have their default."""
    run(tiny(epochs=1), tmp_path / "run")
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)
    del saved["config"]["contour"]
    torch.save(saved, tmp_path / "run/last.pt")
    assert run(tiny(epochs=2), tmp_path / "run")["epochs"] == 2


def test_a_run_older_than_an_option_of_its_norm_goes_on(tiny, tmp_path):
    """An option that one side lacks has the norm's own default."""
    config = replace(tiny(epochs=1), norm=NormConfig("agc", {"mean_scale": 1.0}))
    run(config, tmp_path / "run")
    later = NormConfig("agc", {"mean_scale": 1.0, "background": "map"})
    assert run(replace(config, epochs=2, norm=later), tmp_path / "run")["epochs"] == 2
    later.options["background"] = "median"
    with pytest.raises(UserError, match="norm.options.background: map there, median here"):
        run(replace(config, epochs=2, norm=later), tmp_path / "run")


@pytest.mark.parametrize("change", ["image", "label", "name"])
def test_other_data_are_another_run(tiny, streets, tmp_path, change):
    """Finished or not: a run belongs to its data, wherever they lie."""
    run(tiny(epochs=1), tmp_path / "run")
    other, config = shutil.copytree(streets, tmp_path / "other"), tiny(epochs=1)
    config.data.root = str(other)
    assert run(config, tmp_path / "run")["epochs"] == 1  # the same data at another place
    image = next(other.glob("leftImg8bit/val/*/*.png"))
    label = next(other.glob("gtFine/val/*/*labelIds.png"))
    if change == "name":
        for path in (image, *label.parent.glob(image.name.replace("leftImg8bit", "gtFine").replace(".png", "*"))):
            path.rename(path.with_name("zzz" + path.name))
    else:
        instances = label.with_name(label.name.replace("labelIds", "instanceIds"))
        for path in [image] if change == "image" else [label, instances]:
            pixels = np.asarray(Image.open(path)).copy()
            pixels[:8, :8] = 7 if change == "label" else 255 - pixels[:8, :8]  # road in the sky
            Image.fromarray(pixels).save(path)
    for epochs in (1, 2):
        with pytest.raises(UserError, match="images or their labels are others"):
            run(replace(config, epochs=epochs), tmp_path / "run")


def test_data_that_are_gone_are_not_looked_at(tiny, tmp_path, caplog):
    config = tiny(epochs=1)
    config.data.root = str(shutil.copytree(config.data.root, tmp_path / "data"))
    result = run(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "data")
    assert run(config, tmp_path / "run") == result
    assert f"nothing left to do; trained on {config.data.root}, not looked at now" in caplog.text
    with pytest.raises(UserError, match="was looked for"):
        run(replace(config, epochs=2), tmp_path / "run")


def test_a_run_without_its_checkpoint_is_not_written_over(tiny, tmp_path):
    run(tiny(epochs=2), tmp_path / "run")
    (tmp_path / "run/last.pt").unlink()
    assert run(tiny(epochs=2), tmp_path / "run")["epochs"] == 2
    left = files(tmp_path / "run")
    with pytest.raises(UserError, match=r"holds a run \(metrics.csv\) but no last.pt .* resume=false"):
        run(tiny(epochs=3), tmp_path / "run")
    assert files(tmp_path / "run") == left


def test_what_an_attempt_without_a_checkpoint_left_is_cleared(tiny, tmp_path, monkeypatch):
    """Points of TensorBoard, and half-written files of processes that are gone."""
    run(tiny(epochs=1), tmp_path / "straight")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(agcseg.record.record, "save_checkpoint", lambda *_: (_ for _ in ()).throw(OSError("full")))
        run(tiny(epochs=1), tmp_path / "run")
    for name in (".last.pt.1", ".metrics.csv.22222"):
        (tmp_path / "run" / name).touch()
    run(tiny(epochs=1), tmp_path / "run")
    assert files(tmp_path / "run") == files(tmp_path / "straight")


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as error:
        write(tmp_path / "last.pt", b"content")
    assert error.value.filename == str(tmp_path / "last.pt") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("result.json", "{}", "result.json: is not readable as a result"),
        ("result.json", "[]", "result.json: is not readable as a result"),
        (
            "result.json",
            '{"state": "finished", "reason": "", "epochs": "2"}',
            "result.json: is not readable as a result",
        ),
        ("result.json", "{", "result.json: is not readable as a result"),
        ("result.json", None, "result.json: is not readable as a result"),
        ("config.yaml", "a: [", "config.yaml: cannot be read as a configuration"),
        ("config.yaml", "- 1", "config.yaml: cannot be read as a configuration"),
        ("config.yaml", "minibatch: many", "config.yaml: cannot be read as a configuration"),
        ("config.yaml", "", "config.yaml: cannot be read as a configuration"),
        ("last.pt", ["optimizer"], "last.pt: is not the checkpoint of this run"),
        ("last.pt", ["config"], "last.pt: is not the checkpoint of this run"),
        ("last.pt", ["rows"], "last.pt: is not the checkpoint of this run"),
    ],
)
def test_files_that_are_not_what_they_should_be(tiny, tmp_path, name, content, message):
    run(tiny(epochs=1), tmp_path / "run")
    path = tmp_path / "run" / name
    if content is None:
        path.unlink()
        path.mkdir()
    elif isinstance(content, list):
        saved = torch.load(path, weights_only=True)
        torch.save({key: value for key, value in saved.items() if key not in content}, path)
    else:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        run(tiny(epochs=1 + isinstance(content, list)), tmp_path / "run")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_where_the_folder_should_be(tiny, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="is a file"):
        run(tiny(), tmp_path / "run")


def test_broken_checkpoint_is_named(tiny, tmp_path):
    run(tiny(epochs=1), tmp_path / "run")
    (tmp_path / "run/last.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"last\.pt: cannot be read"):
        run(tiny(epochs=2), tmp_path / "run")


def test_two_processes_do_not_share_a_run(tiny, tmp_path, monkeypatch):
    import filelock

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(agcseg.record.folder, "LOCK_WAIT", 0.2)
    with filelock.FileLock(tmp_path / "run/.lock"), pytest.raises(UserError, match="another process"):
        run(tiny(), tmp_path / "run")


def test_divergence_ends_the_run_with_a_reason(tiny, tmp_path):
    config = tiny("none", epochs=5, lr=RateConfig(value=1e30))
    result = run(config, tmp_path / "run")
    assert result["state"] == "diverged" and "the loss became" in result["reason"] and "step" in result["reason"]
    assert run(config, tmp_path / "run") == result  # not tried again


def test_a_last_step_that_diverges_is_no_end_and_no_best_epoch(tiny, tmp_path):
    """Its loss was finite; what it made of the weights is seen in validation."""
    result = run(tiny("none", epochs=1, minibatch=8, lr=RateConfig(value=1e30)), tmp_path / "run")
    assert (result["state"], result["epochs"]) == ("diverged", 0) and "validation loss became" in result["reason"]
    assert not (tmp_path / "run/best.pt").exists()


def test_divergence_keeps_the_last_finite_epoch(tiny, tmp_path, monkeypatch):
    calls = 0

    def loss(logits, labels, weights=None):
        nonlocal calls
        calls += logits.requires_grad
        return segmentation_loss(logits, labels, weights) * (math.nan if calls == 4 else 1)

    monkeypatch.setattr(agcseg.losses, "segmentation_loss", loss)
    result = run(tiny(epochs=5), tmp_path / "run")  # 2 steps per epoch: the second of epoch 2
    assert (result["state"], result["epochs"], len(rows(tmp_path / "run"))) == ("diverged", 1, 1)
    assert "nan in epoch 2, step 2 of 2; the last finite loss was 0." in result["reason"]
    assert math.isfinite(result["pixel_error"]) and math.isfinite(result["train_loss"])
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_gives_the_same_gradient(tiny, accumulate):
    """Although the images have different numbers of labelled pixels, one has none, and classes weigh differently."""
    torch.manual_seed(0)
    network = build("segnet", norm="agc", width=0.1, init="he_centered").double()
    images, labels = torch.randn(4, 3, 32, 64).double(), torch.randint(0, 19, (4, 32, 64)).byte()
    labels[0, :20] = 255
    labels[3] = 255
    class_weights, gradients = torch.rand(19).double(), []
    for parts in (1, accumulate):
        network.zero_grad()
        loss = agcseg.training.step.backward(network, images, labels, class_weights, tiny(accumulate=parts))
        gradients.append([loss, *(p.grad for p in network.parameters())])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-6 * a.norm()


def test_weight_decay_spares_the_gains():
    network = build("segnet", norm="agc", width=0.1)
    filters, vectors = parameter_groups(network, 0.1)
    assert filters["weight_decay"] == 0.1 and vectors["weight_decay"] == 0
    assert len(filters["params"]) == 26 and len(vectors["params"]) == 25 * 3 + 1


@pytest.mark.parametrize(
    "values",
    [{"precision": "bf16"}, {"channels_last": True}, {"deterministic": True}, {"class_weights": "none"}, {"images": 0}],
)
def test_switches(tiny, tmp_path, values):
    result = run(tiny(**values), tmp_path / "run")
    assert result["state"] == "finished" and math.isfinite(result["val_loss"])
    assert not torch.are_deterministic_algorithms_enabled()


def test_training_learns(tiny, tmp_path):
    """The error falls below that of always naming the commonest class."""
    config = tiny("bn", epochs=15, minibatch=2, lr=RateConfig(value=0.05), class_weights="none", images=0)
    config.data.size = [64, 128]
    result = run(config, tmp_path / "run")
    assert result["pixel_error"] < 0.8 * result["commonest_class_error"]


def test_device_that_is_not_there(tiny, tmp_path):
    with pytest.raises(UserError, match=r"device=cuda:9: cannot be used here .* try device=auto"):
        run(tiny(device="cuda:9"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_what_is_freed_is_kept_until_it_is_given_back():
    """In a process of its own: one that was refused memory once may take it elsewhere from then on."""
    script = (
        "import torch; from agcseg.training.machine import _process_sizes, idle_memory, keep_freed_memory\n"
        "device = torch.device('cpu'); keep_freed_memory(); before = idle_memory(device); torch.ones(16 * 2**20)\n"
        "print(_process_sizes()['RssAnon'] - before > 50, idle_memory(device) - before < 10)"  # of 64 MiB
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "True True\n", done.stderr


def test_a_run_of_figure_1_is_in_its_panels_only(tiny, tmp_path):
    run(tiny("bn", minibatch=1, epochs=2), tmp_path / "a")
    run(tiny("bn", minibatch=2, epochs=1), tmp_path / "none")
    for name, panels in (("a", ["figure1/a"]), ("none", [])):
        events = EventAccumulator(str(tmp_path / name), size_guidance={"scalars": 0, "tensors": 0}).Reload()
        assert [tag for tag in events.Tags()["scalars"] if tag.startswith("figure1/")] == panels
        assert ("custom_scalars__config__" in events.Tags()["tensors"]) == bool(panels)
    assert [value for _, value in scalars(tmp_path / "a", "figure1/a")] == [
        pytest.approx(float(row["pixel_error"])) for row in rows(tmp_path / "a")
    ]


def test_memory_is_what_training_adds():
    """On the CPU above the process before the network was built; bytes kept for backward by hand."""
    held = [torch.ones(2**20) for _ in range(50)]  # 200 MiB that are not the training's
    device = torch.device("cpu")
    before = idle_memory(device)
    reset_peak_memory(device)
    more = torch.ones(25 * 2**20)  # 100 MiB
    assert added_memory(device, before) == pytest.approx(100, abs=20) and len(held) == 50 and len(more)

    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1, bias=False), torch.nn.Sigmoid())
    with keeping(network) as kept:
        loss = network(torch.ones(1, 1, 4, 4)).sum()
        loss.backward()
        network(torch.ones(1, 1, 4, 4))  # after the first backward nothing counts
    assert sum(kept.values()) == 4 * (16 + 32)  # the convolution's input and the sigmoid's output
