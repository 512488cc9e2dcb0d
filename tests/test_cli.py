"""The programs as a user meets them, in processes of their own where that matters."""

import contextlib
import errno
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_data import write_cityscapes

import agcseg.cli.data


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


def test_a_diverged_and_a_refused_run_do_not_stop_a_sweep(command, inside, small, tmp_path):
    done = command("train", "-m", *small, "norm=none", "lr.value=1e30,-1,0.01", "name=three", "epochs=3")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    states = [json.loads(path.read_text())["state"] for path in sorted(tmp_path.glob("outputs/three/*/result.json"))]
    assert sorted(states) == ["diverged", "finished"]
    assert "lr.value=-1.0: a learning rate must be positive" in done.stderr
    assert "3 runs: 1 diverged, 1 failed, 1 finished" in done.stdout
    basic = ["hydra/launcher=basic", "lr.value=-1,0.01,0.02"]
    code, said = inside("-m", *small, "norm=none", "name=three", "epochs=3", *basic)
    assert code == 1 and "Traceback" not in said and "lr.value=-1.0: a learning rate must" in said
    states = [json.loads(path.read_text())["state"] for path in sorted(tmp_path.glob("outputs/three/*/result.json"))]
    assert sorted(states) == ["diverged", "finished", "finished"]


def test_a_terminated_run_goes_on_with_the_same_command(small, tmp_path):
    many = [sys.executable, "-m", "agcseg.cli.train", *small, "epochs=1000", "run=one"]
    first = subprocess.Popen(many, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "outputs/streets/one/last.pt").exists():
        assert first.poll() is None
        time.sleep(0.1)
    first.terminate()
    _, said = first.communicate(timeout=120)
    assert first.returncode == 143 and "Traceback" not in said
    assert "agcseg-train: stopped; the same command goes on from the last checkpoint" in said


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


@pytest.fixture
def inside(monkeypatch, tmp_path, capsys):
    """Call agcseg-train in this process: exit code, and what it complained of."""
    from agcseg.cli import train

    monkeypatch.setattr(train.signal, "signal", lambda number, handler: None)  # this process keeps its own
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["agcseg-train", *arguments])
        try:
            train.main()
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["data.root=/nowhere"], 2, "agcseg-train experiment=demo"),
        (["network=segnt"], 1, "Available options in 'network':"),
        (["norm=batch"], 1, "instance"),
        (["minibatches=3"], 2, "minibatches is not a key of the configuration; did you mean minibatch?"),
        (["data.sise=[32,64]"], 2, "did you mean data.size"),
        (["data.root=/my data (1)"], 2, "/my data (1) (data.root), and is not complete there"),
        (["minibatch=abc"], 2, "minibatch=abc: Value 'abc' of type 'str' could not be converted to Integer"),
        (["data.size=64x128"], 2, "data.size=64x128: expected a list, such as [1,2]"),
        (["lr=0.1"], 2, "lr=0.1: lr is a group of keys, each with a value of its own: lr.base, lr.value"),
        (["data.folder=null"], 2, "data.folder=null: data.folder is a group of keys"),
        (["minibatch=0"], 2, "minibatch=0: must be at least 1"),
        (["name=a${b"], 2, "name=a${b: '${' begins a reference to another key"),
        (["norm.options.eps=1"], 2, "norm 'agc' has no option eps; it takes mean_scale"),
    ],
)
def test_mistakes(inside, tmp_path, arguments, code, message):
    ended, said = inside(*arguments)
    assert ended == code and message in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())  # nothing half-written


