"""What runs on a GPU: a real one, with values compared, or the fake one of tests/fakegpu, which shows all but values.

Tests marked gpu skip themselves without a GPU. `test_on_the_fake_gpu` runs them again in a process that has a fake one.
"""

import csv
import gc
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "fakegpu"))
import fakegpu  # noqa: E402

from agcseg import build  # noqa: E402
from agcseg.bench.step import Case, Step  # noqa: E402
from agcseg.bench.table import largest_minibatch  # noqa: E402
from agcseg.config import NetworkConfig  # noqa: E402
from agcseg.data import open_data  # noqa: E402
from agcseg.data.minibatches import minibatches, open_split, read_ahead  # noqa: E402
from agcseg.errors import UserError  # noqa: E402
from agcseg.losses import image_losses  # noqa: E402
from agcseg.networks import classnet, segnet  # noqa: E402
from agcseg.nn import layer_signals, unit  # noqa: E402
from agcseg.training import run as training  # noqa: E402
from agcseg.training import step as step_module  # noqa: E402
from agcseg.training.machine import find_device, out_of_memory, settings  # noqa: E402
from agcseg.training.run import run  # noqa: E402

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
fake_only = pytest.mark.skipif(not fakegpu.here(), reason="a real GPU's launches and waits are not counted")
slow = pytest.mark.slow
NORMS = ("bn", "agc", "none")
PRECISIONS = {"fp32": {}, "bf16": {"precision": "bf16", "channels_last": True}}


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The folder of the built fake GPU."""
    folder = tmp_path_factory.mktemp("fakegpu")
    why_not = fakegpu.build(folder)
    if why_not:
        pytest.skip(why_not)
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("which", ["gpu and not slow", pytest.param("gpu and slow", marks=slow)])
def test_on_the_fake_gpu(library, which):
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", which, __file__]
    done = subprocess.run(command, env=fakegpu.environment(library), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_fake_gpus_limits(library):
    """Memory ends where it should, devices are those that are visible, and what waits is refused in a capture."""
    script = """
