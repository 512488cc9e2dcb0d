"""Verdicts on the paper's claims, from made-up runs of which the answer is known."""

import math
from itertools import cycle

import numpy as np
import pandas as pd
import pytest
from fake_figure1 import PAPER, make_figure1

from agcseg.errors import UserError
from agcseg.figure1 import RUNS, Setting
from agcseg.report import cells, read_folders, read_runs, t_interval, verdicts
from agcseg.report.claims import Part, Verdict, decide, levels, spike_rate, spike_size, spikes, spikes_per_epoch
from agcseg.report.compare import Estimate, bootstrap, by_images, common_epoch, is_figure1, paired, reached, relative
from agcseg.report.figures import figure1, forest

YES, NO, OPEN = "supported", "not supported", "not enough data"
BN, AGC = Setting("segnet", "bn", 4, 0.08), Setting("segnet", "agc", 4, 0.08)
PAIR = (BN, AGC, *RUNS[-2:])
SCALED = tuple(of for of in RUNS[:7] if of.rate == pytest.approx(0.02 * of.minibatch))
RATES = tuple(of for of in RUNS if of.minibatch == 8 and of.norm == "agc")
FAST = tuple(of for of in RUNS if of[2:] == (8, 0.16))
UNEVEN = cycle((60.0, 100.0, 140.0))


def verdict(number, folder, margin=1.0, **options):
    make_figure1(folder / "figure1", **{"noise": 0.01, "epochs": 12, "seeds": (1, 2), **options})
    return verdicts(cells(read_runs(folder / "figure1"))[0], margin)[number - 1]


def is_agc(points):
    return lambda of: points if of.norm == "agc" else 0.0


CASES = [
    (1, YES, PAIR, {}),
    (1, NO, PAIR, {"shift": is_agc(3.0)}),
    (1, NO, PAIR, {"shift": is_agc(-3.0)}),  # better is not equal either
    (1, OPEN, PAIR, {"noise": 3.0}),
    (1, NO, PAIR, {"diverged": lambda of, seed: of == AGC and seed == 2}),
    (2, YES, SCALED, {}),
    (2, NO, SCALED, {"shift": lambda of: 0.0}),  # BN at minibatch 1 is as good
    (2, NO, SCALED, {"shift": lambda of: 3.0 if of.minibatch == 1 else 0.0}),  # AGC at minibatch 1 is worse
    (2, OPEN, SCALED, {"shift": lambda of: 1.0 if of[1:3] == ("bn", 1) else 0.0, "noise": 0.2}),
    (2, YES, SCALED, {"diverged": lambda of, seed: of[1:3] == ("bn", 1)}),  # that is worse, too
    (3, YES, RATES, {}),
    (3, NO, RATES, {"shift": lambda of: 3.0 if of.rate == 0.16 else 0.0}),
    (3, OPEN, RATES, {"noise": 3.0}),
    (3, YES, RATES, {"diverged": lambda of, seed: of.rate == 0.64}),
    (3, NO, RATES, {"diverged": lambda of, seed: of.rate == 0.16}),
    (4, YES, PAIR, {}),
    (4, NO, PAIR, {"loss": lambda of: 0.9 if of.norm == "agc" else 1.0}),
    (4, NO, PAIR, {"loss": lambda of: 2.0 if of.norm == "agc" else 1.0}),  # not "slightly"
    (4, OPEN, PAIR, {"noise": 2.0}),
    (5, YES, PAIR, {}),
    (5, NO, PAIR, {"spikes": lambda of: 3 if of.norm == "bn" else 12}),
    (5, NO, PAIR, {"size": lambda of: 5 if of.norm == "bn" else 12}),
    (5, NO, PAIR, {"spikes": lambda of: 0}),
    (5, YES, PAIR, {"spikes": lambda of: 12 if of.norm == "bn" else 0}),
    (5, OPEN, PAIR, {"old": True}),
    (5, OPEN, PAIR, {"epochs": 9}),  # 450 steps
    (6, YES, PAIR, {}),
    (6, NO, PAIR, {"lambdas": lambda level: 1 - level / 4}),
    (6, NO, PAIR, {"lambdas": lambda level: 3.0}),
    (6, OPEN, PAIR, {"lambdas": lambda level: 1.0, "spread": 0.1}),  # where it started
    (6, OPEN, PAIR, {"lambdas": lambda level: 0.74 * level / 4}),
    (7, YES, FAST, {}),
    (7, NO, FAST, {"speed": lambda of: 100.0}),
    (7, NO, FAST, {"memory": lambda of: 1000.0}),
    (7, OPEN, FAST, {"device": lambda of: f"GPU {of.norm}"}),
    (7, OPEN, FAST, {"epochs": 4}),
    (7, OPEN, FAST, {"speed": lambda of: next(UNEVEN)}),  # a shared machine
    (7, OPEN, FAST, {"old": True}),
]


