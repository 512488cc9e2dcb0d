"""The launcher of hydra_plugins, with a program that knows nothing of torch; at the end, real runs that are killed."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.errors import CompactHydraException

from hydra_plugins.hydra_gpus_launcher._devices import CPU, Device, find_devices, job_environment, parse_list
from hydra_plugins.hydra_gpus_launcher._queue import Job, _read_status
from hydra_plugins.hydra_gpus_launcher._table import event_line, final_lines, labels, live_lines

ROOT = Path(__file__).parents[1]

APP = """
import json, os, signal, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path
import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig

@dataclass
class Conf:
    what: str = "ok"
    x: int = 0
    seconds: float = 0.0

ConfigStore.instance().store(name="conf", node=Conf)

def tell(**status):
    path = os.environ.get("RUN_STATUS_FILE", "nobody.json")
    Path(path + ".new").write_text(json.dumps(status))
    os.replace(path + ".new", path)

@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent), config_name="conf")
def job(cfg):
    it, began = HydraConfig.get(), time.time()
    tell(state="running", progress="epoch 1/2", error="50.0 %", eta_s=3)
    record = {"mode": it.mode.name, "num": it.job.num, "id": it.job.id, "dirname": it.job.override_dirname,
              "task": list(it.overrides.task), "output": it.runtime.output_dir, "name": it.job.name,
              "sources": [str(s.path) for s in it.runtime.config_sources], "argv": sys.argv}
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_DEVICE_ORDER")
    environment = {key: os.environ[key] for key in names if key in os.environ}
    Path(f"started{it.job.num}").write_text(str(os.getpid()))
    try:
        time.sleep(cfg.seconds)
    finally:
        Path(f"left{it.job.num}").touch()
    if cfg.what == "raise":
        raise ValueError("no\\nway")
    if cfg.what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.what == "exit":
        sys.exit("had enough")
    if cfg.what == "diverge":
        tell(state="diverged", reason="the loss became nan")
    if cfg.what == "leave":
        Path("left.pid").write_text(str(subprocess.Popen(["sleep", "1000"]).pid))
    with open("records.jsonl", "a") as file:
        file.write(json.dumps({**record, "environment": environment, "from": began, "to": time.time()}) + "\\n")
    return cfg.x / 4

