"""One run over two processes, with gloo on the CPU, against the same run in one."""

import csv
import json
import logging
import shutil
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn

import agcseg.cli.train
import agcseg.training.passes
from agcseg.config import Config, DataConfig, GemsConfig, NetworkConfig, NoiseConfig, NormConfig, RateConfig
from agcseg.errors import UserError
from agcseg.networks import classnet, segnet
from agcseg.training import parallel
from agcseg.training.run import run

RUNS = {
    "segnet": {"network": "segnet"},
    "classnet": {"network": "classnet", "epochs": 1},
    "gems": {
        "network": "segnet",
        "gems": GemsConfig("minibatch", ema=0.9, gate="grad"),
        "accumulate": 2,
        "lr": RateConfig(value=0.02),
    },
}


class Dropping(nn.Module):
    """Drops channels, and has a layer that it does not use."""

    dropped: list[torch.Tensor] = []

    def __init__(self, num_classes):
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, num_classes, 1)
        self.idle = nn.Conv2d(3, 3, 1)

    def forward(self, images):
        maps = nn.functional.dropout2d(self.norm(self.stem(images)).exp(), 0.5, self.training)
        if self.training and not maps.is_meta:
            self.dropped.append(maps.detach()[:, :, 0, 0] == 0)
        return self.head(maps)


SHALLOW = (segnet, "STAGES", segnet.STAGES[:2]), (classnet, "WIDTHS", classnet.WIDTHS[:3])  # how deep is no matter here


@pytest.fixture(scope="module", autouse=True)
def shallow():
    with pytest.MonkeyPatch.context() as patch:
        for network in SHALLOW:
            patch.setattr(*network)
        yield


@pytest.fixture(scope="module")
def pair(streets, tmp_path_factory):
    """What two processes answer to each of the questions in `_process`, and the folder they work in."""
    folder = tmp_path_factory.mktemp("pair")
    run(small(streets, folder, "segnet", noise=NoiseConfig(0.2), epochs=1), folder / "noise")
    mp.spawn(_process, (folder, streets), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)], folder


def _process(rank, folder, streets):
    torch.set_num_threads(1)
    for network in SHALLOW:
        setattr(*network)
    logging.getLogger("agcseg").setLevel(logging.INFO)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    answers = {what: gradients(*what) for what in (("agc", 1), ("agc", 2), ("bn", 1))}
    errors = []
    for values in ({"minibatch": 3}, {"minibatch": 2, "accumulate": 2}, {"sync_bn": True}):
        with pytest.raises(UserError) as error:
            run(small(streets, folder, "segnet", "bn", **values), folder / "refused")
        errors.append(str(error.value))
    for name, values in RUNS.items():
        run(small(streets, folder, **values), folder / name)
    run(small(streets, folder, "segnet", noise=NoiseConfig(0.2)), folder / "noise")
    config = small(streets, folder, "segnet", "bn", accumulate=2)
    config.network = NetworkConfig("custom", init=None, factory="test_parallel:Dropping")
    run(config, folder / "dropping")
    talks = logging.getLogger("agcseg").isEnabledFor(logging.INFO)
    said = {"answers": answers, "errors": errors, "talks": talks, "dropped": Dropping.dropped}
    torch.save(said, folder / f"{rank}.pt")
    dist.destroy_process_group()


def small(streets, folder, network, norm="agc", **values):
    """A run of two epochs, at a rate so low that rounding stays rounding. Its validation images are an odd number."""
    size = [128, 128] if network == "classnet" else [32, 64]
    data = DataConfig("streets", str(streets), str(folder / "cache"), size, None, 3)
    network = NetworkConfig(network, width=0.05, init="he_centered")
    values = {"lr": RateConfig(value=1e-3), "minibatch": 4, "epochs": 2, "images": 2, "device": "cpu", **values}
    return Config(network=network, norm=NormConfig(norm), data=data, **values)


