"""Third-party networks: by name, by a callable, with every norm, and behind all programs."""

import csv
import importlib.util
import sys
import textwrap
import threading
from dataclasses import asdict, replace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from test_config import config
from torch import nn
from torch.nn import functional as F

import agcseg
from agcseg import AGC2d
from agcseg.check import check
from agcseg.config import Config, NetworkConfig, build_network
from agcseg.errors import UserError
from agcseg.export import differences, export
from agcseg.networks.foreign import OF_UNITS, TORCHVISION, Foreign, find_factory
from agcseg.nn import NORMS, layer_signals
from agcseg.record.tables import lambdas_of, layer_rows
from agcseg.trained import start_from
from agcseg.training.recipe import make_average
from agcseg.training.run import run

MINE = '''
    from torch import nn

    class Net(nn.Module):
        """Its norms run in another order than they are made in; one of them sees maps of 1x1."""

        def __init__(self, classes, channels=6):
            super().__init__()
            self.late = nn.BatchNorm2d(channels)
            self.context = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1, bias=False),
                                         nn.BatchNorm2d(channels), nn.ReLU())
            self.early = nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
            self.head = nn.Conv2d(channels, classes, 1)

        def forward(self, images):
            maps = self.early(images)
            return {"out": self.head(self.late(maps + self.context(maps)).relu()), "aux": None}

    class Square(Net):
        def forward(self, images):
            assert images.shape[2] == images.shape[3], "of squares only"

    class Silent(Net):
        def forward(self, images):
            raise NotImplementedError
'''
ORDER = ("early.1", "context.2", "late")


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the current folder."""
    (tmp_path / "mynet.py").write_text(textwrap.dedent(MINE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    sys.modules.pop("mynet", None)  # of a page in docs/, if that ran in this process
    yield "mynet:Net"
    sys.modules.pop("mynet", None)


def made(factory, norm="agc", **options):
    return agcseg.build("mine", factory=factory, classes_argument="classes", num_classes=5, norm=norm, **options)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_by_name(name):
    with torch.device("meta"):
        network = agcseg.build(name, norm="bn", num_classes=5, size=(64, 64))
        assert network(torch.zeros(2, 3, 32, 64)).shape == (2, 5, 32, 64)


def test_the_very_network_that_torchvision_makes():
    """Its logits at the images' size."""
    network = agcseg.build("lraspp_mobilenet_v3_large", norm="bn", num_classes=5).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = F.interpolate(network.network(images)["out"], (64, 64), mode="bilinear")
    assert torch.equal(network(images), expected)


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match="its weights cannot be downloaded .*no network"):
        agcseg.build("lraspp_mobilenet_v3_large", norm="bn", weights_backbone="DEFAULT")
    agcseg.build("lraspp_mobilenet_v3_large", norm="bn", weights_backbone="DEFAULT", download=False)


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm not in OF_UNITS])
def test_every_norm(mine, norm):
    network = made(mine, norm)
    assert network.layers == ORDER
    left = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(left) == (3 if norm == "bn" else 0)
    if norm not in ("bn", "instance"):  # which refuse a single value
        logits = network(torch.randn(2, 3, 16, 32))
        assert logits.shape == (2, 5, 16, 32)
        logits.square().mean().backward()
        assert all(p.grad.isfinite().all() for p in network.parameters() if p.requires_grad and p.grad is not None)


def test_values_of_a_conversion(mine):
    """What the network is with AGC in the place of its norms, their scale and shift kept."""
    torch.manual_seed(0)
    plain = made(mine, "bn")
    torch.manual_seed(0)
    network = made(mine)
    inner, images = plain.network, torch.randn(2, 3, 16, 16)
    for layer in ORDER:
        agc = AGC2d(6, mean_scale=0.0 if layer == "context.2" else 1.0)
        agc.weight, agc.bias = inner.get_submodule(layer).weight, inner.get_submodule(layer).bias
        inner.set_submodule(layer, agc)
    torch.testing.assert_close(network(images), plain(images))
    assert network.network.context[2].mean_scale.tolist() == [0] * 6  # maps of 1x1: λ = 1 would leave nothing


