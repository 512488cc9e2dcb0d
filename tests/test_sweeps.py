"""Sweeps by the launcher of hydra_plugins, of a small program; at the end, real runs that are killed."""

import csv
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("no_gpus")
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


def state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
    except FileNotFoundError:
        return "gone"


def alive(pid):
    return state(pid) not in ("Z", "gone")


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
    assert ran("-m", "app") == ran("entry") == basic


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
                 "hydra.sweep.dir=sweep/${x}", PYTHONPATH=f"{ROOT}{os.pathsep}{app}")  # fmt: skip
    assert "returned [0.25, 1.5, 0.25]" in done.stdout, done.stderr
    assert len(records(app)) == 2
    assert {path.parent.parent.name for path in app.glob("sweep/*/.jobs/*.log")} == {
        "1",
        "6",
    }  # a folder of its own each


def test_mistakes(app):
    """A main module that starts the sweep when it is imported; and one that Hydra refuses before any job."""
    (app / "app.py").write_text(APP.replace('if __name__ == "__main__":', "if True:"))
    done = sweep(app, "x=1", CUDA_VISIBLE_DEVICES="")
    said = done.stdout + done.stderr + "".join(path.read_text() for path in app.glob("sweep/.jobs/*.log"))
    assert done.returncode == 1 and "call its Hydra main under if __name__" in said and "Traceback" not in done.stderr
    done = sweep(app, "x=1", "hydra.launcher.jobs_per_device=0")
    assert done.returncode == 1 and "jobs_per_device=0: must be at least 1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("redirected", ["2> /dev/full | true", ">&- 2>&-"])
def test_a_sweep_goes_on_where_nobody_listens(app, redirected):
    words = " ".join(map(shlex.quote, command("x=1,2", "hydra.launcher.devices=cpu")))
    line = f"{{ {words}; echo $? > code; }} {redirected}"
    subprocess.run(["bash", "-c", line], cwd=app, env=environment(), stderr=subprocess.DEVNULL)
    assert (app / "code").read_text() == "0\n" and len(records(app)) == 2


def test_two_launches_of_one_sweep_share_no_files(app):
    """Each job is run by one at a time; the other waits and says so, then runs it too: a program skips what is done."""
    both = [
        subprocess.Popen(command("x=1,2", "seconds=0.7", "hydra.launcher.devices=cpu"), cwd=app, env=environment(),
                         stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]  # fmt: skip
    said = [launcher.communicate(timeout=60)[0] for launcher in both]
    assert [launcher.returncode for launcher in both] == [0, 0]
    assert any("waits, another sweep runs it" in text for text in said)
    assert all("2 runs: 2 finished" in text for text in said)
    spans = [(r["task"][0], r["from"], r["to"]) for r in records(app)]
    assert len(spans) == 4
    assert not [1 for a, b in itertools.combinations(spans, 2) if a[0] == b[0] and a[1] < b[2] and b[1] < a[2]]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_launcher_leaves_no_job_behind(app, how):
    """Nor does one that Ctrl-Z has paused, with its jobs."""
    launcher = subprocess.Popen(
        command("x=1,2,3", "seconds=100", "hydra.launcher.devices=cpu", "hydra.launcher.jobs_per_device=2"),
        cwd=app, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    pids = [
        int(wait_for(lambda i=i: (app / f"started{i}").exists() and (app / f"started{i}").read_text())) for i in (0, 1)
    ]
    launcher.send_signal(signal.SIGTSTP)
    wait_for(lambda: {state(pid) for pid in (*pids, launcher.pid)} == {"T"})
    if how != signal.SIGKILL:
        launcher.send_signal(signal.SIGCONT)
        wait_for(lambda: "T" not in {state(pid) for pid in (*pids, launcher.pid)})
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
            {key: value for key, value in row.items() if "memory" not in key and "second" not in key}
            for row in csv.DictReader(file)
        ]


def test_a_killed_sweep_goes_on_with_the_same_command(streets, tmp_path):
    """One run is killed, then the launcher; the same command ends all three runs, as if nothing had happened."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def agcseg_train(name, *more):
        return [
            sys.executable, "-m", "agcseg.cli.train", "-m", "experiment=demo", f"name={name}", f"data.root={streets}",
            "data.size=[32,64]", f"data.cache_dir={tmp_path}/cache", "network.width=0.05", "epochs=6", "device=cpu",
            "norm=agc", "minibatch=1,2,4", *more,
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
    assert "Traceback" not in again.stdout + again.stderr
    done = subprocess.run(
        agcseg_train("killed", "hydra/launcher=basic"), cwd=tmp_path, env=threads, capture_output=True
    )
    assert done.returncode == 0 and done.stdout.count(b"nothing left to do") == 3, done.stdout + done.stderr

    runs = sorted(path.parent.name for path in folder.glob("*/result.json"))
    assert len(runs) == 3
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