def gradients(norm, accumulate):
    """Of a minibatch of four images, of which this process has its share; and the buffers in the end."""
    torch.manual_seed(0)
    network = agcseg.build("segnet", norm=norm, width=0.1, init="he_centered").double()
    images, labels = torch.randn(4, 3, 32, 64).double(), torch.randint(0, 19, (4, 32, 64)).byte()
    labels[0, :20] = 255
    class_weights, config = torch.rand(19).double(), Config(minibatch=4, accumulate=accumulate)
    model, (first, step) = network, (parallel.rank(), parallel.world())
    if step > 1:
        model = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
    loss = agcseg.training.passes.backward(model, images[first::step], labels[first::step], class_weights, config)
    parallel.share_buffers(network)
    return [parallel.add(loss) / step, *(p.grad for p in network.parameters())], list(network.buffers())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_give_the_gradient_of_one(pair, accumulate):
    alone, _ = gradients("agc", accumulate)
    first, second = (process["answers"]["agc", accumulate][0] for process in pair[0])
    for a, b, c in zip(alone, first, second, strict=True):
        assert (a - b).norm() <= 1e-10 * a.norm() and torch.equal(b, c)


def test_batch_statistics_belong_to_each_process(pair):
    """So that its result differs from that of one process; the running statistics become those of process 0."""
    alone, _ = gradients("bn", 1)
    (first, buffers), (second, same) = (process["answers"]["bn", 1] for process in pair[0])
    assert max((a - b).norm() / a.norm() for a, b in zip(alone, first, strict=True)) > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(buffers) == 3 * 7 and all(torch.equal(a, b) for a, b in zip(buffers, same, strict=True))


def test_what_two_processes_cannot_share_is_refused_by_both(pair):
    for process in pair[0]:
        assert process["errors"] == [
            "minibatch=3 cannot be shared by 2 processes in 1 parts each",
            "minibatch=2 cannot be shared by 2 processes in 2 parts each",
            "sync_bn=true: torch synchronises batch normalisation on GPUs only",
        ]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_over_two_processes_is_the_run_of_one(pair, streets, tmp_path, name):
    """Also where the validation images do not divide by the processes: each counts once."""
    run(small(streets, tmp_path, **RUNS[name]), tmp_path / "one")
    tables, layers = [], []
    for folder in (tmp_path / "one", pair[1] / name):
        with open(folder / "images.csv") as file:
            images = list(csv.DictReader(file))
        assert (folder / "predictions.png").stat().st_size > 500
        with open(folder / "layers.csv") as file:  # with GEMS, factors from the points of both processes
            figures = [
                float(value) for row in csv.DictReader(file) for key, value in row.items() if "mean" in key and value
            ]
        layers.append(figures)
        tables.append((np.load(folder / "steps.npy"), images, json.loads((folder / "result.json").read_text())))
    (steps, images, result), (steps2, images2, result2) = tables
    assert steps.shape == steps2.shape and np.allclose(steps, steps2, rtol=1e-5)
    assert len(images) == 3 and layers[0] == pytest.approx(layers[1], rel=2e-3)
    for a, b in zip(images, images2, strict=True):
        assert (a["image"], a["labelled_pixels"]) == (b["image"], b["labelled_pixels"])
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)
    for key in ("pixel_error", "miou"):
        assert result[key] == pytest.approx(result2[key], abs=0.01)
    assert result2["processes"] == 2
    assert "2 processes: each minibatch of 4 is 2 x 2 images" in (pair[1] / name / "run.log").read_text()
    assert [process["talks"] for process in pair[0]] == [True, False]


def test_processes_drop_others_and_layers_may_be_idle(pair):
    first, second = (process["dropped"] for process in pair[0])
    assert len(first) == 8 and not any(map(torch.equal, first, second))
    assert not any(map(torch.equal, first[:4], first[4:]))  # of the second epoch


def test_noise_that_goes_on_in_more_processes_is_not_the_same_in_each(pair):
    noises = torch.load(pair[1] / "noise/last.pt", weights_only=True)["noise"]
    assert len(noises) == 2 and not torch.equal(*noises)


