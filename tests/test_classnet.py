"""ClassNet's shape and counts, its paths, and a run of it."""

import csv
import functools
import math

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import agcseg
from agcseg import ConvUnit
from agcseg.bench.measure import kept_for_backward
from agcseg.bench.step import Case, Step
from agcseg.config import ContourConfig, NetworkConfig
from agcseg.losses import image_losses
from agcseg.nn import INITS, NORMS
from agcseg.training.run import run


def small(norm="agc", **options):
    return agcseg.build("classnet", **{"norm": norm, "num_classes": 5, "width": 0.05, "init": "he_centered", **options})


def on_meta(**options):
    with torch.device("meta"):
        return agcseg.build("classnet", **options)


@pytest.mark.parametrize(
    ("options", "parameters", "convolutions"),
    [
        ({"norm": "bn"}, 7_507_519, 56),
        ({"norm": "agc"}, 7_514_173, 56),
        ({"norm": "agc", "final_projection": "separate"}, 8_229_436, 71),
    ],
)
def test_counts(options, parameters, convolutions):
    network = on_meta(num_classes=19, **options)
    assert sum(p.numel() for p in network.parameters()) == parameters
    found = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert len(found) == convolutions
    biased = [name for name, module in network.named_modules() if getattr(module, "bias", None) is not None]
    assert [name for name in biased if "norm" not in name] == ["head.classes", "head.contour"]