@pytest.mark.parametrize(("number", "expected", "runs", "options"), CASES)
def test_every_verdict_of_every_claim(tmp_path, number, expected, runs, options):
    answer = verdict(number, tmp_path, runs=runs, **options)
    assert answer.verdict == expected, "\n".join(map(str, answer.parts))


def test_each_claim_can_end_in_each_way():
    assert {(number, expected) for number, expected, *_ in CASES} == {
        (n, v) for n in range(1, 8) for v in (YES, NO, OPEN)
    }


def test_one_seed_decides_no_training_but_says_where_it_leans(tmp_path):
    make_figure1(tmp_path, seeds=(1,), noise=0.02)
    answers = verdicts(cells(read_runs(tmp_path))[0])
    assert [answer.verdict for answer in answers] == [OPEN] * 6 + [YES]
    assert [answer.leaning for answer in answers] == [YES] * 6 + [""]
    assert answers[0].answer == "not enough data (leans to supported)"
    assert "over its 40 validation images only, not over trainings" in answers[0].parts[0].estimate.basis
    worse = verdict(1, tmp_path / "worse", seeds=(1,), runs=PAIR, shift=is_agc(3.0))
    assert (worse.verdict, worse.leaning) == (OPEN, NO)


def test_one_diverged_run_decides(tmp_path):
    answer = verdict(1, tmp_path, seeds=(1,), runs=PAIR, diverged=lambda of, seed: of == AGC)
    assert answer.verdict == NO and "1 of 2 runs diverged" in answer.parts[0].estimate.basis
    assert "+inf" in answer.parts[0].measured


def test_an_infinite_estimate_is_an_arrow_at_the_edge():
    for value, band, edge in ((math.inf, (0, math.inf), 1), (math.inf, (-1, 1), 1), (-math.inf, (-1, 1), 0)):
        part = Part("error", Estimate(value, value, value, "1 seed"), band)
        (arrow,) = [line for line in forest([Verdict(1, "", [part])]).axes[0].lines if line.get_marker() in "<>"]
        assert arrow.get_xdata() == [edge]


def test_each_side_diverged_in_a_seed_of_its_own(tmp_path):
    made = lambda of, seed: (of, seed) in ((AGC, 1), (BN, 2))  # noqa: E731
    (part, *_) = verdict(1, tmp_path, runs=(AGC, BN), diverged=made).parts
    assert part.measured == "no mean (-inf to +inf)" and part.verdict == NO
    forest([Verdict(1, "", [part])])


def test_a_run_that_diverged_in_its_first_epoch_is_an_answer(tmp_path):
    make_figure1(tmp_path, runs=(*PAIR, *FAST), epochs=12, noise=0.02)
    for name in ("metrics.csv", "steps.npy", "layers.csv", "images.csv"):
        for of in (BN, *FAST[:1]):
            (tmp_path / f"{of.name}-seed2" / name).unlink()
            result = (
                '{"state": "diverged", "reason": "the loss became nan in epoch 1", "epochs": 0, "device": "Some GPU"}'
            )
            (tmp_path / f"{of.name}-seed2" / "result.json").write_text(result)
    runs, broken, notes = read_folders(tmp_path)
    assert len(runs) == 18 and not broken and not notes
    answers = verdicts(cells(runs)[0])
    assert [answer.verdict for answer in answers] == [NO, OPEN, OPEN, NO, YES, YES, YES]
    assert "1 of 6 runs diverged" in answers[0].parts[0].estimate.basis
    assert answers[6].parts[0].estimate.basis.startswith("2 seeds, paired")
    figure1(cells(runs)[0])


