"""The twelve runs and eight panels, and the sweep that runs them."""

import sys

import pytest

import agcseg.cli.train
from agcseg.config import rate
from agcseg.figure1 import PANELS, RUNS, Setting, panels_of


def test_twelve_runs_each_in_a_panel_and_every_panel_of_them():
    assert len(RUNS) == len(set(RUNS)) == 12 and [panel.letter for panel in PANELS] == [*"abcdefgh"]
    assert {run for panel in PANELS for run in panel.runs} == set(RUNS)
    assert [len(panel.runs) for panel in PANELS] == [3, 3, 2, 2, 2, 2, 2, 4]


def test_panels_of_a_run():
    assert [panel.letter for panel in panels_of("segnet", "agc", 8, 0.02 * 8)] == ["b", "h"]
    assert [panel.letter for panel in panels_of("classnet", "bn", 4, 0.08)] == ["d", "f"]
    assert panels_of("segnet", "agc", 8, 0.1601) == panels_of("segnet", "group", 8, 0.16) == []


def test_the_sweep_runs_these_twelve_once_for_each_seed(monkeypatch, tmp_path):
    started = []

    def run(config, folder):
        settings = Setting(config.network.name, config.norm.name, config.minibatch, pytest.approx(rate(config)))
        started.append((settings, config.seed, str(folder)))
        return {"state": "finished"}

    monkeypatch.setattr(agcseg.cli.train, "run", run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["agcseg-train", "-m", "experiment=figure1", "hydra/launcher=basic", "seed=7"])
    agcseg.cli.train.main()
    assert len(started) == 12 and len({folder for *_, folder in started}) == 12
    for setting in RUNS:
        assert sorted(seed for found, seed, _ in started if found == setting) == [7]
    assert "outputs/figure1/segnet-bn-mb8-lr0.08-seed7" in {folder for *_, folder in started}
