"""The launcher of hydra_plugins: devices, tables, what it says and refuses. Its processes: test_sweeps.py."""

import contextlib
import errno
import io
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import open_dict

import agcseg.cli.train
from hydra_plugins.hydra_gpus_launcher import _child, _devices, _launch, _slots
from hydra_plugins.hydra_gpus_launcher._devices import CPU, Device, find_devices, job_environment, parse_list
from hydra_plugins.hydra_gpus_launcher._queue import Job, _read_status
from hydra_plugins.hydra_gpus_launcher._slots import Slots
from hydra_plugins.hydra_gpus_launcher._table import event_line, final_lines, labels, live_lines

pytestmark = pytest.mark.usefixtures("no_gpus")
ROOT = Path(__file__).parents[1]

# --- devices


LISTING = """GPU 0: NVIDIA H100 (UUID: GPU-aaaa-0)
GPU 1: NVIDIA H100 (UUID: GPU-bbbb-1)
"""
PARTS = """  MIG 1g.5gb  Device  0: (UUID: MIG-cccc)
  MIG 1g.5gb  Device  1: (UUID: MIG-dddd)
"""
INFORMATION = """Model: \t\t NVIDIA H100
IRQ:   \t\t 153
GPU UUID: \t GPU-{uuid}
Device Minor: \t {minor}
GPU Excluded:\t No
"""


def entries(devices, environment):
    return [device.visible for device in find_devices(devices, environment)[0]]


def test_devices_come_from_cuda_visible_devices():
    visible = {"CUDA_VISIBLE_DEVICES": "3, 5,GPU-8932f937-d72c"}
    assert entries("auto", visible) == ["3", "5", "GPU-8932f937-d72c"]
    assert entries([2, 0], visible) == ["GPU-8932f937-d72c", "3"]  # positions, as in CUDA
    assert find_devices(["GPU-8932f937-d72c"], visible)[0][0].name == "GPU-8932f937"
    assert find_devices("cpu", visible)[0] == [CPU]
    assert entries("auto", {"CUDA_VISIBLE_DEVICES": "1,-1,2"}) == ["1"]
    assert entries("auto", {"CUDA_VISIBLE_DEVICES": "0,0, 1,GPU-aa,GPU-aa"}) == ["0", "1", "GPU-aa"]  # each once
    assert find_devices("auto", {"CUDA_VISIBLE_DEVICES": ""})[0] == [CPU]


@pytest.mark.parametrize("devices", [[3], [0, 0], [], ["GPU-x"], "gpu", [-1], ["GPU-"]])
def test_devices_that_are_not_there_are_refused(devices):
    with pytest.raises(CompactHydraException, match=r"hydra\.launcher\.devices="):
        find_devices(devices, {"CUDA_VISIBLE_DEVICES": "3,5,7"})
    with pytest.raises(CompactHydraException, match=r"no GPU was found|at least one"):
        find_devices(devices, {"CUDA_VISIBLE_DEVICES": ""})


def test_devices_come_from_nvidia_smi(no_gpus):
    assert [gpu.visible for gpu, _ in parse_list(LISTING)] == ["0", "1"]
    assert [(gpu.visible, gpu.uuid) for gpu, _ in parse_list(LISTING + PARTS)] == [
        ("0", "GPU-aaaa-0"), ("MIG-cccc", "MIG-cccc"), ("MIG-dddd", "MIG-dddd")
    ]  # fmt: skip
    assert parse_list("No devices were found\n") == []
    no_gpus(f"cat <<END\n{LISTING}END\n")
    devices, found = find_devices("auto", {})
    assert found == "GPU 0, GPU 1 (by nvidia-smi)"
    assert [(gpu.visible, gpu.uuid) for gpu in devices] == [("0", "GPU-aaaa-0"), ("1", "GPU-bbbb-1")]
    assert (
        entries(["GPU-bbbb-1"], {}) == entries(["GPU-bbbb"], {}) == ["1"]
    )  # the UUIDs of nvidia-smi -L, or their head
    with pytest.raises(CompactHydraException, match="there are 2 GPUs .0 GPU-aaaa-0, 1 GPU-bbbb-1."):
        find_devices(["GPU-cccc-2"], {})
    assert entries("auto", {"CUDA_VISIBLE_DEVICES": "1,GPU-bbbb,0"}) == ["1", "0"]  # one GPU by two names
    assert [gpu.uuid for gpu in find_devices("auto", {"CUDA_VISIBLE_DEVICES": "1"})[0]] == ["GPU-bbbb-1"]
    mixed = LISTING.replace("H100", "T4", 1)  # CUDA counts the fastest first, unless told otherwise
    no_gpus(f"cat <<END\n{mixed}END\n")
    assert [gpu.uuid for gpu in find_devices("auto", {"CUDA_VISIBLE_DEVICES": "1"})[0]] == [""]