def test_both_sides_diverged(tmp_path):
    part = verdict(1, tmp_path, runs=PAIR, diverged=lambda of, seed: of.network == "segnet").parts[0]
    assert part.verdict == OPEN and part.measured == "both sides diverged"


def test_missing_runs_are_named(tmp_path):
    answer = verdict(1, tmp_path, runs=(BN, AGC))
    assert answer.verdict == OPEN and answer.parts[0].verdict == YES and not answer.leaning
    assert (
        "needs ClassNet AGC, minibatch 4, rate 0.08 and ClassNet BN, minibatch 4, rate 0.08" in answer.parts[1].measured
    )
    other = verdict(1, tmp_path / "other", runs=(BN,), seeds=(1,))
    assert "needs SegNet AGC" in other.parts[0].measured and "SegNet BN" not in other.parts[0].measured


def test_unfinished_runs_are_compared_where_all_have_been_and_decide_nothing(tmp_path):
    part = verdict(1, tmp_path, runs=PAIR, reached=lambda of, seed: 8 if (of, seed) == (AGC, 2) else 99).parts[0]
    assert (part.verdict, part.leaning) == (OPEN, YES)
    assert part.answer.endswith(": the runs are unfinished") and part.estimate.basis.endswith("at epoch 8 of 12")
    make_figure1(tmp_path / "new", runs=(BN, AGC), reached=lambda of, seed: 10 if of == BN else 1)
    runs = read_runs(tmp_path / "new")
    assert common_epoch(runs) == 1
    runs[0].metrics = runs[0].metrics[:0]
    assert common_epoch(runs) == 0
    assert "needs an epoch" in verdicts(cells(runs)[0])[0].parts[0].measured


def test_runs_that_learned_nothing_are_not_equal(tmp_path):
    part = verdict(1, tmp_path, runs=PAIR, shift=lambda of: 55.0).parts[0]
    assert (part.verdict, part.leaning) == (OPEN, OPEN) and "commonest class" in part.answer


def test_runs_of_other_settings_are_not_compared(tmp_path):
    make_figure1(tmp_path / "a", runs=PAIR, width=lambda of: 0.5 if of == BN else 0.25)
    kept, notes = cells(read_runs(tmp_path / "a"))
    assert BN not in kept and AGC in kept
    names = ", ".join(f"segnet-bn-mb4-lr0.08-seed{seed}" for seed in (1, 2, 3))
    assert notes == [f"not compared with the others, for width 0.5, not width 0.25: {names}"]
    assert verdicts(kept)[0].verdict == OPEN
    runs = read_runs(tmp_path / "a")
    for run in runs:
        run.words["width"] = "width 1"
    one = next(run for run in runs if run.norm == "agc")
    for key in ("size", "epochs", "data.choice_seed", "agc:λ", "processes"):
        before, one.words[key] = one.words[key], "other"
        (note,) = cells(runs)[1]
        assert note.startswith("not compared with the others, for other, not ") and note.endswith(f": {one.name}")
        one.words[key] = before
    assert not cells(runs)[1]


def test_runs_are_matched_by_settings_with_a_tolerance_on_the_rate(tmp_path):
    make_figure1(tmp_path, runs=(BN, AGC), seeds=(1,), name="mine")
    for path in tmp_path.iterdir():
        path.rename(tmp_path / f"other-{path.name[7:9]}")
    runs = read_runs(tmp_path)
    runs[0].rate *= 1 + 1e-7
    kept, _ = cells(runs)
    assert {*kept} == {BN, AGC} and not is_figure1(runs, kept)
    runs[0].settings["name"] = "figure1-small"
    assert is_figure1(runs, kept)