@pytest.mark.parametrize(
    ("norm", "options", "λ", "said"),
    [
        ("agc", {}, 0, "context.2: maps of 1x1, whose mean is all there is: λ starts at 0 instead of 1"),
        ("agc", {"mean_scale": 0.5}, 0.5, None),
        (
            "center",
            {},
            1,
            "context.2: maps of 1x1, whose mean is all there is: with λ fixed at 1 only β is left of them",
        ),
    ],
)
def test_maps_of_one_pixel(mine, caplog, norm, options, λ, said):
    with caplog.at_level("INFO"):
        network = made(mine, norm, norm_options=options)
    assert network.network.context[2].mean_scale.tolist() == [λ] * 6
    assert said in caplog.text if said else "1x1" not in caplog.text


def test_scale_and_shift_stay_with_another_norm():
    class Zeroed(nn.Sequential):
        def __init__(self, num_classes):
            super().__init__(nn.Conv2d(3, num_classes, 1), nn.BatchNorm2d(num_classes))
            nn.init.zeros_(self[1].weight)

    network = agcseg.build("mine", factory=Zeroed, norm="group", norm_options={"groups": 2}, num_classes=4)
    assert isinstance(network.network[1], nn.GroupNorm) and network.network[1].num_groups == 2
    assert (network.network[1].weight == 0).all()


def test_options_of_bn(mine):
    network = made(mine, "bn", norm_options={"eps": 1e-3, "momentum": 0.1})
    assert network.network.late.eps == 1e-3 and network.network.late.momentum == 0.1
    assert made(mine, "bn", norm_options={"momentum": None}).network.late.momentum is None
    with pytest.raises(UserError, match="norm=bn: affine: of segnet and classnet only; here eps and momentum can be"):
        made(mine, "bn", norm_options={"affine": False})


def test_own_init_unless_given(mine):
    stds = []
    for init in (None, "he", "he_centered"):
        torch.manual_seed(0)
        stds.append(made(mine, "bn", init=init, channels=512).network.early[0].weight.std().item())
    assert stds[1] == pytest.approx((2 / 27) ** 0.5, rel=0.03) and stds[2] == pytest.approx(1.2113 * stds[1], rel=0.03)
    assert stds[0] == pytest.approx(1 / 81**0.5, rel=0.03)  # torch's own


def test_layers_in_order_of_execution(mine):
    network = made(mine)
    rows = layer_rows(network, 0, layer_signals(network, torch.randn(2, 3, 16, 32)))
    assert [row["layer"] for row in rows] == [*ORDER] and [row["role"] for row in rows] == ["early", "context", "late"]
    assert [(row["height"], row["width"]) for row in rows] == [(8, 16), (1, 1), (8, 16)]
    assert rows[1]["common_mode"] == 1 and [row["lambda_mean"] for row in rows] == [1, 0, 1]
    assert lambdas_of(network).tolist() == [1] * 6 + [0] * 6 + [1] * 6
    assert network.training and [row["layer"] for row in layer_rows(made(mine, "bn"), 0, {})] == [*ORDER]


