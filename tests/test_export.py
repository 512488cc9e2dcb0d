"""Inference form against the literal formula, and exported files against the networks they come from."""

import json
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import agcseg
from agcseg.cli import export as program
from agcseg.config import Config, DataConfig, NetworkConfig, NormConfig
from agcseg.data import LAYOUTS
from agcseg.data.minibatches import normalise
from agcseg.errors import UserError
from agcseg.export import differences, export, loaded
from agcseg.networks import classnet, segnet
from agcseg.nn.inference import AGCConv2d, inference_form, mean_of_conv
from agcseg.trained import Trained


def network(name="segnet", norm="agc", **options):
    """A small network whose norms have parameters and statistics of both signs, as after a long training."""
    torch.manual_seed(0)
    made = agcseg.build(name, norm=norm, num_classes=19, width=0.05, init="he_centered", **options).eval()
    with torch.no_grad():
        for key, value in made.state_dict().items():
            if ".norm." in key and value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5 if "var" in key else torch.randn_like(value) * 0.6 + 0.5)
    return made


def trained(name="segnet", size=(32, 64), norm="agc", **options):
    """The same with fewer stages, for the exporters' time grows with the number of layers; nothing else changes."""
    config = Config(
        network=NetworkConfig(name, width=0.05),
        norm=NormConfig(norm, options),
        data=DataConfig("streets", None, "cache", list(size), None, None),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segnet, "STAGES", segnet.STAGES[:2])
        patch.setattr(classnet, "WIDTHS", classnet.WIDTHS[:3])
        made = network(name, norm, norm_options=options)
    return Trained(made, LAYOUTS["streets"].classes, config, 3, None)