def test_most_of_the_settings_make_a_figure1(tmp_path):
    make_figure1(tmp_path / "six", seeds=(1,), runs=RUNS[:6], name="mine")
    make_figure1(tmp_path / "seven", seeds=(1,), runs=RUNS[:7], name="mine")
    for folder, expected in (("six", False), ("seven", True)):
        runs = read_runs(tmp_path / folder)
        assert is_figure1(runs, cells(runs)[0]) == expected


def test_twins_are_counted_once(tmp_path):
    make_figure1(tmp_path, runs=(BN,), seeds=(1,))
    (one,), (two,) = read_runs(tmp_path), read_runs(tmp_path)
    two.name, two.state = "again", "unfinished"
    for runs in ([one, two], [two, one]):
        kept, notes = cells(runs)
        assert kept[BN][1] is one and notes == [f"not compared, since {one.name} has the same settings and seed: again"]


def test_other_folders_have_the_verdicts_that_can_be_made(tmp_path):
    wide = Setting("segnet", "bn", 2, 0.04), Setting("segnet", "agc", 2, 0.04)
    make_figure1(tmp_path, runs=wide, noise=0.02, name="mine")
    kept, _ = cells(read_runs(tmp_path))
    answers = verdicts(kept, figure1=False)
    assert [(answer.number, answer.verdict) for answer in answers] == [(n, YES) for n in (1, 4, 5, 6, 7)]
    assert "SegNet, minibatch 2, rate 0.04" in answers[0].parts[0].what
    assert verdicts({wide[0]: kept[wide[0]]}, figure1=False) == []


def test_margin(tmp_path):
    assert verdict(1, tmp_path / "a", runs=PAIR, shift=is_agc(0.5)).verdict == YES
    kept, _ = cells(read_runs(tmp_path / "a" / "figure1"))
    assert verdicts(kept, 0.2)[0].verdict == NO
    for margin in (0, -1, math.nan, math.inf):
        with pytest.raises(UserError, match="must be positive"):
            verdicts(kept, margin)


def test_pairs_are_taken_by_seed(tmp_path):
    make_figure1(tmp_path, runs=(BN, AGC), seeds=(1, 2, 3))
    kept, _ = cells(read_runs(tmp_path))
    for seed in (1, 2, 3):  # seeds differ by far more than the two sides do
        kept[BN][seed].metrics.loc[20, "pixel_error"] = 0.1 * seed
        kept[AGC][seed].metrics.loc[20, "pixel_error"] = 0.1 * seed + 0.01 + 0.001 * seed
    estimate = paired(kept[AGC], kept[BN], reached)
    assert estimate.value == pytest.approx(1.2) and estimate.high - estimate.low < 0.6
    assert (estimate.low, estimate.high) == pytest.approx(t_interval([1.1, 1.2, 1.3]))
    assert "same seed" in paired({1: kept[AGC][1]}, {2: kept[BN][2]}, reached).weak


def test_bootstrap_over_images_is_paired_and_agrees_with_theory(tmp_path):
    make_figure1(tmp_path, runs=(BN, AGC), seeds=(1,))
    kept, _ = cells(read_runs(tmp_path))
    ours, theirs = kept[AGC][1], kept[BN][1]
    rng = np.random.default_rng(1)
    hard, extra = rng.uniform(0, 0.5, 400), 0.01 + 0.02 * rng.standard_normal(400)
    theirs.images = pd.DataFrame({"wrong": hard, "loss": 1.0})
    ours.images = pd.DataFrame({"wrong": hard + extra, "loss": 1.1})
    resample = by_images("wrong", scale=100)
    low, high, basis = resample(ours, theirs, 20)
    half = 1.96 * 100 * extra.std() / 20
    assert (low, high) == pytest.approx((100 * extra.mean() - half, 100 * extra.mean() + half), abs=0.03)
    assert "400 validation images" in basis and resample(ours, theirs, 20)[0] == low  # the same every time
    assert by_images("loss", relative)(ours, theirs, 20)[:2] == pytest.approx((0.1, 0.1))
    assert resample(ours, theirs, 19) is None  # the images are of epoch 20
    ours.images = ours.images.drop(index=7)
    assert resample(ours, theirs, 20) is None


