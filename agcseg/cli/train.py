"""agcseg-train: one run, or with -m a sweep."""

import contextlib
import os
import signal
import sys

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode

from agcseg.cli import CONFIGS, fail, hydra_arguments, program, sentence, to_object
from agcseg.cli.jobs import check_files, check_sweep, folder_of, spelled_as_in_files, with_own_hydra
from agcseg.config import Config
from agcseg.errors import UserError, first_line
from agcseg.training import parallel
from agcseg.training.machine import out_of_memory
from agcseg.training.run import run

PLUGINS = {  # by a part of their names in Hydra's groups: what brings them
    "submitit": "agcseg[slurm]", "ray": "agcseg[ray]", "joblib": "hydra-joblib-launcher",
    "optuna": "hydra-optuna-sweeper", "nevergrad": "hydra-nevergrad-sweeper", "ax": "hydra-ax-sweeper",
}  # fmt: skip


RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")  # of torchrun, of sbatch --requeue


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train")
def _job(cfg) -> float | None:
    hydra_config = HydraConfig.get()
    try:
        config = to_object(cfg, Config)
        if hydra_config.job.chdir:
            raise UserError("hydra.job.chdir=true: runs go to outputs/ of the folder that agcseg-train is started in")
        places = [
            source.path if source.schema == "file" else f"{source.schema}://{source.path}"
            for source in sorted(hydra_config.runtime.config_sources, key=lambda source: source.provider != "main")
            if source.provider.startswith(("main", "command-line", "hydra.searchpath"))
        ]
        folder = folder_of(config, hydra_config.overrides.task, hydra_config.job.config_name or "train", places)
        if not config.resume and "submitit" in hydra_config.launcher.get("_target_", ""):
            raise UserError("resume=false: Slurm queues a job again, which would start afresh then; give another name=")
        restarts = [key for key in RESTARTS if int(os.environ.get(key) or 0)]
        if not config.resume and restarts:
            raise UserError(f"resume=false: this is a restart ({restarts[0]}), which would start afresh; leave it out")
        # Other launchers have signals of their own: Slurm's queues the run again.
        ours = hydra_config.mode == RunMode.RUN or "RUN_STATUS_FILE" in os.environ
        with _stopped_at_once(config.resume) if ours else contextlib.nullcontext():
            result = run(config, folder)
        return 1.0 if result["state"] == "diverged" else result.get("pixel_error")  # nothing is worse, for a sweeper
    except (UserError, OSError) as mistake:
        error = UserError(sentence(mistake))
    except (RuntimeError, MemoryError) as full:
        first = first_line(full)
        if out_of_memory(full):
            error = UserError(f"out of memory ({first}); try a smaller minibatch, accumulate=2 or precision=bf16")
        elif "does not have a deterministic implementation" in first:
            operation = first.partition(" does not")[0]
            error = UserError(f"deterministic=true: torch has no deterministic form of {operation}; leave it out")
        elif type(full).__module__.startswith(("torch._dynamo", "torch._inductor")):
            error = UserError(f"compile=true: torch.compile cannot work here ({first}); leave it out")
        else:
            raise
    if hydra_config.mode == RunMode.RUN:
        fail("agcseg-train", error)
    # In a sweep the other runs go on: the launcher gets the error, of a kind that is shown without a traceback.
    with contextlib.suppress(OSError):
        print(f"agcseg-train: error: {error}", file=sys.stderr)
    raise CompactHydraException(str(error))


@contextlib.contextmanager
def _stopped_at_once(resume: bool):
    """Let SIGTERM and Ctrl-C end the process without another step, as safely as kill -9: all files are written whole.

    An exception raised wherever the signal arrives may find a lock held, TensorBoard's or the log's, that the way out
    waits for, for ever.
    """

    def stop(number: int, frame) -> None:
        how = "the same command goes on" if resume else "with resume=true and run=, the name of its folder, it goes on"
        os.write(2, f"\nagcseg-train: stopped; {how} from the last checkpoint\n".encode())
        os._exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refuse_folders(arguments: list[str]) -> None:
    """Runs lie in outputs/NAME/RUN, whatever Hydra's folders are."""
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key in ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir") or (
            key == "hydra.job.chdir" and value.lower() not in ("false", "null")
        ):
            raise UserError(
                f"{argument}: runs go to outputs/NAME/RUN of the folder that agcseg-train is started in; say name= and "
                "run=, or start it in another folder"
            )


def _end(end: SystemExit) -> None:
    """Add what to install where Hydra did not find a plugin; end a process of torchrun's."""
    missing = str(getattr(end.__context__, "missing_cfg_file", ""))
    for name, extra in PLUGINS.items():
        if missing.startswith("hydra/") and name in missing:
            print(f"agcseg-train: {missing} comes with a plugin: pip install '{extra}'", file=sys.stderr)
    parallel.leave(end.code if isinstance(end.code, int) else 1)


def main() -> None:
    with program("agcseg-train"):
        try:
            _main()
        except SystemExit as end:
            _end(end)
            raise


def _main() -> None:
    arguments = hydra_arguments("agcseg-train", sys.argv[1:], Config)
    sweep = get_args_parser().parse_args(arguments).multirun  # which may be said in fewer letters
    if sweep and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError("torchrun shares out one run over devices; start a sweep, -m, without it")
    _refuse_folders(arguments)
    check_files(arguments)
    sys.argv[1:] = with_own_hydra(arguments)
    if sweep:
        sys.argv[1:] = spelled_as_in_files(sys.argv[1:])
        check_sweep(sys.argv[1:])
    _job()
    parallel.leave()


if __name__ == "__main__":
    main()