def test_processes_that_do_not_train_one_run_are_refused(streets, tmp_path, monkeypatch):
    """Those of several machines have command lines, and may have disks, of their own."""
    other = asdict(small(streets, tmp_path, "segnet", seed=2))
    monkeypatch.setattr(parallel, "from_first", lambda value: value and value | {"config": other})
    with pytest.raises(UserError, match="another run to train than process 0:\n  seed: 2 there, 1 here"):
        run(small(streets, tmp_path, "segnet"), tmp_path / "run")
    monkeypatch.setattr(parallel, "from_first", lambda value: 1 if value == 0 else value)
    with pytest.raises(UserError, match="process 0 finds 1 epochs done there, process 0 0; .* one folder"):
        run(small(streets, tmp_path, "segnet"), tmp_path / "run")


def test_a_run_of_two_processes_goes_on_in_one(pair, streets, tmp_path):
    folder = shutil.copytree(pair[1] / "segnet", tmp_path / "segnet")
    assert run(small(streets, tmp_path, "segnet", epochs=3), folder)["epochs"] == 3


def test_torchrun_from_the_command_line_and_another_number_of_processes_for_bn(tmp_path, streets, monkeypatch, capsys):
    arguments = ["data=streets", f"data.root={streets}", "norm=bn", f"data.cache_dir={tmp_path}/cache", "run=run"]
    arguments += ["data.size=[32,64]", "network.width=0.05", "device=cpu"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command = [*launch, "agcseg.cli.train", *arguments, "epochs=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "batch statistics over the 2 of each process" in done.stdout
    assert done.stdout.count("finished after 1 epochs") == 1
    monkeypatch.chdir(tmp_path)
    for epochs in (1, 2):  # done, and to go on
        monkeypatch.setattr(sys, "argv", ["agcseg-train", *arguments, f"epochs={epochs}"])
        with pytest.raises(SystemExit) as end:
            agcseg.cli.train.main()
        assert end.value.code == 2 and "images per process: 2 there, 4 here" in capsys.readouterr().err


def test_an_error_that_every_process_finds_is_told_by_one(monkeypatch, capsys):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for key, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(store.port))):
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(sys, "argv", ["agcseg-train", "minibtch=3"])
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            agcseg.cli.train.main()
        assert end.value.code == 2
    assert capsys.readouterr().err.count("agcseg-train: error: minibtch") == 1
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # another attempt
    assert [parallel.first_to_tell(), parallel.first_to_tell()] == [True, False]
    monkeypatch.setenv("MASTER_PORT", "nowhere")
    assert parallel.first_to_tell() and parallel.first_to_tell()


def test_nccl_is_told_its_device(monkeypatch):
    said = []
    monkeypatch.setattr(dist, "init_process_group", lambda *names, **more: said.append((*names, more)))
    monkeypatch.setattr(torch.cuda, "set_device", lambda local: said.append(local))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parallel.join("auto") == "cuda:1" and parallel.join("cpu") == "cpu"
    assert said == [1, ("nccl", {"device_id": torch.device("cuda:1")}), ("gloo", {})]


@pytest.mark.parametrize("code", [0, 2])
def test_a_process_of_torchrun_ends_at_once(code, monkeypatch):
    """Without the interpreter's end; after a mistake it does not wait for the others, which may never come."""
    done = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroyed"))
    monkeypatch.setattr(parallel.os, "_exit", done.append)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    parallel.leave(code)
    assert done == ([code] if code else ["destroyed", 0])


def test_a_sweep_under_torchrun_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["agcseg-train", "-m", "seed=1,2"])
    with pytest.raises(SystemExit) as end:
        agcseg.cli.train.main()
    assert end.value.code == 2 and "torchrun shares out one run over devices" in capsys.readouterr().err


def test_a_process_names_no_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="let torchrun start the processes"):
        parallel.join("auto")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="each process takes a GPU of its own"):
        parallel.join("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="process 2 has no GPU, there are 1"):
        parallel.join("auto")


def test_gather_keeps_the_order():
    assert parallel.gather([1, 2, 3]) == [1, 2, 3] and parallel.world() == 1 and parallel.rank() == 0