def test_spikes_of_a_known_loss():
    losses = np.ones(500)
    losses[200] = 3.0  # not above 3 times the median
    losses[300:303] = 4.0, 9.0, 5.0
    losses[304] = 3.5
    losses[5] = 100.0  # nothing before it to compare with
    begins, sizes = spikes(losses)
    assert begins.tolist() == [300, 304] and sizes.tolist() == [9.0, 3.5]
    assert len(spikes(np.ones(20))[0]) == 0 and len(spikes(np.r_[np.ones(20), 4.0])[0]) == 1
    rise = np.r_[np.ones(250), 10 * np.ones(250)]  # a new level is one spike, of as long as the median takes
    assert [part.tolist() for part in spikes(rise)] == [[250], [10.0]]


def test_spikes_are_those_counted_step_by_step():
    losses = np.random.default_rng(0).lognormal(0, 0.8, 10_500)
    begins, sizes = spikes(losses)
    ratio = np.array([0.0] * 20 + [losses[i] / np.median(losses[max(0, i - 100) : i]) for i in range(20, len(losses))])
    above = ratio > 3
    assert begins.tolist() == [i for i in range(len(losses)) if above[i] and not above[i - 1]]
    assert sizes.max() == pytest.approx(ratio.max())


def test_spikes_of_a_run(tmp_path):
    make_figure1(tmp_path, runs=(BN, RUNS[-2]), seeds=(1,), diverged=lambda of, seed: of.network == "classnet")
    kept, _ = cells(read_runs(tmp_path))
    run, ended = kept[BN][1], kept[RUNS[-2]][1]
    assert run.steps.shape == (20, 50) and spike_rate(run, 20) == 12.0 and spikes_per_epoch(run, 20).sum() == 12
    assert spike_size(run, 20) == pytest.approx(math.log2(12), abs=0.2)
    assert spike_rate(ended, 10) == pytest.approx(1000 * 13 / 500) and spike_size(ended, 10) == math.inf
    assert ended.steps.shape == (10, 50)  # both parts of ClassNet's loss, summed


