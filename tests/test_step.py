"""A step in one graph's fixed memory, on the CPU, where what replays a graph is the step itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from agcseg.config import Config
from agcseg.errors import UserError
from agcseg.training import run as training
from agcseg.training import step
from agcseg.training.run import run


@pytest.fixture
def captures(monkeypatch):
    """Runs with `graph` are let onto the CPU, and what only a GPU has is replaced; the rates of each capture."""
    made = []

    def capture(call, optimizer):
        rate, outputs = optimizer.param_groups[0]["lr"], []
        made.append(rate)

        def replay():
            assert optimizer.param_groups[0]["lr"] == rate  # it is in the graph
            outputs[:] = call()

        return replay, outputs

    def make_step(config, *arguments):
        return step.make_step(replace(config, graph=True), *arguments)

    def run_with_graph(config: Config, folder):
        with monkeypatch.context() as patch:
            patch.setattr(step, "capture", capture)
            patch.setattr(training, "make_step", make_step)
            return run(config, folder)

    return made, run_with_graph


@pytest.mark.parametrize(
    ("values", "rates"),
    [
        ({"accumulate": 2, "clip_norm": 0.1, "schedule": "cosine", "ema": 0.9}, 2),
        ({"norm": "bn", "optimizer": "adamw", "minibatch": 1, "epochs": 1}, 1),
    ],
)
def test_a_run_with_graphs_is_that_run(tiny, tmp_path, captures, values, rates):
    config = tiny(**{"minibatch": 2, **values})
    config.lr.value = 0.01
    made, run_with_graph = captures
    run(config, tmp_path / "eager")
    run_with_graph(config, tmp_path / "graph")
    assert len(made) == len(set(made)) == rates
    steps = [np.load(tmp_path / name / "steps.npy") for name in ("eager", "graph")]
    assert np.array_equal(*steps) and len(np.unique(steps[0])) == steps[0].size
    saved = [torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("eager", "graph")]
    for part in ("network", "average"):
        for key, value in (saved[0][part] or {}).items():
            assert torch.equal(value, saved[1][part][key]), key


def test_what_has_no_graph_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="graph=true: the CPU"):
        run(tiny(graph=True), tmp_path / "run")
    config = tiny(graph=True)
    config.gems.mode = "minibatch"
    with pytest.raises(UserError, match="not together with gems"):
        run(config, tmp_path / "run")
