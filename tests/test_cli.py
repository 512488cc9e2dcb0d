"""The programs as a user meets them, each in a process of its own."""

import json
import subprocess
import sys
import time

import pytest
import torch
from test_data import write_cityscapes


@pytest.fixture
def command(tmp_path):
    def call(program, *arguments):
        return subprocess.run(
            [sys.executable, "-m", f"agcseg.cli.{program}", *arguments], cwd=tmp_path, capture_output=True, text=True
        )

    return call


@pytest.fixture
def small(streets, tmp_path):
    return [
        "data=streets", f"data.root={streets}", "data.size=[32,64]", f"data.cache_dir={tmp_path}/cache",
        "network.width=0.05", "epochs=1", "device=cpu",
    ]  # fmt: skip


def test_two_run_sweep_then_nothing_left_then_report(command, small, tmp_path):
    done = command("train", "-m", *small, "norm=bn,agc", "name=pair", "hydra.launcher.jobs_per_device=2")
    assert done.returncode == 0, done.stderr
    folders = sorted(path.name for path in (tmp_path / "outputs/pair").glob("segnet*"))
    assert folders == [f"segnet-{norm}-mb4-lr0.08-seed1-data.size=32x64-network.width=0.05" for norm in ("agc", "bn")]
    assert "Traceback" not in done.stdout + done.stderr
    again = command("train", "-m", *small, "norm=bn,agc", "name=pair", "hydra.launcher.jobs_per_device=2")
    assert again.returncode == 0 and "2 runs: 2 skipped" in again.stdout
    report = command("report", "outputs/pair")
    assert report.returncode == 0 and "tensorboard --logdir outputs/pair" in report.stdout
    assert {"figure.png", "report.md", "report.csv"} <= {path.name for path in (tmp_path / "outputs/pair").iterdir()}


def test_a_diverged_and_a_refused_run_do_not_stop_a_sweep(command, small, tmp_path):
    done = command("train", "-m", *small, "norm=none", "lr.value=1e30,-1,0.01", "name=three", "epochs=3")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    states = [json.loads(path.read_text())["state"] for path in sorted(tmp_path.glob("outputs/three/*/result.json"))]
    assert sorted(states) == ["diverged", "finished"]
    assert "lr.value=-1.0: a learning rate must be positive" in done.stderr
    assert "3 runs: 1 diverged, 1 failed, 1 finished" in done.stdout
    basic = command("train", "-m", *small, "norm=none", "lr.value=-1,0.01", "name=three", "epochs=3",
                    "hydra/launcher=basic")  # fmt: skip
    assert basic.returncode == 1 and "Traceback" not in basic.stdout + basic.stderr
    assert "lr.value=-1.0: a learning rate must" in basic.stderr and "nothing left to do" in basic.stdout


def test_a_terminated_run_goes_on_with_the_same_command(small, tmp_path):
    many = [sys.executable, "-m", "agcseg.cli.train", *small, "epochs=1000", "run=one"]
    first = subprocess.Popen(many, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "outputs/streets/one/last.pt").exists():
        assert first.poll() is None
        time.sleep(0.1)
    first.terminate()
    _, said = first.communicate(timeout=120)
    assert first.returncode == 143 and "Traceback" not in said
    assert "agcseg-train: stopped; the same command goes on from the last epoch" in said


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["data.root=/nowhere"], 2, "agcseg-train experiment=demo"),
        (["network=segnt"], 1, "Available options in 'network':"),
        (["norm=batch"], 1, "instance"),
        (["minibatches=3"], 2, "minibatches is not a key of the configuration; did you mean minibatch?"),
        (["data.sise=[32,64]"], 2, "did you mean data.size"),
        (["data.root=/my data (1)"], 2, "/my data (1) (data.root), and is not complete there"),
        (["minibatch=abc"], 1, "could not be converted to Integer"),
        (["minibatch=0"], 2, "minibatch=0: must be at least 1"),
    ],
)
def test_mistakes(command, tmp_path, arguments, code, message):
    done = command("train", *arguments)
    assert done.returncode == code and message in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())  # nothing half-written


@pytest.mark.parametrize("sweep", [False, True])
def test_out_of_memory_says_what_to_do(monkeypatch, tmp_path, capsys, sweep):
    from agcseg.cli import train

    def run(config, folder):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(train.signal, "signal", lambda number, handler: None)  # this process keeps its own
    how = ["-m", "hydra/launcher=basic"] if sweep else []
    monkeypatch.setattr("sys.argv", ["agcseg-train", *how, "data=streets"])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == (1 if sweep else 2)
    expected = "error: out of memory (CUDA out of memory. Tried to allocate 2 GiB.); try a smaller minibatch"
    assert expected in capsys.readouterr().err


def test_data_program(command, tmp_path):
    done = command("data", "data=streets", "data.root=made", "data.streets.train=3", "data.streets.val=1",
                   "data.streets.size=[64,128]", "data.size=[32,64]", "data.cache_dir=cache")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "train: 3 samples, 0 missing, 0 broken" in done.stdout and "all files are good" in done.stdout
    assert len(list((tmp_path / "cache").glob("*/images.npy"))) == 2


def test_data_program_lists_every_fault(command, tmp_path):
    root = write_cityscapes(tmp_path / "city", [f"aachen_{i:06d}_000019" for i in range(3)])
    (root / "leftImg8bit/train/aachen/aachen_000001_000019_leftImg8bit.png").write_bytes(b"")
    (root / "gtFine/train/aachen/aachen_000002_000019_gtFine_labelIds.png").unlink()
    done = command("data", "data.root=city")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    for part in (
        "aachen_000001_000019_leftImg8bit.png: cannot be decoded",
        "aachen_000002_000019_gtFine_labelIds.png: missing (it comes with gtFine_trainvaltest.zip)",
        "train: 2 complete samples, data.train_images=2750 asks for more; give data.train_images=null",
        "64x128, expected 1024x2048",
    ):
        assert part in done.stdout
    (tmp_path / "file").touch()
    unwritable = command("data", "data=streets", "data.root=file/streets")
    assert unwritable.returncode == 2 and "cannot be read or written (Not a directory)" in unwritable.stderr
    assert "Traceback" not in unwritable.stderr
    missing = command("data", "data.root=nowhere")
    assert missing.returncode == 1 and "leftImg8bit_trainvaltest.zip" in missing.stdout


@pytest.mark.parametrize("program", ["train", "data", "report", "export"])
def test_help_starts_with_what_it_does(command, program):
    done = command(program, "--help")
    assert done.returncode == 0 and f"agcseg-{program}" in done.stdout.splitlines()[0]
    assert "outputs/" in done.stdout or program == "data"
