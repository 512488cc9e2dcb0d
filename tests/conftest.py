"""A tiny street data set and a tiny run that many tests share."""

import logging
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve tests that run beside them

import pytest  # noqa: E402
import torch  # noqa: E402

import agcseg.nn.fast  # noqa: E402
from agcseg.config import Config, DataConfig, NetworkConfig, NormConfig  # noqa: E402
from agcseg.data.streets import make_streets  # noqa: E402
from hydra_plugins.hydra_gpus_launcher import _devices, _slots  # noqa: E402


@pytest.fixture(scope="session")
def streets(tmp_path_factory):
    """Built-in streets: 8 + 4 scenes of 64x128, in the Cityscapes layout."""
    return make_streets(tmp_path_factory.mktemp("data") / "streets", train=8, val=4, size=(64, 128), seed=0)


@pytest.fixture
def tiny(streets, tmp_path):
    """Make the configuration of a run that takes seconds; keyword arguments replace its values."""

    def make(norm: str = "agc", **values) -> Config:
        data = DataConfig("streets", str(streets), str(tmp_path / "cache"), [32, 64], None, None)
        network = NetworkConfig(width=0.05, init="he_centered")
        return Config(
            **{"network": network, "norm": NormConfig(norm), "data": data, "epochs": 2, "device": "cpu", **values}
        )

    return make


@pytest.fixture(autouse=True)
def _log_level():
    logging.getLogger("agcseg").setLevel(logging.DEBUG)


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(2)


@pytest.fixture
def form(request, monkeypatch):
    """The fast AGC unit as large maps have it; as small maps on a CPU where a test asks for "small"."""
    monkeypatch.setattr(agcseg.nn.fast, "SMALL", {"large": 0, "small": 2**30}[getattr(request, "param", "large")])


@pytest.fixture
def no_gpus(tmp_path_factory, monkeypatch):
    """For the launcher a machine of its own, without GPUs; the value makes nvidia-smi of a shell script."""
    folder = tmp_path_factory.mktemp("machine")

    def nvidia_smi(script: str) -> None:
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}")
        (folder / "nvidia-smi").chmod(0o755)

    nvidia_smi("exit 9\n")
    monkeypatch.setenv(_slots.LOCKS, str(folder))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(_devices, "PROC", folder / "proc")
    return nvidia_smi
