"""The benchmark's bookkeeping, on networks small enough for seconds. No time is asserted."""

import csv
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

import agcseg.cli.bench
from agcseg import ConvUnit
from agcseg.bench import measure
from agcseg.bench import table as tables
from agcseg.bench.measure import SHARES, course, fitting, frontier, kept_for_backward
from agcseg.bench.pages import write_results
from agcseg.bench.step import FOLDED, MODES, VARIANTS, Case, Step
from agcseg.bench.table import Failed, largest_minibatch, table
from agcseg.cli.bench import main
from agcseg.nn import NORMS
from agcseg.nn.background import BACKGROUNDS


def case(variant="bn", **values):
    return Case(**{"network": "segnet", "variant": variant, "minibatch": 1, "precision": "fp32", "size": (32, 64),
                   "width": 0.05, **values})  # fmt: skip


def test_variant_names():
    """Norm, form and mode put together make the name again; each is known."""
    for name in VARIANTS:
        made = case(name)
        assert "-".join(filter(None, (made.norm, made.form))) + made.suffix == name
        assert made.norm in NORMS and made.suffix in MODES
    assert {*NORMS, "agc-window", "bn-graphs", "agc-literal-compiled", "agc-gems"} < {*VARIANTS}
    assert (case("agc-literal-compiled").form, case("agc_std-graphs").norm) == ("literal", "agc_std")


@pytest.mark.parametrize(
    "variant", [name for name in VARIANTS if not name.endswith(("-compiled", "-graphs", "-graph"))]
)
def test_every_variant_runs(variant):
    """One step, or forward pass, of a network that is what the name says."""
    step = Step(case(variant, inference=variant in FOLDED))
    before = [p.clone() for p in step.network.parameters()]
    step()
    after = list(step.network.parameters())
    assert all(p.isfinite().all() for p in after)
    assert all(map(torch.equal, before, after)) == (variant in FOLDED)
    if variant not in FOLDED:
        unit, form = step.network.encoder[0][1], step.case.form
        assert isinstance(unit.norm, type(ConvUnit(1, 1, norm=NORMS[step.case.norm]).norm))
        assert getattr(unit.norm, "background", "map") == (form if form in BACKGROUNDS else "map")
        assert unit.is_fast == (variant in ("agc", "center"))
        assert bool(step.gems and step.gems.factors) == (form == "gems")
        assert len(unit.norm._forward_hooks) == (form in ("gems", "noise"))


def test_kept_bytes_by_hand():
    """x·w keeps x for w's gradient and w for x's; parameters do not count, copies of them do, nothing counts twice."""
    step = Step(case())
    step.network = nn.Linear(4, 8, bias=False)
    x = torch.randn(16, 4)
    step.loss = lambda: step.network(x).sum()
    assert kept_for_backward(step) == 16 * 4 * 4
    step.loss = lambda: (step.network(x).exp() * nn.functional.linear(x, step.network.weight * 2)).sum()
    # x once; exp's result once (for exp and for the product); the second factor; the doubled weight is not kept, since
    # x needs no gradient
    assert kept_for_backward(step) == 4 * (16 * 4 + 2 * 16 * 8)


@pytest.mark.parametrize("values", [{}, {"network": "classnet", "size": (128, 256)}])
def test_memory_and_work(values):
    figures = next(course(case(**values)))
    step = Step(case(**values))
    assert figures["parameters"] == sum(p.numel() for p in step.network.parameters())
    assert figures["kept_mib"] > 0 and figures["gflop"] > 0
    assert next(course(case(minibatch=2, **values)))["gflop"] == pytest.approx(2 * figures["gflop"])


def test_gflop_of_segnet():
    """81.39 GMAC forward at 256x512 and width 1 (three times that with backward, less the image's gradient)."""
    from torch.utils.flop_counter import FlopCounterMode

    import agcseg

    with torch.device("meta"):
        network, images = agcseg.networks.SegNet(norm=nn.BatchNorm2d), torch.empty(1, 3, 256, 512)
    with FlopCounterMode(display=False) as counter:
        network(images)
    assert counter.get_total_flops() / 2e9 == pytest.approx(81.39, abs=0.01)