class Says(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, images):
        return self.what


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factory": "mynet"}, "network.factory=mynet: expected package.module:function"),
        ({"factory": "nothere.net:make"}, "there is no module nothere, neither installed nor in "),
        ({"factory": "mynet:Other"}, "mynet.py) has no Other"),
        ({"factory": "ends:make"}, "network.factory=ends:make: cannot be imported (SystemExit: 0)"),
        ({"factory": "broken:make"}, "network.factory=broken:make: cannot be imported (SyntaxError: "),
        ({"factory": "mynet:__doc__"}, "is a NoneType, which cannot be called"),
        ({"factory": "mynet:Net"}, "network=mine: its factory takes no num_classes; it takes classes, channels"),
        ({"factory": lambda num_classes: 3}, "its factory gives a int, expected a torch.nn.Module"),
        ({"factory": lambda num_classes: 1 / 0}, "cannot be made with num_classes=5 (ZeroDivisionError: "),
        ({"factory": lambda num_classes: nn.Conv2d(3, 4, 1)}, "gives 2x4x256x256 for images of 2x3x256x256; expected"),
        ({"factory": lambda num_classes: nn.Flatten()}, "gives 2x196608 for images"),
        ({"factory": lambda num_classes: Says([1])}, "gives a list; expected a tensor, or a mapping with out"),
        ({"factory": lambda num_classes: Says({"logits": 1})}, "gives a mapping with logits; expected one with out"),
        ({"factory": lambda num_classes: nn.Conv2d(3, 5, 1), "norm": "agc"}, "has no BatchNorm2d to replace"),
        ({"factory": "mynet:Net", "classes_argument": "classes", "norm": "frn"}, "norm=frn: acts on more than"),
        ({"factory": "mynet:Net", "classes_argument": "classes", "norm": "batch"}, "norm='batch' is not known"),
        ({"factory": "mynet:Net", "width": 0.5}, "width=0.5: of segnet and classnet only"),
        ({"factory": "mynet:Net", "init": "identity"}, "init=identity: of segnet and classnet only"),
        ({"network": "segnet", "factory": "mynet:Net"}, "network=segnet: takes no factory; network=custom does"),
        ({"network": "custom"}, "or give network.factory=package.module:function"),
        ({"network": "lraspp_mobilenet_v3_large", "backbone": 1}, "takes no backbone; it takes weights, progress,"),
        ({"network": "lraspp_mobilenet_v3_large", "weights_backbone": "X"}, "weights_backbone=X (KeyError: 'X')"),
    ],
)
def test_wrong_things_get_a_sentence(mine, tmp_path, options, message):
    (tmp_path / "broken.py").write_text("def make(:\n")
    (tmp_path / "ends.py").write_text("import sys\n\nsys.exit(0)\n")
    with pytest.raises(UserError) as error:
        agcseg.build(**{"network": "mine", "num_classes": 5, "norm": "bn", **options})
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["minibatch=1", "norm=bn"], "norm=bn, 1 image(s) of 96x128 at once: Expected more than 1 value per channel"),
        (["noise.gain=0.1"], "noise and gems: not in mine"),
        (["gems.mode=minibatch"], "noise and gems: not in mine"),
        (["network.init=xavier"], "network.init=xavier: choose from he"),
        (["network.factory=mynet:Other"], "mynet.py) has no Other"),
        (["+network.options.width=3"], "network.options.width: agcseg.build has an argument of this name"),
        (["+network.options.depth=3"], "its factory takes no depth; it takes classes, channels"),
        (["network.factory=mynet:Square"], "cannot be fed images of 96x128 (of squares only)"),
        (["network.factory=mynet:Silent"], "cannot be fed images of 96x128 (NotImplementedError)"),
    ],
)
def test_a_configuration_that_cannot_work(mine, overrides, message):
    own = ["network=custom", "network.name=mine", f"network.factory={mine}", "network.classes_argument=classes"]
    check(config(*own, "data.size=[96,128]", "minibatch=1"))  # AGC needs no second value
    with pytest.raises(UserError) as error:
        check(config(*own, "data.size=[96,128]", *overrides))
    assert message in str(error.value)


def test_a_network_is_tried_with_the_classes_of_its_data(mine, tmp_path):
    (tmp_path / "three.py").write_text("from torch import nn\nmake = lambda num_classes: nn.Conv2d(3, 3, 1)\n")
    (tmp_path / "classes.yaml").write_text("classes: [{name: road}, {name: house}, {name: sky}]\n")
    overrides = ["network=custom", "network.factory=three:make", "norm=bn"]
    check(config(*overrides, "data=folder", f"data.root={tmp_path}"))
    with pytest.raises(UserError, match="gives 2x3x256x512 .*, for 11 classes"):
        check(config(*overrides, "data=camvid"))