def test_levels_of_both_networks(tmp_path):
    make_figure1(tmp_path, runs=PAIR, seeds=(1,))
    for run in read_runs(tmp_path):
        if run.norm == "agc":
            assert levels(run).tolist() == [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
        else:
            assert run.layers is None


@pytest.mark.parametrize(
    ("column", "against"),
    [
        ("training_memory_mib", ["peak memory that training adds, AGC ÷ BN"]),
        ("kept_for_backward_mib", ["memory kept for backward, AGC ÷ BN"]),
        ("peak_memory_mib", []),  # of the whole process: decides nothing
    ],
)
def test_each_kind_of_memory_must_be_less(tmp_path, column, against):
    make_figure1(tmp_path, runs=FAST, seeds=(1, 2), epochs=12)
    runs = read_runs(tmp_path)
    for run in runs:
        run.metrics[column] = 1000.0
    answer = verdicts(cells(runs)[0])[6]
    assert [part.what.rpartition(": ")[2] for part in answer.parts if part.verdict == NO] == against
    assert len(answer.parts) == 3 and answer.verdict == (NO if against else YES)


@pytest.mark.parametrize(
    ("runs", "change", "says"),
    [
        ("segnet-agc-*", ("minibatch:", "graph: true\nminibatch:"), "the runs differ in graph: False, True"),
        (
            "segnet-agc-*-seed2",
            ("{name: segnet,", "{options: {recompute: 0.0}, name: segnet,"),
            "the runs differ in network.options.recompute of segnet: 0.0, 0.001",
        ),
        ("segnet-bn-*", ("{name: segnet,", "{options: {recompute: 0.0}, name: segnet,"), None),  # only AGC does so
        ("segnet-agc-*", ("{name: segnet,", "{options: {recompute: 0.0}, name: segnet,"), None),
    ],
)
def test_time_and_memory_of_other_ways_to_compute_are_not_compared(tmp_path, runs, change, says):
    make_figure1(tmp_path / "figure1", runs=FAST, seeds=(1, 2), epochs=12)
    for path in tmp_path.glob(f"figure1/{runs}/config.yaml"):
        path.write_text(path.read_text().replace(*change))
    parts = verdicts(cells(read_runs(tmp_path / "figure1"))[0])[6].parts
    assert [part.known for part in parts] == [says is None] * len(parts)
    assert says is None or {part.measured for part in parts} == {says}


def test_depth_is_judged_of_networks_whose_names_tell_it(tmp_path):
    """In fcn_resnet50's "backbone.layer3.5" the number is that of a block."""
    make_figure1(tmp_path, runs=(AGC, AGC._replace(network="fcn_resnet50")), seeds=(1, 2), noise=0.01)
    (answer,) = (one for one in verdicts(cells(read_runs(tmp_path))[0], figure1=False) if one.number == 6)
    ours, theirs = ([part for part in answer.parts if part.what.startswith(of)] for of in ("SegNet", "fcn_resnet50"))
    assert [part.verdict for part in ours] == [YES] * 4
    assert [part.verdict for part in theirs] == [YES] + [OPEN] * 3 and theirs[0].known and answer.verdict == OPEN
    for part in theirs[1:]:
        assert part.answer == OPEN and part.measured.startswith("needs SegNet or ClassNet: ")


@pytest.mark.parametrize(
    ("interval", "band", "expected"),
    [
        ((-0.5, 0.5), (-1, 1), YES), ((-0.5, 1.5), (-1, 1), OPEN), ((1.1, 1.5), (-1, 1), NO), ((-3, -1), (-1, 1), NO),
        ((-2, 2), (-1, 1), OPEN), ((0, 0), (0, math.inf), NO), ((math.inf, math.inf), (0, math.inf), YES),
        ((math.inf, math.inf), (-1, 1), NO), ((0.5, math.inf), (-1, 1), NO), ((-math.inf, -math.inf), (0, 9), NO),
        ((0.5, 0.6), (-math.inf, 0.9), YES), ((0.95, 1.1), (-math.inf, 0.9), NO),
    ],
)  # fmt: skip
def test_decide(interval, band, expected):
    assert decide(interval, band) == expected


def test_interval_of_t():
    for n, expected in ((2, 12.706), (3, 4.303), (5, 2.776), (31, 2.042)):
        values = np.arange(n, dtype=float)
        half = expected * values.std(ddof=1) / math.sqrt(n)
        assert t_interval(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=1e-3)
    assert t_interval([3.0, 3.0]) == (3.0, 3.0)


def test_intervals_cover():
    """About 95 % of intervals from known distributions hold the true mean."""
    rng = np.random.default_rng(3)
    inside = [low < 0 < high for low, high in (t_interval(rng.standard_normal(4)) for _ in range(2000))]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)
    samples = rng.exponential(size=(150, 200))
    inside = [low < 1 < high for low, high in (bootstrap(lambda drawn: drawn.mean(-1), sample) for sample in samples)]
    assert 0.88 < np.mean(inside) <= 1


def test_the_paper_has_its_claims(tmp_path):
    """All of them, in a folder that comes out as the paper says."""
    make_figure1(tmp_path / "figure1", noise=0.02)
    assert PAPER[("bn", 1, 0.02)] == 2.5
    answers = verdicts(cells(read_runs(tmp_path / "figure1"))[0])
    assert [(answer.number, answer.verdict) for answer in answers] == [(n, YES) for n in range(1, 8)]