def test_devices_without_nvidia_smi(tmp_path, monkeypatch):
    """As the driver lists them, less those that a container may not use; else as torch sees them; else the CPU."""
    monkeypatch.setattr(_devices, "ASK_TORCH", "print('GPU 0 aa-0\\nGPU 1 ')")
    devices, found = find_devices("auto", {})
    assert found == "GPU 0, GPU 1 (by torch)" and [gpu.uuid for gpu in devices] == ["GPU-aa-0", ""]
    monkeypatch.setattr(_devices, "ASK_TORCH", "raise OSError")
    devices, found = find_devices("auto", {})
    assert devices == [CPU] and found.startswith("the CPU; no GPU was found (by nvidia-smi, ")
    for minor in (0, 1):
        (_devices.PROC / f"0000:0{minor}:00.0").mkdir(parents=True)
        (_devices.PROC / f"0000:0{minor}:00.0/information").write_text(
            INFORMATION.format(uuid=f"{minor}a", minor=minor)
        )
    monkeypatch.setattr(_devices, "DEV", tmp_path)
    (tmp_path / "nvidia1").touch()
    assert [(gpu.visible, gpu.uuid) for gpu in find_devices("auto", {})[0]] == [("0", "GPU-1a")]


def taken(slots, times):
    return [device and device.visible for device in (slots.take() for _ in range(times))]


def test_a_gpu_is_free_if_no_other_sweep_and_no_program_uses_it(no_gpus, monkeypatch):
    gpus = [gpu for gpu, _ in parse_list(LISTING)]
    ours, theirs = Slots(gpus, 2), Slots(gpus, 1)
    assert taken(ours, 1) == ["0"] and taken(theirs, 2) == ["1", None]
    assert theirs.why_not == "GPU 0: another sweep runs there"
    assert taken(ours, 2) == ["0", None] and ours.why_not == "GPU 1: another sweep runs there"
    asked = Slots([gpu._replace(asked_for=True) for gpu in gpus], 1)
    assert taken(asked, 3) == ["0", "1", None] and asked.why_not == ""
    job = os.dup(ours.lock(gpus[0])[0])  # a job holds the lock with the launcher, and when that is gone
    ours.give_back(gpus[0]), ours.give_back(gpus[0])
    theirs._refused.clear()
    assert taken(theirs, 1) == [None]
    os.close(job)
    theirs._refused.clear()
    assert taken(theirs, 1) == ["0"]

    theirs.give_back(gpus[0]), theirs.give_back(gpus[1])
    ours._refused.clear()
    no_gpus(f"echo GPU-aaaa-0, 4711; echo GPU-bbbb-1, {os.getpid()}\n")
    assert taken(ours, 3) == ["1", "1", None] and ours.why_not == "GPU 0: process 4711 computes there"
    no_gpus("echo '[Insufficient Permissions], [N/A]'\n")
    ours._refused.clear()
    assert taken(ours, 1) == ["0"] and ours.why_not == ""


def test_the_cpu_is_always_free_and_locks_need_no_folder(monkeypatch):
    assert taken(Slots([CPU], 2), 3) == taken(Slots([CPU], 2), 3) == ["", "", None]
    monkeypatch.setenv(_slots.LOCKS, "/nowhere")
    assert taken(Slots([Device("GPU 0", "0")], 1), 1) == ["0"]


def test_a_job_without_the_gpu_it_was_given_fails(monkeypatch):
    """`torch` here finds none; a program without torch is not asked."""
    for given, torch, complains in (("0", True, True), ("GPU-aa", True, True), ("", True, False), ("0", False, False)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        cuda = SimpleNamespace(is_available=lambda: False)
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda) if torch else None)
        with pytest.raises(CompactHydraException, match="given a GPU") if complains else contextlib.nullcontext():
            _child._check_gpu()


