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
    config = Config(
        network=NetworkConfig(name, width=0.05),
        norm=NormConfig(norm, options),
        data=DataConfig("streets", None, "cache", list(size), None, None),
    )
    return Trained(network(name, norm, norm_options=options), LAYOUTS["streets"].classes, config, 3, None)


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


@pytest.mark.parametrize(("name", "size"), [("segnet", (32, 96)), ("classnet", (128, 256)), ("classnet", (128, 128))])
@pytest.mark.parametrize("norm", ["agc", "bn"])
def test_inference_form_is_the_network(name, size, norm):
    """AGC as the paper writes it, unpooling and concatenation included; one image, and several."""
    literal = network(name, norm, implementation="literal").double()
    if norm == "agc":
        scales = torch.cat([value for key, value in literal.state_dict().items() if "mean_scale" in key])
        gains = torch.cat([value for key, value in literal.state_dict().items() if key.endswith("norm.weight")])
        assert scales.std() > 0.3 and (scales < 0).any() and (gains < 0).any()
    before = {key: value.clone() for key, value in literal.state_dict().items()}
    for made in (literal, network(name, norm).double().train()):
        folded = inference_form(made)
        kinds = {type(module) for module in folded.modules()}
        assert not kinds & {agcseg.AGC2d, nn.BatchNorm2d} and (AGCConv2d in kinds) == (norm == "agc")
        for n in (1, 3):
            images = torch.randn(n, 3, *size).double()
            for expected, got in zip(outputs(literal, images), outputs(folded, images), strict=True):
                assert expected.std() > 0
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    assert all(torch.equal(before[key], value) for key, value in literal.state_dict().items())


@pytest.mark.parametrize("options", [{"norm": "frn"}, {"norm": "agc", "norm_options": {"background": "median"}}])
def test_other_norms_stay(options):
    made = network(**options)
    images = torch.randn(2, 3, 32, 64)
    assert torch.equal(outputs(made, images)[0], outputs(inference_form(made), images)[0])


@pytest.fixture(scope="module")
def torch_program():
    """ClassNet: one side of a single multiple of 128, which stays fixed, the other free."""
    return export(trained("classnet", (128, 256)), "torch")


def test_torch_program(torch_program, tmp_path):
    one = trained("classnet", (128, 256))
    for shape, largest, beyond in differences(one, torch_program, "torch"):
        assert shape[2] == 128 and largest < 1e-4 and beyond == 0
    (tmp_path / "network.pt2").write_bytes(torch_program)
    extra = {"metadata.json": ""}
    run = torch.export.load(tmp_path / "network.pt2", extra_files=extra).module()
    about = json.loads(extra["metadata.json"])
    assert about["classes"][0] == "road" and about["colors"][0] == [128, 64, 128]
    assert about["training_size"] == [128, 256] and about["norm"] == "agc" and about["epoch"] == 3
    images = torch.randint(0, 256, (4, 3, 128, 384), dtype=torch.uint8)
    classes, contour = run(images)
    assert classes.shape == (4, 19, 128, 384) and contour.shape == (4, 1, 128, 384) and classes.dtype == torch.float32
    expected = outputs(one.network, normalise(images))[0]
    torch.testing.assert_close(classes, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_onnx():
    """SegNet at sizes down to one multiple of 32, run by ONNX Runtime."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    one = trained()
    content = export(one, "onnx")
    found = differences(one, content, "onnx")
    assert [shape for shape, _, _ in found] == [(1, 3, 32, 64), (3, 3, 32, 64), (2, 3, 64, 96)]
    assert all(beyond < 0.01 for _, _, beyond in found)
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model)
    about = {one.key: json.loads(one.value) for one in model.metadata_props if one.key in ("classes", "training_size")}
    assert about == {"classes": list(LAYOUTS["streets"].classes.names), "training_size": [32, 64]}
    dims = [dim.dim_param or dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim]
    assert model.graph.output[0].name == "class_logits" and dims == ["batch", 19, "height", "width"]
    classes = loaded(content, "onnx")(torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8))[0]
    assert classes.shape == (5, 19, 32, 32)


def test_program(torch_program, tmp_path, monkeypatch, capsys):
    one = trained("classnet", (128, 256))._replace(path=tmp_path / "last.pt")
    monkeypatch.setattr(program.agcseg, "load", lambda run: one)
    monkeypatch.setattr(program, "export", lambda trained, format: torch_program)
    assert program.main(["RUN", "format=torch"]) == 0
    assert (tmp_path / "network.pt2").read_bytes() == torch_program
    assert "1x3x128x256: differs by at most" in capsys.readouterr().out
    with torch.no_grad():
        one.network.head.classes.bias[0] += 1  # no longer what was exported
    target = tmp_path / "new/other.pt2"
    assert program.main(["RUN", "format=torch", f"output={target}"]) == 1
    told = capsys.readouterr()
    assert "by more than 0.0001 in 100.00% of the pixels" in told.out and "not written" in told.err
    assert not target.parent.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["format=tflite"], "format=tflite: choose from onnx, torch"),
        (["format=torch", "output=a.onnx"], "output=a.onnx: a file of format=torch ends in .pt2"),
        (["formt=torch"], "did you mean format?"),
    ],
)
def test_mistakes(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(program.agcseg, "load", lambda run: trained())
    with pytest.raises(SystemExit) as ended:
        program.main(["RUN", *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_extra_is_named(missing, monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):  # None: an import fails as if it were not there
        monkeypatch.setitem(sys.modules, name, None if name == missing else types)
    with pytest.raises(
        UserError, match=rf"format=onnx needs the extra onnx \(.*\b{missing}\b.*pip install '.\[onnx\]'"
    ):
        export(trained(), "onnx")