def outputs(made, images):
    with torch.no_grad():
        found = made(images)
    return found[:2] if made.contour else (found,)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 1), (6, 7)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_mean_of_a_convolution_without_the_convolution(size, kernel):
    maps, filters = torch.randn(2, 3, *size).double(), torch.randn(4, 3, kernel, kernel).double()
    expected = F.conv2d(maps, filters, padding=kernel // 2).mean((2, 3))
    torch.testing.assert_close(mean_of_conv(maps, filters), expected, rtol=0, atol=1e-13)
    assert mean_of_conv(maps.half(), filters.half()).dtype == torch.float32


@pytest.mark.parametrize(("name", "size"), [("segnet", (32, 96)), ("classnet", (128, 128))])
@pytest.mark.parametrize("norm", ["agc", "bn"])
def test_inference_form_is_the_network(name, size, norm):
    """AGC as the paper writes it, unpooling and concatenation included; one image, and several."""
    literal = network(name, norm, implementation="literal").double()
    if norm == "agc":
        scales = torch.cat([value for key, value in literal.state_dict().items() if "mean_scale" in key])
        gains = torch.cat([value for key, value in literal.state_dict().items() if key.endswith("norm.weight")])
        assert scales.std() > 0.3 and (scales < 0).any() and (gains < 0).any()
    made = network(name, norm).double().train()
    before = {key: value.clone() for key, value in made.state_dict().items()}
    folded = inference_form(made)
    kinds = {type(module) for module in folded.modules()}
    assert not kinds & {agcseg.AGC2d, nn.BatchNorm2d} and (AGCConv2d in kinds) == (norm == "agc")
    for n in (1, 2):
        images = torch.randn(n, 3, *size).double()
        for expected, got in zip(outputs(literal, images), outputs(folded, images), strict=True):
            assert expected.std() > 0
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    assert made.training and all(torch.equal(before[key], value) for key, value in made.state_dict().items())


@pytest.mark.parametrize("options", [{"norm": "frn"}, {"norm": "agc", "norm_options": {"background": "median"}}])
def test_other_norms_stay(options):
    made = network(**options)
    images = torch.randn(2, 3, 32, 64)
    assert torch.equal(outputs(made, images)[0], outputs(inference_form(made), images)[0])


class Activated(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: a subclass with a forward of its own."""

    def forward(self, input):
        return F.silu(super().forward(input))


PARTS = {
    "subclass": lambda unit: setattr(unit, "norm", Activated(4)),
    "hook of the convolution": lambda unit: unit.conv.register_forward_hook(lambda module, inputs, maps: 2 * maps),
    "hook of the norm": lambda unit: unit.norm.register_forward_hook(lambda module, inputs, maps: maps - 1),
    "bias": lambda unit: setattr(unit, "conv", nn.Conv2d(3, 4, 3, padding=1)),
    "padding mode": lambda unit: setattr(unit, "conv", nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")),
    "stride": lambda unit: setattr(unit.conv, "stride", (2, 2)),
}


@pytest.mark.parametrize("change", PARTS)
@pytest.mark.parametrize("norm", [agcseg.AGC2d, nn.BatchNorm2d])
def test_inference_form_obeys_parts_and_hooks(norm, change):
    unit = agcseg.ConvUnit(3, 4, norm=norm, implementation="literal")
    PARTS[change](unit)
    nn.init.normal_(unit.norm.bias)
    unit.eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(inference_form(unit)(x), unit(x), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_inference_form_traced_with_one_image_serves_several():
    unit = agcseg.ConvUnit(3, 4)
    nn.init.normal_(unit.norm.mean_scale)
    folded, x = inference_form(unit), 1 + torch.randn(3, 3, 8, 8)
    program = torch.export.export(folded, (x[:1],), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    traced = torch.jit.trace(folded, x[:1])
    torch.testing.assert_close(traced(x), unit(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(program(x[:1]), unit(x[:1]), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def torch_program():
    """SegNet: one side of a single multiple of 32, which stays fixed, the other free."""
    return export(trained(), "torch")


def test_torch_program(torch_program, tmp_path):
    one = trained()
    (tmp_path / "network.pt2").write_bytes(torch_program)
    extra = {"metadata.json": ""}
    run = torch.export.load(tmp_path / "network.pt2", extra_files=extra).module()
    about = json.loads(extra["metadata.json"])
    assert about["classes"][0] == "road" and about["colors"][0] == [128, 64, 128]
    assert about["training_size"] == [32, 64] and about["norm"] == "agc" and about["epoch"] == 3
    for n, width in ((1, 64), (4, 160)):
        images = torch.randint(0, 256, (n, 3, 32, width), dtype=torch.uint8)
        expected, (logits,) = outputs(one.network, normalise(images))[0], run(images)
        assert logits.shape == (n, 19, 32, width) and logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["segnet", "classnet"])
def test_onnx(name):
    """At the training size and others, down to one multiple, run by ONNX Runtime."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    k = 32 if name == "segnet" else 128
    one = trained(name, (k, 2 * k))
    content = export(one, "onnx")
    found = differences(one, content, "onnx")
    assert [shape for shape, _, _ in found] == [(1, 3, k, 2 * k), (3, 3, k, 2 * k), (2, 3, 2 * k, 3 * k)]
    assert all(beyond < 0.01 for _, _, beyond in found)
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model)
    about = {prop.key: prop.value for prop in model.metadata_props}
    assert json.loads(about["classes"]) == list(LAYOUTS["streets"].classes.names)
    assert json.loads(about["training_size"]) == [k, 2 * k]
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes["images"] == ["batch", 3, "height", "width"]
    assert shapes["class_logits"] == ["batch", 19, "height", "width"]
    assert shapes.get("contour_logits") == (["batch", 1, "height", "width"] if name == "classnet" else None)
    classes, *contour = loaded(content, "onnx")(torch.randint(0, 256, (5, 3, k, k), dtype=torch.uint8))
    assert classes.shape == (5, 19, k, k) and len(contour) == (name == "classnet")


def test_program(torch_program, tmp_path, monkeypatch, capsys):
    one = trained()._replace(path=tmp_path / "last.pt")
    monkeypatch.setattr(program.agcseg, "load", lambda run, checkpoint: one)
    monkeypatch.setattr(program, "export", lambda trained, format: torch_program)
    assert program.main(["RUN", "format=torch"]) == 0
    assert (tmp_path / "network.pt2").read_bytes() == torch_program
    assert "1x3x32x64: differs by at most" in capsys.readouterr().out
    monkeypatch.setattr(program.agcseg, "load", lambda run, checkpoint: one._replace(path=tmp_path / "best.pt"))
    assert program.main(["RUN", "format=torch", "checkpoint=best"]) == 0 and (tmp_path / "network-best.pt2").is_file()
    monkeypatch.setattr(program.agcseg, "load", lambda run, checkpoint: one)
    with torch.no_grad():
        one.network.head.bias[0] += 1  # no longer what was exported
    target = tmp_path / "new/other.pt2"
    assert program.main(["RUN", "format=torch", f"output={target}"]) == 1
    told = capsys.readouterr()
    assert "by more than 0.0001 in 100.00% of the pixels" in told.out and "not written" in told.err
    assert not target.parent.exists()
    monkeypatch.setattr(program, "export", lambda trained, format: pytest.fail("exported before it asked"))
    with pytest.raises(SystemExit):
        program.main(["RUN", "format=torch", f"output={tmp_path / 'network.pt2' / 'other.pt2'}"])
    assert "network.pt2 cannot be written; give another file" in capsys.readouterr().err


@pytest.mark.parametrize(("wrong", "left"), [({1}, 0), ({1, 2}, 1)])
def test_one_tie_in_the_deepest_maps_is_no_difference(monkeypatch, wrong, left):
    one, calls = trained(), []

    def run(images):
        calls.append(images)
        return (outputs(one.network, normalise(images))[0] + (len(calls) in wrong),)

    monkeypatch.setattr("agcseg.export.loaded", lambda content, format: run)
    assert [beyond for _, _, beyond in differences(one, b"", "torch")] == [left, 0, 0]
    assert len(calls) == 4 and not torch.equal(calls[0], calls[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["format=tflite"], "format=tflite: choose from onnx, torch"),
        (["format=torch", "output=a.onnx"], "output=a.onnx: a file of format=torch ends in .pt2"),
        (["formt=torch"], "did you mean format?"),
    ],
)
def test_mistakes(arguments, message, tmp_path, monkeypatch, capsys):
    one = trained()._replace(path=tmp_path / "last.pt")
    monkeypatch.setattr(program.agcseg, "load", lambda run, checkpoint: one)
    with pytest.raises(SystemExit) as ended:
        program.main(["RUN", *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_window_that_follows_the_image_is_refused():
    with pytest.raises(UserError, match="norm.options.window=0.5: a window that is a share of the map cannot be"):
        export(trained(background="window"), "torch")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_extra_is_named(missing, monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):  # None: an import fails as if it were not there
        monkeypatch.setitem(sys.modules, name, None if name == missing else types)
    with pytest.raises(
        UserError, match=rf"format=onnx needs the extra onnx \(.*\b{missing}\b.*pip install '.\[onnx\]'"
    ):
        export(trained(), "onnx")