def test_threads_are_shared_out_unless_the_user_has_set_them():
    cores = len(os.sched_getaffinity(0))
    bare = job_environment(CPU, 2, Path("s"), {})
    assert bare["OMP_NUM_THREADS"] == str(max(1, cores // 2)) and bare["OMP_WAIT_POLICY"] == "PASSIVE"
    assert bare["CUDA_VISIBLE_DEVICES"] == "" and bare["RUN_STATUS_FILE"] == "s"
    assert job_environment(CPU, 1000, Path("s"), {})["OMP_NUM_THREADS"] == "1"
    chosen = {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE", "CUDA_VISIBLE_DEVICES": "1,2"}
    kept = job_environment(Device("GPU 2", "2"), 2, Path("s"), chosen)
    assert kept == {**chosen, "CUDA_VISIBLE_DEVICES": "2", "RUN_STATUS_FILE": "s"}
    for order in ({}, {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}):  # numbers of nvidia-smi, whatever the user's are
        assert job_environment(Device("GPU 2", "2"), 2, Path("s"), order)["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


# --- tables: pure functions of the jobs


def made(label, state, told=100.0, **values):
    job = Job(label, "x", lambda: (b"", Path()), state, told=told, log=Path("sweep/.jobs/x.log"), **values)
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
    job.log = tmp_path / "status.log"
    job.status_file.write_text(text)
    _read_status(job)
    assert live_lines([job], 80, 24, now=time.time())[1].startswith("a    running  cpu")


# --- what is said, and what is refused


class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize(
    "stream",
    [
        Broken(BrokenPipeError()),
        Broken(OSError(errno.EIO, "the terminal is gone")),
        Broken(OSError(errno.ENOSPC, "the disk is full")),
        Broken(ValueError("I/O operation on closed file")),
        None,
    ],
)
def test_no_stream_ends_a_sweep(stream, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream)
    job, slots = made("a", "finished"), Slots([CPU], 1)
    show = _launch._shower([job], slots)
    show(None), show(job), show(None, over=True)
    _launch.say("the table")


def test_what_a_stream_cannot_spell_is_replaced():
    stream = io.TextIOWrapper(io.BytesIO(), "latin-1")
    _launch.say("x=ü…", stream)
    assert stream.buffer.getvalue() == "x=ü?\n".encode("latin-1")


def test_a_stream_that_broke_stays_quiet():
    """Python too flushes it once more at its end, and would end with code 120."""
    with open("/dev/full", "w") as full:
        _launch.say("a", full)
        _launch.say("b", full)


def test_gpus_in_use_are_told_once(capsys):
    slots = Slots([CPU], 1)
    show = _launch._shower([made("a", "waiting")], slots)
    slots._refused[Device("GPU 0", "0")] = 0.0, "another sweep runs there"
    show(None), show(None)
    assert capsys.readouterr().out.count("not used now: GPU 0: another sweep runs there") == 1
    waits = made("a", "waiting", reason="another sweep runs it")
    assert event_line(waits) == "a: waits, another sweep runs it"
    assert live_lines([waits], 80, 24, 1.0, "GPU 0: busy")[1:] == [
        "a    waiting  another sweep runs it",
        "1 runs: 1 waiting; 0 s; GPU 0: busy",
    ]


@pytest.mark.parametrize("size", [1, 3])
def test_batches_are_refused(size):
    own = {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "max_batch_size": size}
    with pytest.raises(CompactHydraException, match=f"max_batch_size={size}: a failure in one batch"):
        _launch._refuse_batches(own)
    for other in ({**own, "max_batch_size": None}, {**own, "_target_": "hydra_plugins.x.OptunaSweeper"}):
        _launch._refuse_batches(other)


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        ([["experiment=norms"], ["experiment=gems"]], "experiment=norms: there is a sweep of its own"),
        ([["seed=1", "experiment=none"], ["seed=1", "experiment=demo"]], "demo: there is a sweep of its own"),
        ([["hydra/launcher=gpus"], ["hydra/launcher=gpus_shared"]], "there is a launcher of its own"),
        ([["experiment=norms", "norm=bn"], ["experiment=norms", "norm=agc"]], None),
        ([["data=streets", "lr.base=1"], ["data=camvid", "lr.base=1"]], None),
    ],
)
def test_files_with_sweeps_of_their_own_are_not_swept_over(jobs, message):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        common = [override for override in jobs[0] if override in jobs[1]]
        of_all = loader.load_configuration("train", common, RunMode.MULTIRUN)
        launcher = SimpleNamespace(config=of_all, hydra_context=SimpleNamespace(config_loader=loader))
        with pytest.raises(CompactHydraException, match=message) if message else contextlib.nullcontext():
            _launch._refuse_lost_sweeps(launcher, jobs)


# --- agcseg-train in a sweep


@pytest.mark.parametrize(
    "argument", ["hydra.sweep.dir=x", "hydra.run.dir=x", "++hydra.sweep.subdir=x", "hydra.job.chdir=true"]
)
def test_folders_of_hydra_are_refused(argument, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["agcseg-train", "-m", argument, "seed=1,2"])
    with pytest.raises(SystemExit) as end:
        agcseg.cli.train.main()
    assert end.value.code == 2 and f"{argument}: runs go to outputs/NAME/RUN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("choice", "what"),
    [
        ("hydra/launcher=slurm", "agcseg[slurm]"),
        ("hydra/launcher=submitit_local", "agcseg[slurm]"),
        ("hydra/launcher=ray_gpus", "agcseg[ray]"),
        ("hydra/sweeper=optuna", "hydra-optuna-sweeper"),
    ],
)
def test_a_plugin_that_is_missing_is_named(choice, what, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["agcseg-train", "-m", choice, "seed=1,2"])
    monkeypatch.setattr(agcseg.cli.train, "check_sweep", lambda arguments: None)
    with pytest.raises(SystemExit) as end:
        agcseg.cli.train.main()
    assert end.value.code == 1 and capsys.readouterr().err.endswith(f"comes with a plugin: pip install '{what}'\n")


@pytest.mark.parametrize(("state", "metric"), [("finished", 0.25), ("diverged", 1.0)])
def test_a_late_divergence_is_worst_for_a_sweeper(state, metric, monkeypatch):
    monkeypatch.setattr(agcseg.cli.train, "run", lambda config, folder: {"state": state, "pixel_error": 0.25})
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", [], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        assert agcseg.cli.train._job.__wrapped__(cfg) == metric
