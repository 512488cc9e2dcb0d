"""One job in a fresh interpreter. Started as a script, told through its standard input what to do.

That pipe stays open as long as the launcher lives.
"""

import ctypes
import functools
import importlib
import json
import os
import pickle
import runpy
import signal
import sys
import threading
import time
import traceback
import types
from typing import Any

LOADING = "HYDRA_GPUS_LAUNCHER_LOADS_MAIN"  # set while the main module is imported again


def main() -> int:
    signal.signal(signal.SIGTERM, _terminated)
    for descriptor in os.environ["HYDRA_GPUS_LAUNCHER_HOLDS"].split(","):
        os.set_inheritable(int(descriptor), False)  # locks: this job's, not those of what it starts
    if sys.platform == "linux":  # should the launcher die while it has stopped this job: go on, and notice
        ctypes.CDLL(None).prctl(1, signal.SIGCONT, 0, 0, 0)
    pipe = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    start, job = pickle.load(pipe)
    threading.Thread(target=_watch, args=(pipe.fileno(), start["grace_s"]), daemon=True).start()
    sys.path[:], sys.argv[:] = start["path"], start["argv"]
    status_file = os.environ["RUN_STATUS_FILE"]
    try:
        _load_main(start["main_name"], start["main_path"])
        value = _run(start["task"], job)
    except Exception as error:
        from hydra.errors import CompactHydraException

        compact = isinstance(error, CompactHydraException)
        print(error, file=sys.stderr) if compact else traceback.print_exc()
        message = " ".join(str(error).split())
        _tell(status_file, state="failed", reason=message if compact else f"{type(error).__name__}: {message}")
        return 1
    value = value.item() if hasattr(value, "item") else value
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        value = None
    _tell(status_file, return_value=value)
    return 0


def _run(task: tuple[str, str, int], job: bytes):
    from hydra.core.singleton import Singleton
    from hydra.core.utils import run_job, setup_globals
    from omegaconf.basecontainer import BaseContainer

    setup_globals()
    module, name, depth = task
    function: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    for _ in range(depth):
        function = function.__wrapped__
    _check_gpu()
    context, config, instances = pickle.loads(job)
    # Resolvers cannot be sent; importing the modules has registered them.
    Singleton.set_state({"instances": instances, "omegaconf_resolvers": BaseContainer._resolvers})
    return run_job(function, config, "hydra.sweep.dir", "hydra.sweep.subdir", context).return_value


def _check_gpu() -> None:
    """A program that computes with torch and was given a GPU must not fall back on the CPU."""
    given, torch = os.environ["CUDA_VISIBLE_DEVICES"], sys.modules.get("torch")
    if given and torch and not torch.cuda.is_available():
        from hydra.errors import CompactHydraException

        raise CompactHydraException(
            f"this job was given a GPU (CUDA_VISIBLE_DEVICES={given}), and torch finds none; look at nvidia-smi and at "
            "torch.cuda.is_available(), or let the jobs share the CPU: hydra.launcher.devices=cpu"
        )


def _load_main(name: str | None, path: str | None) -> None:
    """Import the program's main module under another name, as multiprocessing does: task and types may live there."""
    if not name and not path:
        return
    os.environ[LOADING] = "1"
    try:
        if name:
            content = runpy.run_module(name, run_name="__mp_main__", alter_sys=True)
        else:
            content = runpy.run_path(path or "", run_name="__mp_main__")
    except SystemExit:
        raise RuntimeError(
            "the main module ends the program when it is imported: call its Hydra main under if __name__ == '__main__':"
        ) from None
    del os.environ[LOADING]
    module = types.ModuleType("__mp_main__")
    module.__dict__.update(content)
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module


def _watch(pipe: int, grace_s: float) -> None:
    os.read(pipe, 1)  # returns when the launcher has ended
    print("the launcher is gone: this job ends too", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _terminated(number: int, frame) -> None:
    os.write(2, b"terminated\n")
    raise SystemExit(143)


def _tell(path: str, **news) -> None:
    """Add to what the job has told of itself."""
    try:
        with open(path) as file:
            news = {**json.load(file), **news}
    except (OSError, ValueError, TypeError):
        pass
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "w") as file:
        json.dump(news, file)
    os.replace(temporary, path)


if __name__ == "__main__":
    _own = sys.modules["__main__"]  # loading another main module would drop this one
    sys.exit(main())