def test_a_size_that_the_network_refuses(mine, tmp_path):
    unshuffled = "from torch import nn\n\ndef make(num_classes):\n    return nn.Sequential(nn.PixelUnshuffle(8), "
    (tmp_path / "coarse.py").write_text(unshuffled + "nn.BatchNorm2d(192), nn.Conv2d(192, num_classes, 1))\n")
    overrides = ["network=custom", "network.factory=coarse:make"]
    check(config(*overrides, "data.size=[96,128]"))
    with pytest.raises(UserError, match="network=custom cannot be fed images of 100x128"):
        check(config(*overrides, "data.size=[100,128]"))


def test_a_run_and_what_follows(mine, tiny, tmp_path):
    """Train, go on, load, evaluate as in training, export: the checkpoint rebuilds the network."""
    network = NetworkConfig("mine", 1.0, None, factory=mine, classes_argument="classes", options={"channels": 4})
    result = run(tiny(network=network, epochs=1), tmp_path / "run")
    assert result["state"] == "finished"
    result = run(tiny(network=network), tmp_path / "run")  # goes on
    whole = run(tiny(network=network), tmp_path / "whole")
    assert result["pixel_error"] == whole["pixel_error"] and result["val_loss"] == whole["val_loss"]
    with open(tmp_path / "run/layers.csv") as file:
        assert [row["layer"] for row in csv.DictReader(file)] == [*ORDER] * 3
    assert {"step", *ORDER} == set(np.load(tmp_path / "run/lambdas.npz"))
    trained = agcseg.load(tmp_path / "run")
    assert isinstance(trained.network, Foreign) and not trained.network.training
    content = export(trained, "torch")
    assert max(beyond for _, _, beyond in differences(trained, content, "torch")) < 0.01
    sys.modules.pop("mynet")
    (tmp_path / "mynet.py").unlink()
    with pytest.raises(UserError, match="last.pt: network.factory=mynet:Net: there is no module mynet"):
        agcseg.load(tmp_path / "run")


def test_a_run_of_a_network_whose_file_has_changed_is_another(mine, tiny, tmp_path):
    config = tiny(network=NetworkConfig("mine", 1.0, None, factory=mine, classes_argument="classes"), epochs=1)
    result = run(config, tmp_path / "run")
    assert run(config, tmp_path / "run") == result
    source = tmp_path / "mynet.py"
    source.write_text(source.read_text().replace("nn.ReLU()", "nn.Tanh()"))
    for epochs in (1, 2):
        with pytest.raises(UserError, match="network.factory: the file of mynet:Net is another now"):
            run(replace(config, epochs=epochs), tmp_path / "run")


def test_a_trained_network_whose_file_has_changed_says_so(mine, tiny, tmp_path, caplog):
    run(tiny(network=NetworkConfig("mine", factory=mine, classes_argument="classes"), epochs=1), tmp_path / "run")
    agcseg.load(tmp_path / "run")
    assert "is another now" not in caplog.text
    source = tmp_path / "mynet.py"
    source.write_text(source.read_text().replace("nn.ReLU()", "nn.Tanh()"))
    agcseg.load(tmp_path / "run")
    assert "last.pt: the file of network.factory=mynet:Net is another now than it was in training" in caplog.text


def test_a_factory_that_gives_one_network_again(mine):
    network = made(mine).network

    def again(num_classes):
        return network

    for _ in range(2):
        with pytest.raises(UserError, match="gives the same network again; let it make a new one at each call"):
            agcseg.build("again", num_classes=5, norm="bn", factory=again)


def test_a_network_that_cannot_be_copied(mine, tiny):
    """Its norms are in the order of their names then; an average of it cannot be had."""

    class Locked(find_factory(mine)):
        def __init__(self, num_classes):
            super().__init__(num_classes)
            self.lock = threading.Lock()

    network = agcseg.build("locked", num_classes=5, factory=Locked)
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    assert sorted(network.layers) == sorted(ORDER)
    with pytest.raises(UserError, match="ema=0.9: the network cannot be copied"):
        make_average(network, Config(ema=0.9))