def main():
    job()

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def app(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


def environment(**more):
    own = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
    rest = {key: value for key, value in os.environ.items() if key not in own}
    return {**rest, "PYTHONPATH": str(ROOT), **more}


def command(*arguments, program=("app.py",)):
    return [sys.executable, *program, "-m", "hydra/launcher=gpus", "hydra.sweep.dir=sweep", *arguments]


def sweep(folder, *arguments, program=("app.py",), **more):
    return subprocess.run(
        command(*arguments, program=program), cwd=folder, env=environment(**more), capture_output=True, text=True
    )


def records(folder):
    return sorted(map(json.loads, (folder / "records.jsonl").read_text().splitlines()), key=lambda r: r["num"])


def wait_for(condition, seconds=300.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- devices


def test_devices_come_from_cuda_visible_devices():
    visible = {"CUDA_VISIBLE_DEVICES": "3, 5,GPU-8932f937-d72c"}
    assert [d.visible for d in find_devices("auto", visible)] == ["3", "5", "GPU-8932f937-d72c"]
    assert [d.visible for d in find_devices([2, 0], visible)] == ["GPU-8932f937-d72c", "3"]  # positions, as in CUDA
    assert find_devices(["GPU-8932f937-d72c"], visible) == [Device("GPU-8932f937", "GPU-8932f937-d72c")]
    assert find_devices("cpu", visible) == [CPU]
    assert [d.visible for d in find_devices("auto", {"CUDA_VISIBLE_DEVICES": "1,-1,2"})] == ["1"]
    assert find_devices("auto", {"CUDA_VISIBLE_DEVICES": ""}) == [CPU]


@pytest.mark.parametrize("devices", [[3], [0, 0], [], ["GPU-x"], "gpu", [-1]])
def test_devices_that_are_not_there_are_refused(devices):
    with pytest.raises(CompactHydraException, match=r"hydra\.launcher\.devices="):
        find_devices(devices, {"CUDA_VISIBLE_DEVICES": "3,5,7"})
    with pytest.raises(CompactHydraException, match=r"no GPU was found|at least one"):
        find_devices(devices, {"CUDA_VISIBLE_DEVICES": ""})


def test_devices_come_from_nvidia_smi(tmp_path):
    listing = "GPU 0: NVIDIA H100 (UUID: GPU-aa)\nGPU 1: NVIDIA H100 (UUID: GPU-bb)\n"
    parts = "  MIG 1g.5gb  Device  0: (UUID: MIG-cc)\n  MIG 1g.5gb  Device  1: (UUID: MIG-dd)\n"
    assert parse_list(listing) == ["0", "1"] and parse_list(listing + parts) == ["0", "MIG-cc", "MIG-dd"]
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{listing}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    code = (
        "import os; from hydra_plugins.hydra_gpus_launcher._devices import *; print(find_devices('auto', os.environ))"
    )
    found = subprocess.run([sys.executable, "-c", code], env=environment(PATH=str(tmp_path)), capture_output=True)
    assert b"visible='0'" in found.stdout and b"visible='1'" in found.stdout, found.stderr


def test_threads_are_shared_out_unless_the_user_has_set_them():
    cores = len(os.sched_getaffinity(0))
    bare = job_environment(CPU, 2, Path("s"), {})
    assert bare["OMP_NUM_THREADS"] == str(max(1, cores // 2)) and bare["OMP_WAIT_POLICY"] == "PASSIVE"
    assert bare["CUDA_VISIBLE_DEVICES"] == "" and bare["RUN_STATUS_FILE"] == "s"
    assert job_environment(CPU, 1000, Path("s"), {})["OMP_NUM_THREADS"] == "1"
    chosen = {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE", "CUDA_VISIBLE_DEVICES": "1,2"}
    kept = job_environment(Device("GPU 2", "2"), 2, Path("s"), chosen)
    assert kept == {**chosen, "CUDA_VISIBLE_DEVICES": "2", "RUN_STATUS_FILE": "s"}
    assert job_environment(Device("GPU 2", "2"), 2, Path("s"), {})["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


# --- tables: pure functions of the jobs


def made(label, state, told=100.0, **values):
    job = Job(label, Path("sweep/.jobs/x.log"), Path("x.json"), lambda: b"", state, told=told, **values)
    if state != "waiting":
        job.device, job.started = CPU, 40.0
    if state not in ("waiting", "running"):
        job.ended = 100.0
    return job


def test_live_table():
    status = {"progress": "epoch 3/150", "error": "23.1 %", "eta_s": 1200}
    jobs = [
        made("norm=bn", "running", status=status),
        made("norm=agc", "running"),
        made("norm=none", "failed", reason="exit code 3:\n\033[31mgone"),
        made("norm=group", "waiting"),
    ]
    assert live_lines(jobs, 80, 24, now=160.0) == [
        "run         state    device  progress     error   left",
        "norm=bn     running  cpu     epoch 3/150  23.1 %  19 min",
        "norm=agc    running  cpu     starting",
        "norm=none   failed   cpu  exit code 3: [31mgone",
        "norm=group  waiting",
        "4 runs: 1 failed, 2 running, 1 waiting; 2 min",
    ]


@pytest.mark.parametrize(("width", "height"), [(40, 8), (20, 5), (80, 3), (10, 1)])
def test_live_table_fits_the_terminal(width, height):
    jobs = [made(f"minibatch={i} norm=agc", "finished", status={"error": "20 %"}) for i in range(30)]
    jobs += [made(f"seed={i} norm=agc", "running", status={"progress": "epoch 1/9"}) for i in range(2)]
    jobs += [made(f"late={i}", "waiting") for i in range(30)]
    lines = live_lines(jobs, width, height, now=200.0)
    assert len(lines) <= max(1, height - 1) and all(len(line) < width for line in lines)
    assert lines[-1].startswith("62 runs:"[: width - 2])
    if height >= 5:
        shown = "".join(lines[:-1])
        assert shown.count("seed=") == 2 and "minibatch=" not in shown


def test_events_and_the_final_table():
    jobs = [
        made("a", "finished", status={"error": "20.0 %"}),
        made("b", "failed", reason="killed by SIGKILL (out of memory?)"),
        made("c", "waiting"),
    ]
    assert event_line(jobs[0]) == "a: finished after 1 min, error 20.0 %"
    assert event_line(jobs[1]) == (
        "b: failed after 1 min: killed by SIGKILL (out of memory?) (output in sweep/.jobs/x.log)"
    )
    assert final_lines(jobs, 100.0) == [
        "run  state        took   error   reason",
        "a    finished     1 min  20.0 %",
        "b    failed       1 min          killed by SIGKILL (out of memory?) (sweep/.jobs/x.log)",
        "c    not started",
        "3 runs: 1 failed, 1 finished, 1 not started; 1 min",
    ]


def test_labels_leave_out_what_all_runs_share():
    assert labels([["data=x", "norm=bn"], ["data=x", "norm=agc"]]) == ["norm=bn", "norm=agc"]
    assert labels([["a=1"]]) == ["a=1"] and labels([["a=1"], ["a=1"]]) == ["run 0", "run 1"]


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"state": "running", "eta_s": "soon", "error": null, "progress": 7}']
)
def test_a_status_file_may_hold_anything(tmp_path, text):
    job = made("a", "running")
    job.status_file = tmp_path / "status.json"
    job.status_file.write_text(text)
    _read_status(job)
    assert live_lines([job], 80, 24, now=time.time())[1].startswith("a    running  cpu")


# --- sweeps of the small program


def test_each_job_sees_one_gpu_and_no_gpu_has_more_jobs_than_it_may(app):
    done = sweep(app, "x=1,2,3,4,5,6", "seconds=0.4", "hydra.launcher.devices=[0,2]",
                 "hydra.launcher.jobs_per_device=2", CUDA_VISIBLE_DEVICES="3,5,GPU-ab")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ran = records(app)
    assert [record["num"] for record in ran] == list(range(6))
    for gpu in ("3", "GPU-ab"):
        spans = [(r["from"], r["to"]) for r in ran if r["environment"]["CUDA_VISIBLE_DEVICES"] == gpu]
        assert len(spans) >= 2
        assert max(sum(a <= at < b for a, b in spans) for at, _ in spans) <= 2
    assert {r["environment"]["CUDA_VISIBLE_DEVICES"] for r in ran} == {"3", "GPU-ab"}
    first = sorted(ran, key=lambda r: r["from"])[:4]  # the emptiest GPU comes first
    assert sorted(r["environment"]["CUDA_VISIBLE_DEVICES"] for r in first) == ["3", "3", "GPU-ab", "GPU-ab"]
    starts = re.findall(r"x=(\d): started", done.stdout)
    assert starts == list("123456")  # in order


def test_failures_touch_no_other_and_are_told(app):
    whats = "ok,raise,kill,exit,diverge,ok,leave"
    done = sweep(app, f"what={whats}", "hydra.launcher.devices=cpu", "hydra.launcher.jobs_per_device=2")
    assert done.returncode == 1
    table = done.stdout[done.stdout.index("run           state") :]
    for line in (
        r"what=ok       finished  \d+ s +50.0 %",
        r"what=raise    failed    \d+ s +50.0 %  ValueError: no way \(sweep/.jobs/what=raise-\w+.log\)",
        r"what=kill     failed    \d+ s +50.0 %  killed by SIGKILL \(out of memory\?\) \(sweep/.jobs/what=kill",
        r"what=exit     failed    \d+ s +50.0 %  exit code 1: had enough \(sweep/.jobs/what=exit",
        r"what=diverge  diverged  \d+ s +the loss became nan",
        r"6 runs: 1 diverged, 3 failed, 2 finished",  # the second what=ok is the first
    ):
        assert re.search(line, table), table
    (log,) = app.glob("sweep/.jobs/what=raise-*.log")
    assert "ValueError: no\nway" in log.read_text()
    assert "Traceback" not in done.stdout + done.stderr
    assert [r["task"] for r in records(app)] == [["what=ok"], ["what=diverge"], ["what=leave"]]
    assert all(r["environment"]["CUDA_VISIBLE_DEVICES"] == "" for r in records(app))
    wait_for(lambda: not alive(int((app / "left.pid").read_text())), 5)  # nothing is left behind on a GPU


def test_jobs_are_what_the_basic_launcher_makes_them_however_the_program_starts(app):
    (app / "entry").write_text("import app\nif __name__ == '__main__':\n    app.main()\n")  # as console scripts are

    def ran(*program, launcher="gpus"):
        (app / "records.jsonl").unlink(missing_ok=True)
        done = sweep(app, "x=1,2", f"hydra/launcher={launcher}", program=program, PYTHONPATH=f"{ROOT}{os.pathsep}{app}")
        assert done.returncode == 0, done.stdout + done.stderr
        for record in (made := records(app)):
            assert record.pop("argv")[1:4] == ["-m", "hydra/launcher=gpus", "hydra.sweep.dir=sweep"]
            del record["environment"], record["from"], record["to"]
        return made

    basic = ran("app.py", launcher="basic")
    assert [record["num"] for record in basic] == [0, 1] and basic[0]["mode"] == "MULTIRUN"
    assert ran("app.py") == ran("-m", "app") == ran("entry") == basic


def test_a_sweeper_gets_what_the_jobs_returned(app):
    plugin = app / "hydra_plugins/telling"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").touch()
    (plugin / "sweeper.py").write_text(
        "from hydra._internal.core_plugins.basic_sweeper import BasicSweeper\n"
        "class TellingSweeper(BasicSweeper):\n"
        "    def sweep(self, arguments):\n"
        "        print('returned', [r.return_value for batch in super().sweep(arguments) for r in batch])\n"
    )
    done = sweep(app, "x=1,6,1", "hydra.sweeper._target_=hydra_plugins.telling.sweeper.TellingSweeper",
                 PYTHONPATH=f"{ROOT}{os.pathsep}{app}")  # fmt: skip
    assert "returned [0.25, 1.5, 0.25]" in done.stdout, done.stderr
    assert len(records(app)) == 2


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("if __name__", ["x=1"], "call its Hydra main under if __name__"),
        ("", ["x=1", "hydra.launcher.devices=[9]"], "give auto, cpu, or a list"),
        ("", ["x=1", "hydra.launcher.jobs_per_device=0"], "jobs_per_device=0: must be at least 1"),
    ],
)
def test_mistakes(app, text, arguments, message):
    if text:
        (app / "app.py").write_text(APP.replace('if __name__ == "__main__":', "if True:"))
    done = sweep(app, *arguments, CUDA_VISIBLE_DEVICES="")
    said = done.stdout + done.stderr + "".join(path.read_text() for path in app.glob("sweep/.jobs/*.log"))
    assert done.returncode == 1 and message in said and "Traceback" not in done.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_launcher_leaves_no_job_behind(app, how):
    launcher = subprocess.Popen(
        command("x=1,2,3", "seconds=100", "hydra.launcher.devices=cpu", "hydra.launcher.jobs_per_device=2"),
        cwd=app, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    pids = [
        int(wait_for(lambda i=i: (app / f"started{i}").exists() and (app / f"started{i}").read_text())) for i in (0, 1)
    ]
    launcher.send_signal(how)
    out, err = launcher.communicate(timeout=30)
    wait_for(lambda: not any(map(alive, pids)), 10)
    assert (app / "left0").exists() and (app / "left1").exists()  # the jobs could tidy up
    if how == signal.SIGKILL:
        assert "the launcher is gone" in next(app.glob("sweep/.jobs/x=1-*.log")).read_text()
        return
    assert launcher.returncode == 128 + how, err
    assert "3 runs: 2 interrupted, 1 not started" in out and "the same command runs what is left" in err
    assert "Traceback" not in out + err


def test_what_does_not_listen_is_killed(app):
    deaf = APP.replace("        time.sleep(cfg.seconds)", "        deaf(cfg.seconds)").replace(
        "def main", "def deaf(seconds):\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    Path('deaf').touch()\n    time.sleep(seconds)\n\ndef main")  # fmt: skip
    (app / "app.py").write_text(deaf)
    launcher = subprocess.Popen(
        command("x=1", "seconds=100", "hydra.launcher.grace_s=0.2"), cwd=app, env=environment(CUDA_VISIBLE_DEVICES=""),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for((app / "deaf").exists)
    launcher.terminate()
    out, _ = launcher.communicate(timeout=10)
    assert launcher.returncode == 143 and "1 interrupted" in out and not alive(int((app / "started0").read_text()))


def test_table_on_a_terminal(app):
    import pty

    until_seen = APP.replace("time.sleep(cfg.seconds)", "while not Path('seen').exists(): time.sleep(0.05)")
    (app / "app.py").write_text(until_seen)
    master, slave = pty.openpty()
    launcher = subprocess.Popen(
        command("x=1,2", "what=ok,raise", "hydra.launcher.jobs_per_device=2"), cwd=app,
        env=environment(TERM="xterm", CUDA_VISIBLE_DEVICES=""), stdout=slave, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(slave)
    seen = b""
    try:
        while part := os.read(master, 65536):
            seen += part
            if b"epoch 1/2" in seen and b"waiting" in seen:
                (app / "seen").touch()
    except OSError:  # Linux's end of file on a terminal
        pass
    assert launcher.wait() == 1
    text = seen.decode()
    assert "\033[J" in text
    last = text[text.rindex("\033[J") :]
    assert last.count("x=1 what=ok") == 1 and "4 runs: 2 failed, 2 finished" in last  # the live table is gone


# --- real runs


def rows(folder):
    with open(folder / "metrics.csv") as file:
        return [
            {key: value for key, value in row.items() if key not in ("images_per_second", "seconds", "peak_memory_mib")}
            for row in csv.DictReader(file)
        ]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_the_same_command(streets, tmp_path):
    """One run is killed, then the launcher; the same command ends all six runs, as if nothing had happened."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def agcseg_train(name, *more):
        return [
            sys.executable, "-m", "agcseg.cli.train", "-m", "experiment=demo", f"name={name}", f"data.root={streets}",
            "data.size=[32,64]", f"data.cache_dir={tmp_path}/cache", "network.width=0.05", "epochs=6", "device=cpu",
            "minibatch=1,2,4", *more,
        ]  # fmt: skip

    def running(but=()):
        """Status files of runs in training: past their first epoch, not at their end."""
        told = {path: path.read_text() for path in folder.glob(".jobs/*.json")}
        return [path for path, text in told.items() if '"running"' in text and path not in but]

    folder, threads = tmp_path / "outputs/killed", environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    straight = subprocess.run(agcseg_train("straight", "hydra/launcher=basic"), cwd=tmp_path, env=threads)
    assert straight.returncode == 0
    killed = agcseg_train("killed", "hydra.launcher.jobs_per_device=2")
    with open(tmp_path / "first.log", "w") as log:
        launcher = subprocess.Popen(killed, cwd=tmp_path, env=threads, stdout=log, stderr=log)
    victim = wait_for(running)[0]
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"RUN_STATUS_FILE={victim}".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            os.kill(int(pid), signal.SIGKILL)
    wait_for(lambda: "failed after" in (tmp_path / "first.log").read_text())
    wait_for(lambda: running(but=[victim]))
    launcher.kill()
    launcher.wait()
    broken = {path.parent.name for path in folder.glob("*/last.pt")} - {
        path.parent.name for path in folder.glob("*/result.json")
    }
    assert "killed by SIGKILL" in (tmp_path / "first.log").read_text() and len(broken) >= 2
    again = subprocess.run(killed, cwd=tmp_path, env=threads, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr

    runs = sorted(path.parent.name for path in folder.glob("*/result.json"))
    assert len(runs) == 6
    for run in runs:
        ended, reference = folder / run, tmp_path / "outputs/straight" / run
        assert json.loads((ended / "result.json").read_text())["state"] == "finished"
        assert [row["epoch"] for row in rows(ended)] == list("123456")
        assert rows(ended) == rows(reference)
        for part, tag in (("", "curves/val_loss"), ("samples", "curves_by_samples/val_loss")):
            events = EventAccumulator(str(ended / part), size_guidance={"scalars": 0})
            events.Reload()
            steps = [event.step for event in events.Scalars(tag)]
            assert steps == sorted(set(steps))