import torch, fakegpu
assert torch.cuda.device_count() == 2
assert str(torch.cuda.get_device_properties(0).uuid) != str(torch.cuda.get_device_properties(1).uuid)
try: torch.empty(2**31, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError: pass
else: raise SystemExit("no limit")
x = torch.zeros(8, device="cuda:1")
before = fakegpu.counts()
y = x + 1
assert fakegpu.counts()["launches"] == before["launches"] + 1 and fakegpu.counts()["waits"] == before["waits"]
y.tolist()
assert fakegpu.counts()["waits"] == before["waits"] + 1
with torch.cuda.device(1), torch.cuda.graph(torch.cuda.CUDAGraph()):
    x + 1
    try: torch.cuda.current_stream().synchronize()
    except RuntimeError as error: assert "capturing" in str(error)
    else: raise SystemExit("a graph that waits")
"""
    environment = fakegpu.environment(library, gpus=4, memory=2**30) | {"CUDA_VISIBLE_DEVICES": "3,1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@slow
def test_six_jobs_on_four_gpus(library, streets, tmp_path):
    values = [
        f"data.root={streets}", f"data.cache_dir={tmp_path}/cache", "data.size=[32,64]", "data.train_images=null",
        "data.val_images=null", "network.width=0.05", "epochs=1", "norm=bn,agc,none", "minibatch=1,2", "name=six",
    ]  # fmt: skip
    command = [sys.executable, "-m", "agcseg.cli.train", "-m", "data=streets", *values]
    environment = fakegpu.environment(library, gpus=4)
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    results = [json.loads(path.read_text()) for path in tmp_path.glob("outputs/six/*/result.json")]
    assert len(results) == 6 and all(one["state"] == "finished" for one in results)
    assert all(one["device"] == "Fake H100" for one in results)
    assert {int(number) for number in re.findall(r"on GPU (\d)", done.stdout + done.stderr)} == {0, 1, 2, 3}


# --- from here on with a GPU ---


@pytest.fixture
def shallow(monkeypatch):
    """On the fake GPU networks of few stages: each size of maps has kernels of its own to compile."""
    if fakegpu.here():
        monkeypatch.setattr(segnet, "STAGES", segnet.STAGES[:2])
        monkeypatch.setattr(classnet, "WIDTHS", classnet.WIDTHS[:3])


@pytest.fixture
def make(tiny, shallow):
    """The configuration of a tiny run on a GPU: `device=auto`."""

    def configured(network="segnet", norm="agc", **values):
        made = tiny(norm, **{"device": "auto", "minibatch": 2, "epochs": 1, **values})
        if network == "classnet":
            made.network = NetworkConfig("classnet", width=0.05, init="he_centered")
            made.data.size = [128, 128]
        return made

    return configured


def check_run(config, folder):
    """It ends well, on the GPU, and on a real one begins with the losses of the CPU."""
    result = run(config, folder)
    assert result["state"] == "finished" and result["device"] == torch.cuda.get_device_name()
    with open(folder / "metrics.csv") as file:
        assert len(list(csv.DictReader(file))) == config.epochs
    if not fakegpu.here():
        plain = replace(config, device="cpu", compile=False, graph=False, precision="fp32")
        run(plain, folder.with_name("cpu"))
        first = [np.load(path / "steps.npy").reshape(-1)[0] for path in (folder, folder.with_name("cpu"))]
        assert first[0] == pytest.approx(first[1], rel=0.02 if config.precision == "bf16" else 1e-3)


@gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=slow)])  # test_settings has some of it
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("network", ["segnet", "classnet"])
def test_eager(make, tmp_path, network, norm, precision):
    check_run(make(network, norm, **PRECISIONS[precision]), tmp_path / "run")


@gpu
@needs_gpu
@pytest.mark.parametrize("layout", [pytest.param(torch.contiguous_format, marks=slow), torch.channels_last])
@pytest.mark.parametrize("many", [2**12, pytest.param(2**23, marks=slow)])
@pytest.mark.parametrize("network", ["segnet", pytest.param("classnet", marks=slow)])
def test_gradients_are_those_of_the_formula(shallow, network, many, layout, monkeypatch):
    """In float32, of maps so large that a minibatch is taken in parts."""
    monkeypatch.setattr(unit, "MANY", many)
    torch.manual_seed(0)
    h, w = (32, 64) if fakegpu.here() else (256, 256)  # the other tests': each size of maps has kernels of its own
    images, labels = torch.rand(4, 3, h, w), torch.randint(0, 19, (4, h, w), dtype=torch.uint8)
    labels[:, : h // 12] = 255
    made = build(network, width=0.05, init="he_centered")
    formula = build(network, width=0.05, implementation="literal")
    formula.load_state_dict(made.state_dict())
    made.to("cuda", memory_format=layout)
    images_there = images.cuda().contiguous(memory_format=layout)
    with settings("fp32"):
        losses = image_losses(made(images_there), labels.cuda(), contours=labels.cuda() == 0)
        sum(loss.mean() for loss in losses).backward()
    if not fakegpu.here():
        losses = image_losses(formula.double()(images.double()), labels, contours=labels == 0)
        sum(loss.mean() for loss in losses).backward()
        for (name, one), other in zip(made.named_parameters(), formula.parameters(), strict=True):
            error = (one.grad.cpu() - other.grad).norm() / other.grad.norm()
            assert error < 0.1, (name, error)  # float32 on a CPU: 0.04, where a rounding decides who passes a ReLU


@gpu
@needs_gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("network", ["segnet", pytest.param("classnet", marks=slow)])
def test_deterministic(make, tmp_path, network, norm, precision):
    check_run(make(network, norm, deterministic=True, **PRECISIONS[precision]), tmp_path / "run")
    if not fakegpu.here():
        run(make(network, norm, deterministic=True, **PRECISIONS[precision]), tmp_path / "again")
        files = [torch.load(tmp_path / name / "last.pt", weights_only=True)["network"] for name in ("run", "again")]
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


@gpu
@needs_gpu
@slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("network", ["segnet", "classnet"])
def test_compiled(make, tmp_path, network, norm, precision):
    config = make(network, norm, compile=True, **PRECISIONS[precision])
    config.network.width = 0.3  # of narrower maps Inductor expects another layout than convolutions give
    check_run(config, tmp_path / "run")
    torch._dynamo.reset()


@gpu
@needs_gpu
@pytest.mark.parametrize("values", [{"precision": "tf32", "accumulate": 2}, {"norm": "agc_std"}, {"flip": True}])
def test_settings(make, tmp_path, values):
    flip = values.pop("flip", False)
    config = make(**values)
    config.data.flip = flip
    check_run(config, tmp_path / "run")


@gpu
@needs_gpu
@pytest.mark.parametrize(
    "values",
    [{"schedule": "cosine", "ema": 0.9}, {"norm": "bn", "precision": "bf16"}, {"network": "classnet", "noise": 0.1}]
    + [pytest.param(values, marks=slow) for values in ({"optimizer": "adamw"}, {"compile": True, "norm": "none"})],
)
def test_a_step_is_one_graph(make, tmp_path, monkeypatch, values):
    """From the fourth step on, captured once for each rate; on a real GPU with the weights of eager steps."""
    others = {key: value for key, value in values.items() if key != "noise"}
    config = make(**others, minibatch=1, epochs=2, graph=True, deterministic=True)
    config.lr.value, config.noise.gain = 0.001, values.get("noise", 0)
    captured, counted, capture, steps = [], [], step_module.capture, training._steps

    def counting(*arguments):
        before = fakegpu.counts() if fakegpu.here() else {}
        result = steps(*arguments)
        counted.append({key: fakegpu.counts()[key] - value for key, value in before.items()})
        return result

    monkeypatch.setattr(step_module, "capture", lambda *arguments: captured.append(1) or capture(*arguments))
    monkeypatch.setattr(training, "_steps", counting)
    check_run(config, tmp_path / "run")
    assert len(captured) == (2 if "schedule" in values else 1)
    if fakegpu.here():
        assert [one["graphs"] for one in counted] == [8 - 3, 8]
        if "schedule" not in values:
            assert counted[1]["waits"] == 1 and counted[1]["launches"] <= 8 * 12, counted
    else:
        run(replace(config, graph=False), tmp_path / "eager")
        files = [torch.load(tmp_path / name / "last.pt", weights_only=True)["network"] for name in ("run", "eager")]
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


@gpu
@needs_gpu
def test_a_step_that_is_no_graph():
    """Because it waits, or because there is no memory for it."""
    parameter = torch.nn.Parameter(torch.ones(1, device=find_device("auto")))

    def waiting(x):
        return (x * parameter.item(),)

    def too_large(x):
        return (x.new_empty(2**50 if torch.cuda.is_current_stream_capturing() else 1),)

    for step, error in ((waiting, UserError), (too_large, torch.OutOfMemoryError)):
        train = step_module.graphed(step, torch.optim.SGD([parameter]))
        for _ in range(step_module.EAGER):
            train(torch.ones(3, device=parameter.device))
        with pytest.raises(error, match="cannot be captured .*; use graph=false|out of memory"):
            train(torch.ones(3, device=parameter.device))
        torch.cuda.synchronize()


@gpu
@needs_gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_resume_in_another_layout(make, tmp_path, channels_last):
    """And with steps as graphs, or without them again."""
    run(make(epochs=1, channels_last=channels_last, graph=channels_last), tmp_path / "run")
    result = run(make(epochs=2, channels_last=not channels_last, graph=not channels_last), tmp_path / "run")
    assert result["state"] == "finished" and result["epochs"] == 2
    if not fakegpu.here():
        straight = run(make(epochs=2, channels_last=channels_last), tmp_path / "straight")
        assert result["val_loss"] == pytest.approx(straight["val_loss"], rel=1e-2)


class Dropping(torch.nn.Conv2d):
    """Drops pixels, and notes the state of the device's generator."""

    states: list[torch.Tensor] = []

    def __init__(self, num_classes):
        super().__init__(3, num_classes, 1)
        self.norm = torch.nn.BatchNorm2d(num_classes)

    def forward(self, images):
        if self.training and images.is_cuda:
            self.states.append(torch.cuda.get_rng_state())
        return torch.nn.functional.dropout(self.norm(super().forward(images)), 0.5, self.training)


@gpu
@needs_gpu
def test_dropout_goes_on_where_it_was(make, tmp_path, monkeypatch):
    monkeypatch.setattr(Dropping, "states", [])
    config = make(norm="bn", epochs=2)
    config.network = NetworkConfig("custom", init=None, factory=f"{__name__}:Dropping")
    run(config, tmp_path / "straight")
    for epochs in (1, 2):
        run(replace(config, epochs=epochs), tmp_path / "broken")
    straight, broken = torch.stack(Dropping.states).chunk(2)
    assert torch.equal(straight, broken) and len(straight.unique(dim=0)) == len(straight)


@gpu
@needs_gpu
def test_programs(make, tmp_path, monkeypatch):
    from agcseg.cli import eval as evaluation
    from agcseg.cli import predict

    run(make(), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert evaluation.main(["run", "images=2"]) == 0
    picture = next(Path(make().data.root).rglob("*leftImg8bit.png"))
    assert predict.main(["run", f"input={picture}", "output=predicted"]) == 0


@gpu
@needs_gpu
@fake_only
@pytest.mark.parametrize("on_device", [True, False])
def test_an_epoch_waits_once(make, tmp_path, monkeypatch, on_device):
    """For its losses, at the end, and at no step; data beside the device wait for their two buffers, in a thread."""
    steps, waits = training._steps, []

    def counted(*arguments):
        before = fakegpu.counts()["waits"]
        result = steps(*arguments)
        waits.append(fakegpu.counts()["waits"] - before)
        return result

    if not on_device:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(training, "_steps", counted)
    config = make(minibatch=1, epochs=2)
    config.data.flip = True
    run(config, tmp_path / "run")
    assert waits == ([1, 1] if on_device else [1 + 8 - 2] * 2)


@gpu
@needs_gpu
@fake_only
def test_a_validation_waits_for_its_end(make, tmp_path, monkeypatch):
    """However many minibatches it has."""
    validate, waits = training.validate, []

    def counted(*arguments):
        before = fakegpu.counts()["waits"]
        result = validate(*arguments)
        waits.append(fakegpu.counts()["waits"] - before)
        return result

    monkeypatch.setattr(training, "validate", counted)
    for minibatch in (1, 4):
        run(make(minibatch=minibatch, images=0), tmp_path / f"run{minibatch}")
    assert waits[0] == waits[1] <= 3


@gpu
@needs_gpu
def test_what_is_read_ahead_arrives():
    device = find_device("auto")
    parts = [torch.arange(7 * 32).view(7, 32), torch.rand(7, 2, 3)]
    rows = [torch.tensor(some) for some in ([6, 1, 0], [2, 2, 5], [3], [4, 0, 1])]
    for some, read in zip(rows, list(read_ahead(parts, rows, device)), strict=True):
        assert all(torch.equal(part[some], one.cpu()) for part, one in zip(parts, read, strict=True))
        assert all(one.device == device for one in read)


@gpu
@needs_gpu
@pytest.mark.parametrize("contours", [False, True])
def test_minibatches_are_those_of_the_cpu(make, contours):
    _, cached = open_data(make().data)
    made = []
    for device in (find_device("auto"), torch.device("cpu")):
        split = open_split(cached["train"], np.arange(8), device, contours)
        made.append([part for batch in minibatches(split, 3, device, (1, 1), flip=True) for part in batch])
    assert [one.shape for one in made[0]] == [one.shape for one in made[1]] and len(made[0]) == 2 * (2 + contours)
    assert all(one.is_cuda for one in made[0])
    if not fakegpu.here():
        for one, other in zip(*made, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-6)


# --- what a step costs ---


def step(variant, **values):
    case = Case("segnet", variant, **{"minibatch": 2, "precision": "bf16", "size": (128, 256), "width": 0.25, **values})
    return Step(replace(case, device=str(find_device("auto")), channels_last=True))


def cost(variant, deterministic=False, **values):
    """Launches and waits of a step once it is warm, MiB kept for backward and the peak above what was there before."""
    gc.collect()  # what tests before this one left
    with settings("bf16", deterministic):
        made = step(variant, **values)
        for _ in range(2):
            made()
        before = fakegpu.counts()
        made()
        counts = {key: value - before[key] for key, value in fakegpu.counts().items()}
        made.optimizer.zero_grad()
        there = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = made.loss()
        kept = torch.cuda.memory_allocated() - there
        loss.backward()
        return counts | {"kept": kept / 2**20, "peak": (torch.cuda.max_memory_allocated() - there) / 2**20}


@gpu
@needs_gpu
@fake_only
def test_launches_and_waits_of_a_step():
    costs = {variant: cost(variant) for variant in NORMS}
    assert all(one["waits"] == one["uploads"] == one["downloads"] == 0 for one in costs.values()), costs
    assert costs["agc"]["launches"] <= 1.6 * costs["bn"]["launches"], costs
    eight = cost("agc", minibatch=8)
    assert eight["launches"] <= 1.1 * costs["agc"]["launches"], (eight, costs)


@gpu
@needs_gpu
@fake_only
def test_memory_of_a_step():
    bn, agc = cost("bn", minibatch=8), cost("agc", minibatch=8)
    assert agc["kept"] < 0.35 * bn["kept"] and agc["peak"] < 0.6 * bn["peak"], (agc, bn)
    same = cost("agc", minibatch=8, deterministic=True)
    assert same["peak"] <= 1.1 * agc["peak"] and same["launches"] <= 1.1 * agc["launches"], (same, agc)


@gpu
@needs_gpu
@fake_only
@slow
def test_the_largest_minibatch_of_a_budget():
    """SegNet as it is, 256x512, in 12 GiB."""
    device = str(find_device("auto"))
    cases = [Case("segnet", norm, 1, "bf16", (256, 512), device=device, channels_last=True) for norm in ("bn", "agc")]
    (bn, _), (agc, _) = (largest_minibatch(case, 12 * 2**30) for case in cases)
    assert bn >= 30 and agc >= 2.4 * bn, (bn, agc)


@gpu
@needs_gpu
@fake_only
def test_layers_are_described_in_one_wait():
    made = step("agc")
    before = fakegpu.counts()
    layer_signals(made.network, made.images)
    assert fakegpu.counts()["waits"] - before["waits"] <= 5


@gpu
@needs_gpu
def test_too_much_memory_is_told_apart():
    with pytest.raises(RuntimeError) as full:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    assert out_of_memory(full.value)