def test_a_deviation_of_one_point_is_not_divided_by(mine):
    network = made(mine, norm="agc_std")
    norm = network.network.context[2]
    assert norm.mean_scale.tolist() == [1.0] * 6 and not norm.mean_scale.requires_grad
    assert network(torch.randn(2, 3, 32, 32)).abs().max() < 10


def test_a_network_that_halves_its_maps_often_is_exported(mine, tiny, tmp_path):
    """Its example is of the training size: of a smaller one nothing would be left."""
    (tmp_path / "deep.py").write_text(
        "from torch import nn\n\ndef make(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, num_classes, 1), nn.BatchNorm2d(num_classes), nn.MaxPool2d(24))\n"
    )
    config = tiny(network=NetworkConfig("custom", 1.0, None, factory="deep:make"), epochs=1)
    config.data.size = [40, 60]
    run(config, tmp_path / "run")
    trained = agcseg.load(tmp_path / "run")
    assert max(beyond for _, _, beyond in differences(trained, export(trained, "torch"), "torch")) < 0.01


def test_options_that_fetch_weights_reach_the_factory(mine, tmp_path):
    text = (
        "from mynet import Net\n\n"
        "def make(classes, pretrained=False):\n    return Net(classes, 4 + 4 * pretrained)\n\n"
        "def trained(classes, pretrained=True):\n    return make(classes, pretrained)\n"
    )
    (tmp_path / "timmish.py").write_text(text)
    own = ["network=custom", "network.factory=timmish:make", "network.classes_argument=classes", "norm=bn"]
    its = config(*own, "data.size=[96,128]", "+network.options.pretrained=true")
    check(its)
    assert build_network(its).network.late.num_features == 8
    assert build_network(its, download=False).network.late.num_features == 4
    its.network.factory, its.network.options = "timmish:trained", {}
    assert build_network(its).network.late.num_features == 8
    assert build_network(its, download=False).network.late.num_features == 4


def test_start_from_a_network_of_others(mine, tmp_path):
    """Only what depends on the number of classes may differ. Its factory may look at values, as timm's do."""
    looking = textwrap.dedent(MINE).replace("self.late", "torch.zeros(1).item(); self.late", 1)
    (tmp_path / "mynet.py").write_text("import torch\n" + looking)
    its = Config(network=NetworkConfig("mine", factory=mine, classes_argument="classes"))
    saved = {"config": asdict(its), "classes": {"names": [*"abcde"]}, "network": made(mine).state_dict()}
    torch.save(saved, tmp_path / "last.pt")
    before, network = torch.get_rng_state(), made(mine)
    assert "new" not in start_from(network, tmp_path / "last.pt", classes=[*"abcde"])
    new = "; new, for other classes: network.head.weight, network.head.bias"
    torch.set_rng_state(before)
    assert start_from(network, tmp_path / "last.pt", classes=[*"edcba"]).endswith(new)
    assert torch.equal(torch.get_rng_state(), before)
    fewer = agcseg.build("mine", factory=mine, classes_argument="classes", num_classes=3)
    assert start_from(fewer, tmp_path / "last.pt").endswith(new)
    for other in ([*"abcde"], [*"abc"], None):
        with pytest.raises(UserError, match="is a network of another kind, norm or width"):
            start_from(made(mine, channels=8), tmp_path / "last.pt", classes=other)


@pytest.mark.skipif(not importlib.util.find_spec("segmentation_models_pytorch"), reason="not installed")
@pytest.mark.parametrize("norm", ["bn", "agc", "dyt"])
def test_segmentation_models(norm):
    """A Unet with an encoder of timm's."""
    network = agcseg.build(
        "unet", factory="segmentation_models_pytorch:Unet", classes_argument="classes", norm=norm, num_classes=5,
        encoder_name="tu-resnet10t", encoder_weights=None,
    )  # fmt: skip
    assert network(torch.randn(2, 3, 32, 64)).shape == (2, 5, 32, 64)
    assert any(isinstance(module, AGC2d) for module in network.modules()) == (norm == "agc")