@pytest.mark.parametrize("what", ["file", "dangling link", "read-only", "full", "long", "result", "no names"])
def test_files_that_cannot_be_used_are_one_line(inside, small, tmp_path, monkeypatch, what):
    expected, more = "outputs", []
    if what == "file":
        (tmp_path / "outputs").touch()
    elif what == "dangling link":
        (tmp_path / "outputs").symlink_to("nowhere")
    elif what == "read-only":
        original = Path.mkdir

        def mkdir(path, *arguments, **options):
            if path.name in ("outputs", "streets", "run"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return original(path, *arguments, **options)

        monkeypatch.setattr(Path, "mkdir", mkdir)
    elif what == "full":
        monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        expected = "config.yaml"
    elif what == "long":
        more, expected = ["run=" + 300 * "x"], 300 * "x"
    elif what == "result":
        (tmp_path / "outputs/streets/run").mkdir(parents=True)
        (tmp_path / "outputs/streets/run/metrics.csv").touch()
        expected = "holds a run (metrics.csv) but no last.pt"
    elif what == "no names":
        more, expected = ["data.root=" + 5000 * "y"], "yyy"
    code, said = inside(*small, "run=run", *more)
    assert code == 2 and said.startswith("agcseg-train: error:") and expected in said
    assert said.count("\n") == 1 or what == "no names"
    assert not list(tmp_path.glob("outputs/*/*/.[a-km-z]*"))  # no half-written file


def test_starting_afresh_at_a_restart_is_refused(inside, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    code, said = inside("experiment=demo", "resume=false")
    assert code == 2 and "resume=false: this is a restart (SLURM_RESTART_COUNT)" in said
    assert not list(tmp_path.iterdir())


def test_a_configuration_of_a_run_starts_it_again(inside, small, tmp_path):
    assert inside(*small, "name=n=1", "momentum=0.8")[0] == 0
    (folder,) = (tmp_path / "outputs/n=1").iterdir()
    assert folder.name == "segnet-agc-mb4-lr0.08-seed1-data.size=32x64-momentum=0.8-network.width=0.05"
    before = {path.name for path in tmp_path.iterdir()}
    assert inside("-cd", str(folder), "-cn", "config", "epochs=2")[0] == 0
    assert json.loads((folder / "result.json").read_text())["epochs"] == 2
    assert inside("--config-dir", str(folder), "--config-name=config", "seed=2")[0] == 0
    assert len(list(folder.parent.iterdir())) == 2 and {path.name for path in tmp_path.iterdir()} == before
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + "weight_dcay: 1\n")
    code, said = inside("-cd", str(folder), "-cn", "config")
    assert code == 2 and "weight_dcay is not a key of the configuration; did you mean weight_decay" in said


def test_a_sweep_with_one_folder_for_two_runs_starts_nothing(inside, small, tmp_path):
    for flag in ("-m", "--multi"):
        code, said = inside(flag, *small, "network.implementation=fast,literal")
    assert code == 2 and "two runs of this sweep have one folder" in said and not (tmp_path / "outputs").exists()


def test_texts_in_every_program_with_hydra(inside, small, tmp_path, streets, monkeypatch):
    shutil.copytree(streets, tmp_path / "2026_11_25")
    assert inside(*small, "data.root=2026_11_25", "name=it's (1)", "run=1e3")[0] == 0
    assert (tmp_path / "outputs/it's (1)/1e3/result.json").exists()
    from agcseg.cli import data

    monkeypatch.setattr("sys.argv", ["agcseg-data", "data=streets", "data.root=2026_11_25", "build=false"])
    data.main()
    assert not (tmp_path / "20261125").exists()


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_nobody_need_listen_to_a_run(inside, small, tmp_path, monkeypatch, closed):
    """A stream that is closed, or broken; no home folder; an empty XDG_CACHE_HOME."""
    monkeypatch.setattr(sys, closed, None)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    arguments = [argument for argument in small if not argument.startswith("data.cache_dir")]
    assert inside(*arguments, "run=one")[0] == 0
    assert (tmp_path / "home/.cache/agcseg").is_dir()

    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, closed, Broken())
    assert inside(*arguments, "run=two")[0] == 0
    assert (tmp_path / "outputs/streets/two/result.json").exists()


def test_no_home_folder(inside, small, monkeypatch):
    def nobody(path):
        if str(path).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return path

    monkeypatch.setattr(Path, "expanduser", nobody)
    code, said = inside("data=streets", "data.cache_dir=~/c")
    assert code == 2 and "data.cache_dir=~/c: there is no home folder here; give data.cache_dir=FOLDER" in said


def test_an_operation_without_a_deterministic_form(inside, monkeypatch):
    from agcseg.cli import train

    def run(config, folder):
        torch.use_deterministic_algorithms(True)
        try:
            torch.zeros(2).put_(torch.zeros(1, dtype=torch.int64), torch.ones(1))
        finally:
            torch.use_deterministic_algorithms(False)

    monkeypatch.setattr(train, "run", run)
    code, said = inside("data=streets", "deterministic=true")
    assert (code, said) == (
        2,
        "agcseg-train: error: deterministic=true: torch has no deterministic form of put_; leave it out\n",
    )


def test_a_compiler_that_is_missing(inside, monkeypatch):
    from torch._inductor.exc import InductorError

    from agcseg.cli import train

    def run(config, folder):
        raise InductorError(RuntimeError("No working C++ compiler found"), None)

    monkeypatch.setattr(train, "run", run)
    code, said = inside("data=streets", "compile=true")
    assert code == 2 and "compile=true: torch.compile cannot work here (" in said and said.count("\n") == 1


def test_data_program(command, tmp_path):
    done = command("data", "data=streets", "data.root=made", "data.streets.train=3", "data.streets.val=1",
                   "data.streets.size=[64,128]", "data.size=[30,50]", "data.cache_dir=cache")  # fmt: skip
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


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["data=streets", "data.root=file/streets"], 2, "cannot be read or written (Not a directory)"),
        (["data.root=nowhere"], 1, "leftImg8bit_trainvaltest.zip"),
        (["build=false", "rebuild=true"], 2, "rebuild=true: builds the cache anew; leave out build=false"),
    ],
)
def test_data_program_says_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["agcseg-data", *arguments])
    with pytest.raises(SystemExit) as end:
        agcseg.cli.data.main()
    said = "".join(capsys.readouterr())
    assert end.value.code == code and message in said and "Traceback" not in said


@pytest.mark.parametrize("program", ["train", "data", "report", "export"])
def test_help_starts_with_what_it_does(program, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"agcseg-{program}", "--help"])
    with contextlib.suppress(SystemExit):
        importlib.import_module(f"agcseg.cli.{program}").main()
    said = capsys.readouterr().out
    assert f"agcseg-{program}" in said.splitlines()[0] and ("outputs/" in said or program == "data")