@pytest.mark.parametrize(("projection", "gmac"), [("shared", 13.38), ("separate", 14.84)])
def test_work(projection, gmac):
    with FlopCounterMode(display=False) as counter:
        on_meta(norm="bn", final_projection=projection)(torch.empty(1, 3, 256, 512, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, abs=0.01)


@pytest.mark.parametrize(("projection", "lengths"), [("shared", (5, 48)), ("separate", (5, 63))])
def test_paths(projection, lengths):
    """The fewest and the most convolutions between image and class logits, in autograd's graph."""
    images = torch.zeros(1, 3, 128, 128, requires_grad=True)
    logits = small(implementation="literal", final_projection=projection)(images).classes

    @functools.cache
    def paths(node) -> tuple[float, float]:
        if getattr(node, "variable", None) is images:
            return 0, 0
        below = [paths(following) for following, _ in node.next_functions if following is not None]
        own = node.name() == "ConvolutionBackward0"
        return own + min((p[0] for p in below), default=math.inf), own + max((p[1] for p in below), default=-math.inf)

    assert paths(logits.grad_fn) == lengths


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("init", INITS)
def test_every_norm_and_init_builds_and_trains_a_step(norm, init):
    network = small(norm, init=init)
    # torch's instance normalisation refuses the single pixel of the deepest map at 128x128
    size = (128, 256) if norm == "instance" else (128, 128)
    outputs = network(torch.randn(2, 3, *size))
    assert outputs.classes.shape == (2, 5, *size) and outputs.contour.shape == (2, 1, *size) and outputs.deep == ()
    (outputs.classes.square().mean() + outputs.contour.square().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)


def test_minibatch_is_its_samples_one_by_one():
    network = small().double()
    images = torch.randn(3, 3, 128, 256, dtype=torch.float64)
    labels = torch.randint(0, 5, (3, 128, 256), dtype=torch.uint8)
    contours = torch.randint(0, 2, (3, 128, 256), dtype=torch.uint8)
    figures = []
    for minibatch in (3, 1):
        network.zero_grad()
        costs = []
        for image, label, contour in zip(*(t.split(minibatch) for t in (images, labels, contours)), strict=True):
            costs.append(sum(image_losses(network(image), label, None, contour)))
            costs[-1].sum().backward()
        figures.append([torch.cat(costs), *(p.grad for p in network.parameters())])
    for whole, single in zip(*figures, strict=True):
        torch.testing.assert_close(single, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("projection", ["shared", "separate"])
def test_fast_is_literal(projection):
    figures, images = [], torch.randn(2, 3, 128, 256, dtype=torch.float64)
    for implementation in ("fast", "literal"):
        torch.manual_seed(1)
        network = small(implementation=implementation, final_projection=projection).double()
        outputs = network(images)
        (outputs.classes.square().mean() + outputs.contour.square().mean()).backward()
        figures.append([outputs.classes, outputs.contour, *(p.grad for p in network.parameters())])
    for fast, literal in zip(*figures, strict=True):
        torch.testing.assert_close(fast, literal, rtol=1e-7, atol=1e-11)


def test_no_concatenation_is_kept(form):
    kept = {
        variant: kept_for_backward(Step(Case("classnet", variant, 1, "fp32", (128, 256), 0.25)))
        for variant in ("agc", "agc-literal", "bn")
    }
    assert kept["agc"] < 0.45 * kept["agc-literal"] and kept["agc"] < 0.45 * kept["bn"]


def test_identity_init():
    network = small(init="identity", norm_options={"mean_scale": 0.0})
    units = [module for module in network.modules() if isinstance(module, ConvUnit) and module.identity]
    assert len(units) == 8 * 3 + 7
    for block in (network.encoder[0], network.encoder[3], network.decoder[2]):
        maps = torch.rand(1, block.units[0].conv.in_channels, 8, 8)
        assert torch.equal(block(maps), block.units[0](maps))  # λ=0: a block is its first convolution


def test_deep_supervision_is_for_training():
    network, images = small(deep_supervision=True), torch.randn(1, 3, 128, 256)
    outputs = network(images)
    sizes = [(128 // 2**i, 256 // 2**i) for i in range(8)]
    assert [tuple(o.classes.shape[2:]) for o in (outputs, *outputs.deep)] == sizes
    assert all(o.contour.shape == (1, 1, *size) for o, size in zip(outputs.deep, sizes[1:], strict=True))
    labels = torch.randint(0, 5, (1, 128, 256), dtype=torch.uint8)
    labels[:, :50] = 255
    sum(image_losses(outputs, labels, None, torch.zeros_like(labels))).sum().backward()
    with torch.no_grad():
        assert network.eval()(images).deep == ()
    assert not small().deep_heads


def test_contour_width_and_size():
    network = small(contour_width=6)
    assert network.decoder[0].final.conv.out_channels == network.lateral[7].conv.out_channels == 11
    with pytest.raises(ValueError, match=r"multiples of 128; got \(128, 192\)"):
        network(torch.zeros(1, 3, 128, 192))
    with pytest.raises(ValueError, match="final_projection='no' is not known; choose from shared, separate"):
        small(final_projection="no")
    with pytest.raises(ValueError, match="contour_width=-1"):
        small(contour_width=-1)


def test_a_run(tiny, tmp_path):
    def config(**values):
        made = tiny(network=NetworkConfig("classnet", width=0.05, init="he_centered"), minibatch=2, **values)
        made.data.size, made.data.train_images = [128, 128], 4
        return made

    result = run(config(epochs=2), tmp_path / "run")
    with open(tmp_path / "run/metrics.csv") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    for row in rows:
        for what in ("train", "val"):
            parts = row[f"{what}_class_loss"] + row[f"{what}_contour_loss"]
            assert row[f"{what}_loss"] == pytest.approx(parts) and 0 < row[f"{what}_contour_loss"] < 1
        assert 0 < row["contour_iou"] < 1 and 0 <= row["contour_f"] <= 1
    assert result["val_contour_loss"] == pytest.approx(1 - result["contour_iou"])  # every image here has a contour
    with Image.open(tmp_path / "run/predictions.png") as picture:
        assert picture.size == (5 * 130, 4 * 130)
    from agcseg.record.tables import layer_rows

    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)["network"]
    network = agcseg.build("classnet", width=0.05)
    network.load_state_dict(saved)
    layers = [row["layer"] for row in layer_rows(network, 2, {})]
    assert len(layers) == 54 and (layers[0], layers[-1]) == ("encoder.0.units.0", "decoder.0.final")
    assert layers.index("encoder.7.final") < layers.index("lateral.0") < layers.index("decoder.6.final")
    assert {row["role"] for row in layer_rows(network, 2, {})} == {"encoder", "lateral", "decoder"}

    run(config(epochs=1), tmp_path / "continued")
    run(config(epochs=2), tmp_path / "continued")
    continued = torch.load(tmp_path / "continued/last.pt", weights_only=True)["network"]
    assert all(torch.equal(saved[key], continued[key]) for key in saved)
    for loss in ("bce", "class_iou"):
        made = config(epochs=1, contour=ContourConfig(loss, 1), accumulate=2, data=config().data)
        made.data.size, made.network.options = [128, 128], {"deep_supervision": True}
        result = run(made, tmp_path / loss)
        assert result["state"] == "finished" and math.isfinite(result["train_contour_loss"])