def test_program(tmp_path, capsys):
    arguments = ["--width", "0.05", "--size", "32x64", "--variants", "bn,none", "--rounds", "2", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    with open(tmp_path / "bench.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == ["bn", "none"]
    assert float(rows[0]["time_to_bn"]) == 1 and float(rows[1]["kept_to_bn"]) < 1
    assert "| segnet | none | 1 | fp32 |" in (tmp_path / "bench.md").read_text()
    assert (tmp_path / "bench.png").stat().st_size > 1000
    assert "time/bn" in capsys.readouterr().out


def test_inference(tmp_path, capsys):
    """Forward passes that leave no gradients, in eval mode, next to those of folded batch normalisation."""
    step = Step(case("agc-onepass", inference=True))
    step()
    assert not step.network.training and all(p.grad is None for p in step.network.parameters())
    assert not any(isinstance(module, agcseg.AGC2d) for module in step.network.modules())
    arguments = ["--inference", "--width", "0.05", "--size", "32x64", "--rounds", "2", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    with open(tmp_path / "bench.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == ["agc-onepass", "agc", "agc-literal", "bn-folded", "bn", "none"]
    assert float(rows[3]["time_to_bn-folded"]) == 1 and "kept_mib" not in rows[0]
    assert "time/bn-folded" in capsys.readouterr().out


def test_a_case_that_fails_is_a_row_that_says_so(tmp_path, monkeypatch, capsys):
    """At its start or in a later round; what was measured before is on disk by then, and the exit code is 1."""
    kept = []

    def step(case, memory):
        if case.variant == "agc":
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield {"kept_mib": 2.0, "gflop": 1.0}
        for turn in itertools.count():
            if case.variant == "none" and turn == 1:
                raise RuntimeError("a kernel\nand more")
            kept.append((tmp_path / "bench.md").read_text())
            yield {"step": 0.5, "host": 0.25}

    monkeypatch.setattr(tables, "_in_a_process", lambda what, case, memory: step(case, memory))
    arguments = ["--variants", "bn,agc,none", "--rounds", "3", "--size", "32x64", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    assert "| segnet | agc | 1 | fp32 |" in kept[0] and "out of memory" in kept[0] and "500.0" not in kept[0]
    with open(tmp_path / "bench.csv") as file:
        bn, agc, none = csv.DictReader(file)
    assert (bn["step_ms"], bn["host_ms"], bn["failed"], bn["kept_to_bn"]) == ("500.0", "250.0", "", "1.0")
    assert (agc["step_ms"], agc["failed"]) == ("", "out of memory")
    assert none["failed"] == "RuntimeError: a kernel" and bn["time_to_none"] == "1.0"  # of the first round
    assert (tmp_path / "bench.png").stat().st_size > 1000 and "RuntimeError: a kernel" in capsys.readouterr().out


def test_a_process_that_dies_is_a_row_that_says_so(tmp_path, monkeypatch):
    """Killed, or ended by an error of its own; and one that answers."""
    for name, code in (("a", "import os; os.kill(os.getpid(), 9)"), ("b", "raise SystemExit('no such GPU')")):
        monkeypatch.setattr(tables.sys, "executable", str(tmp_path / name))
        (tmp_path / name).write_text(f'#!/bin/sh\nexec {sys.orig_argv[0]} -c "{code}"\n')
        (tmp_path / name).chmod(0o755)
        (row,) = table([case()], 1)
        assert row["failed"] == {"a": "exit code -9: it wrote nothing", "b": "exit code 1: no such GPU"}[name]


def test_what_several_calls_measured_is_one_table(tmp_path, capsys):
    for name, variant in (("a", "bn"), ("b", "agc")):
        row = {"network": "segnet", "variant": variant, "minibatch": 1, "precision": "fp32", "step_ms": 10.5}
        write_results(tmp_path / name, [row], "a GPU, today")
    assert main(["--show", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path)]) == 0
    assert "a GPU, today\n\n| network | variant |" in capsys.readouterr().out
    assert "| segnet | agc | 1 | fp32 | 10.5 |" in (tmp_path / "bench.md").read_text()
    with pytest.raises(SystemExit, match="2"):
        main(["--show", str(tmp_path / "c"), "--out", str(tmp_path)])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["--show", str(tmp_path / "a"), str(tmp_path / "c")]) == 0  # without --out nothing is written
    said = capsys.readouterr()
    assert "| segnet | bn |" in said.out and f"no bench.csv in {tmp_path / 'c'}: left out" in said.err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    before = (tmp_path / "a/bench.csv").read_text()
    with pytest.raises(SystemExit, match="2"):
        main(["--show", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "a")])
    assert (tmp_path / "a/bench.csv").read_text() == before


def test_data_that_fail_take_no_step_with_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(agcseg.cli.bench, "table", lambda *rest: [{"minibatch": 1, "images_per_second": 2.0}])
    monkeypatch.setattr(agcseg.cli.bench, "write_results", lambda *rest, **more: None)
    arguments = ["--data", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(agcseg.cli.bench, "delivery", lambda *rest: 100.0)
    assert main(arguments) == 0 and "2.00% of the time" in capsys.readouterr().out
    monkeypatch.setattr(agcseg.cli.bench, "delivery", lambda *rest: 1 / 0)
    assert main(arguments) == 1 and "failed (ZeroDivisionError" in capsys.readouterr().out


def test_a_minibatch_larger_than_the_images_made_for_it(monkeypatch):
    asked = []

    def make(path, images, *rest):
        asked.append(images)
        raise InterruptedError

    monkeypatch.setattr(measure, "make_streets", make)
    with pytest.raises(InterruptedError):
        measure.delivery((64, 64), 100, "cpu")
    assert asked == [100]


def test_budget_on_cuda_searches_by_trying(monkeypatch):
    """Whatever tells of no memory, cuDNN in its words too, means that a minibatch does not fit."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=100))
    limits = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: limits.append(share))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    class Trial:
        device = torch.device("cpu")

        def __init__(self, case):
            self.minibatch = case.minibatch

        def __call__(self):
            if self.minibatch > 11:
                raise RuntimeError("GET was unable to find an engine to execute this computation")

    monkeypatch.setattr(measure, "Step", Trial)
    assert list(fitting(case(device="cuda:0"), 25)) == [{"largest": 11}] and limits == [0.25]
    monkeypatch.setattr(measure, "Step", lambda case: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(fitting(case(device="cuda:0"), 25))


def test_a_budget_that_fails_is_a_row_too(tmp_path, monkeypatch):
    def largest(case, budget):
        if case.variant == "agc":
            raise Failed("RuntimeError: a kernel")
        return 7, "tried"

    monkeypatch.setattr(agcseg.cli.bench, "largest_minibatch", largest)
    arguments = ["--budget", "12GiB", "--variants", "bn,agc", "--precision", "both", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    text = (tmp_path / "budget.md").read_text()
    assert "| segnet | bn | bf16 | 7 | tried |  |" in text and text.count("RuntimeError: a kernel") == 2
    assert "at most 12 GiB for torch" in text


def test_budget_on_the_cpu_follows_from_peaks(monkeypatch):
    """Weights 1 MiB; gradients and momentum 2 MiB, and 5 MiB for an image, 7 from the fifth on."""
    tried = []

    def first(case):
        tried.append(n := case.minibatch)
        return {"peak_mib": 2.0 + 5 * n + 2 * max(0, n - 4), "parameters": 2**18}

    monkeypatch.setattr(tables, "_first", first)
    assert [largest_minibatch(case(), mib * 2**20)[0] for mib in (2, 7, 8, 13, 33, 36, 37)] == [0, 0, 1, 2, 5, 5, 6]
    tried.clear()
    largest, how = largest_minibatch(case(), 695 * 2**20)
    assert largest == 100 and 100 in tried and max(tried) < 110 and how.startswith("from the peaks at minibatch 1, 3, ")
    monkeypatch.setattr(tables, "_first", lambda case: {"peak_mib": 9.0, "parameters": 2**18})
    with pytest.raises(Failed, match="does not grow from minibatch 1 to 3"):
        largest_minibatch(case(), 2**30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "bm"], "bm is not known; choose from agc, agc-compiled,"),
        (["--size", "100x100"], "must be multiples of 32"),
        (["--variants", "bn,bn-folded"], "--variants bn-folded: cannot be trained; measure them with --inference"),
        (["--variants", "agc-gems-compiled"], "agc-gems-compiled is not known"),
        (["--variants", "bn,agc-gems", "--inference"], "--variants agc-gems: act in training alone"),
        (["--inference", "--data"], "leave --budget, --data and --frontier out"),
        (["--size", "256"], "--size: 256: give height x width, such as 256x512"),
        (["--size", "0x64"], "--size: 0x64: give height x width"),
        (["--width", "-1"], "--width -1: must be positive"),
        (["--frontier", "--data"], "--budget, --frontier and --data: only one of them at a time"),
        (["--budget", "12"], "give a number with GiB"),
        (["--budget", "x1GiB"], "give a number with GiB"),
        (["--budget", "0GiB", "--minibatch", "2"], "--budget finds the minibatch"),
        (["--threads", "-1"], "--threads: -1: must be a number, at least 1"),
        (["--rounds", "0"], "--rounds: 0: must be a number, at least 1"),
        (["--device", "cuda:9"], "device=cuda:9: cannot be used here"),
    ],
)
def test_mistakes(arguments, message, capsys):
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_less_memory_costs_arithmetic(monkeypatch):
    monkeypatch.setattr(measure, "BUDGETS", (1, 0.3))
    (plain,) = frontier(case())
    kept, cut = frontier(case("bn-compiled"))
    assert kept["gflop"] == plain["gflop"] < cut["gflop"] and cut["kept_mib"] < 0.7 * kept["kept_mib"]
    step = Step(case("agc"))
    stem = 2 * 32 * 64 * step.network.encoder[0][0].conv.weight.numel() / 1e9  # is computed again in backward
    unit, _ = frontier(case("agc-compiled"))  # counted by the operations' formulas
    assert unit["gflop"] - plain["gflop"] == pytest.approx(stem) and unit["kept_mib"] < 0.5 * plain["kept_mib"]


def test_a_frontier_without_batch_normalisation_has_no_ratios(tmp_path, monkeypatch, capsys):
    def answers(what, case):
        if case.variant == "bn":
            raise Failed("out of memory")
        yield {"budget": None, "kept_mib": 1.0, "gflop": 2.0}

    monkeypatch.setattr(tables, "_in_a_process", answers)
    assert main(["--frontier", "--variants", "none", "--device", "cpu", "--out", str(tmp_path)]) == 1
    rows = list(csv.DictReader((tmp_path / "frontier.csv").open()))
    assert {row["failed"] for row in rows} == {"out of memory", ""} and "kept_to_bn" not in rows[0]
    said = capsys.readouterr().out
    assert "wrote frontier.csv and frontier.md into" in said and not (tmp_path / "frontier.png").exists()


def test_a_case_that_fails_late_leaves_no_picture(tmp_path):
    row = {"network": "segnet", "variant": "bn", "minibatch": 1, "precision": "fp32", "step_ms": 3.0, "failed": "dead"}
    assert write_results(tmp_path, [row], "here") == "bench.csv and bench.md"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.csv", "bench.md"]


def test_frontier_of_the_program(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_in_a_process", lambda what, case: frontier(case))
    arguments = ["--frontier", "--variants", "agc", "--width", "0.05", "--size", "32x64", "--out", str(tmp_path)]
    assert main(arguments) == 0
    lines = (tmp_path / "frontier.csv").read_text().splitlines()
    assert len(lines) == 2 + len(SHARES) and lines[1].startswith("segnet,bn,1,fp32,,") and ",1.0,0.0" in lines[1]
    with Image.open(tmp_path / "frontier.png") as picture:
        assert picture.width > 400
