"""Every YAML composes, and every value that cannot work is refused before any data is touched."""

import copy
import dataclasses
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from agcseg import build
from agcseg.check import check
from agcseg.cli import CONFIGS, hydra_arguments, to_object
from agcseg.cli.jobs import _jobs as jobs_of
from agcseg.cli.jobs import check_files, check_sweep, folder_of, spelled_as_in_files
from agcseg.config import Config, momentum, rate
from agcseg.errors import UserError
from agcseg.record.identity import FREE, differences, folder_name, without_effect


def config(*overrides) -> Config:
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return to_object(compose("train", list(overrides)), Config)


def options(group):
    return sorted(path.stem for path in (Path(CONFIGS) / group).glob("*.yaml"))


def test_the_default_is_the_papers():
    default = config()
    check(default)
    assert (default.network.name, default.norm.name, default.minibatch, default.epochs) == ("segnet", "agc", 4, 150)
    assert (default.lr.base, default.momentum, default.weight_decay, default.class_weights) == (0.02, 0.9, 0, "enet")
    assert (default.data.name, default.data.size) == ("cityscapes", [256, 512])
    assert (default.data.train_images, default.data.val_images, default.data.flip) == (2750, 500, False)
    assert rate(default) == pytest.approx(0.08)


def test_the_schema_and_the_yaml_agree():
    """Defaults in agcseg/config.py, which Python users see, are those of the command line."""
    loaded, plain = dataclasses.asdict(config()), dataclasses.asdict(Config())
    for key in ("network", "norm"):  # the YAML also lists each one's options
        loaded[key].pop("options"), plain[key].pop("options")
    for key in ("root", "cache_dir"):  # the YAML asks the environment
        loaded["data"].pop(key), plain["data"].pop(key)
    assert loaded == plain


@pytest.mark.parametrize(
    "override", [f"{name}={option}" for name in ("network", "norm", "data", "experiment") for option in options(name)]
)
def test_every_yaml_composes(override):
    if override == "network=custom":
        with pytest.raises(UserError, match="give network.factory="):
            check(config(override))
    else:
        check(config(override))


def test_the_demo_with_each_network():
    """The same command, with what experiment/demo/NETWORK.yaml changes; the folders of the runs differ."""
    small, large = config("experiment=demo"), config("experiment=demo", "network=classnet")
    check(small), check(large)
    assert (small.network.name, small.data.size, small.epochs) == ("segnet", [64, 128], 20)
    assert (large.network.name, large.data.size, large.network.width) == ("classnet", [128, 256], 0.25)
    assert large.network.init == "he_centered" and large.name == "demo" and large.epochs < small.epochs
    assert config("experiment=demo", "network=classnet", "epochs=9", "data.size=[256,256]").epochs == 9
    names = {folder_of(made, ["experiment=demo", f"network={made.network.name}"]).name for made in (small, large)}
    assert names == {"segnet-agc-mb4-lr0.08-seed1", "classnet-agc-mb4-lr0.08-seed1"}


@pytest.mark.parametrize("experiment", sorted({*options("experiment")} - {"none", "figure1"}))  # see test_figure1.py
def test_every_value_that_an_experiment_sweeps_is_good(experiment):
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        composed = compose("train", [f"experiment={experiment}"])
    swept = OmegaConf.load(Path(CONFIGS) / f"experiment/{experiment}.yaml").hydra.sweeper.params
    assert len(swept) >= 2 and composed.name == experiment
    for key, values in swept.items():
        values = str(values).split(",")
        if key in ("norm", "network", "data"):  # whose every file is checked above
            assert set(values) <= set(options(key))
            continue
        for value in values:
            changed = copy.deepcopy(composed)
            OmegaConf.update(changed, key, yaml.safe_load(value))
            check(to_object(changed, Config))


def test_every_name_has_its_yaml():
    from agcseg.data import NAMES
    from agcseg.networks import NETWORKS, TORCHVISION
    from agcseg.nn import NORMS

    assert options("network") == sorted([*NETWORKS, *TORCHVISION, "custom"])
    assert options("norm") == sorted(NORMS)
    assert options("data") == sorted(NAMES)


@pytest.mark.parametrize("norm", options("norm"))
@pytest.mark.parametrize("network", ["segnet", "classnet"])  # the others: test_foreign.py
def test_every_network_and_norm_builds_from_its_yaml(network, norm):
    loaded = config(f"network={network}", f"norm={norm}", "network.width=0.05")
    build(
        loaded.network.name,
        norm=loaded.norm.name,
        norm_options=loaded.norm.options,
        width=loaded.network.width,
        **loaded.network.options,
    )


def test_the_overrides_of_the_readme():
    made = config(
        "network=segnet", "norm=bn", "minibatch=8", "data=camvid", "data.root=/data", "epochs=30", "seed=2",
        "lr.base=0.01", "data.size=[64,128]", "data.train_images=300", "data.val_images=50", "network.width=0.5",
        "device=auto",
    )  # fmt: skip
    check(made)
    assert rate(made) == pytest.approx(0.08) and made.name == "camvid"
    assert rate(config("lr.value=0.5", "minibatch=8")) == 0.5


SINGLE_PIXEL = ["network=classnet", "data=streets", "data.size=[128,128]"]  # what is left of the image


@pytest.mark.parametrize(
    "overrides",
    [
        [*SINGLE_PIXEL, "norm=bn", "minibatch=2"],
        [*SINGLE_PIXEL, "norm=agc", "minibatch=1"],
        ["data=streets", "data.size=[32,32]", "norm=instance", "minibatch=1"],
    ],
)
def test_small_sizes_that_work(overrides):
    """Accepted, and the network does train a step."""
    made = config(*overrides)
    check(made)
    module = build(made.network.name, norm=made.norm.name, width=0.1)
    outputs = module(torch.randn(made.minibatch, 3, *made.data.size))
    (outputs if isinstance(outputs, torch.Tensor) else outputs.classes).sum().backward()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["minibatch=0"], "minibatch=0: must be at least 1"),
        (["data.size=[100,512]"], "data.size=[100, 512]: segnet takes [height,width] in multiples of 32"),
        (["data.size=[256]"], "data.size=[256]: must be [height,width], at least 1 each"),
        (["lr.base=-0.1"], "lr.base=-0.1: a learning rate must be positive"),
        (["lr.value=0"], "lr.value=0.0: a learning rate must be positive"),
        (["lr.base=inf"], "must be positive and finite"),
        (["data.train_images=3000"], "data.train_images=3000: cityscapes has 2975 train images"),
        (["data.val_images=501"], "data.val_images=501: cityscapes has 500 val images"),
        (["data=streets", "data.train_images=200"], "streets has 128 train images"),
        (["data=streets", "minibatch=200"], "minibatch=200: there are 128 training images"),
        (["accumulate=3"], "accumulate=3: must divide minibatch=4"),
        (["momentum=1"], "momentum=1.0: must be at least 0 and below 1"),
        (["epochs=0"], "epochs=0: must be at least 1"),
        (["norm.name=batch"], "norm=batch: choose from agc, bn, group, instance, layer, none"),
        (["network.init=xavier"], "network.init=xavier: choose from he, he_centered, identity"),
        (["class_weights=median"], "class_weights=median: choose from enet, enet_raw, none"),
        (["precision=fp8"], "precision=fp8: choose from fp32, tf32, bf16"),
        (["channels_last=maybe"], "channels_last=maybe: auto, true or false"),
        (["name='a\udcc3'"], "name=a?: not in UTF-8"),
        (["name=../elsewhere"], "name=../elsewhere: must stay inside outputs/"),
        (["contour.loss=dice"], "contour.loss=dice: choose from iou, bce, class_iou"),
        (["contour.band=0"], "contour.band=0: must be at least 1"),
        (["network=classnet", "data=streets"], "classnet takes [height,width] in multiples of 128"),
        (["network=classnet", "network.options.final_projection=no"], "final_projection='no' is not known"),
        (["network=classnet", "network.options.contour_width=wide"], "contour_width='wide' must be a number of maps"),
        ([*SINGLE_PIXEL, "norm=instance"], "data.size=[128, 128]: the deepest maps of classnet are too small"),
        ([*SINGLE_PIXEL, "norm=bn", "minibatch=2", "accumulate=2"], "for norm=bn and 1 image(s) at once"),
        ([*SINGLE_PIXEL, "norm=group", "minibatch=1", "network.width=0.125"], "got input size [1, 32, 1, 1])"),
        (["+network.options.depth=3"], "network 'segnet' has no option depth"),
        (["network.width=0"], "network.width=0.0: must be positive"),
        (["norm.options.background=mode"], "background='mode' is not known; choose from map, window, median"),
        (["norm.options.background=window", "norm.options.window=8"], "window=8 must be an odd number"),
        (["norm.options.mean_scale=high"], "norm 'agc': mean_scale='high' must be like its default, 1.0"),
        (["norm.options.mean_scale=nan"], "norm 'agc': mean_scale=nan must be like its default, 1.0"),
        (["norm.options.mean_scale=null"], "norm 'agc': mean_scale=None must be like its default, 1.0"),
        (["norm=group", "norm.options.groups=2.5"], "groups=2.5 must be like its default, "),
        (["norm=group", "norm.options.groups=0"], "norm 'group': groups=0 must be positive"),
        (["norm=bn", "norm.options.eps=-1"], "norm 'bn': eps=-1 must be positive"),
        (["norm=ws", "network.options.head_norm=true"], "head_norm=true: ScaledWS2d acts on filters"),
        (["network.options.head_norm=off"], "network 'segnet': head_norm='off' must be true or false"),
        (["+network.options.in_channels=4"], "network.options.in_channels=4: images have 3 channels"),
        (["network.width=inf"], "network.width=inf: must be positive, and at most 100"),
        (["seed=18446744073709551616"], "must not be negative, and below 2^63"),
        (["weight_decay=inf"], "weight_decay=inf: must be finite and not negative"),
        (["network=custom", "network.name=smp/unet"], "network.name=smp/unet: stands in the names of folders"),
        (["augment.scale=[0.001,1]"], "augment.scale=[0.001, 1.0]: leaves nothing of images of data.size=[256, 512]"),
        (["augment.scale=[1,1000]"], "must be [smallest,largest], both positive, and at most 100"),
        (["augment.contrast=1e300"], "augment.contrast=1e+300: must be from 0 to 100"),
        (["lr.power=inf"], "lr.power=inf: must be positive and finite"),
        (["init_from="], "init_from: must not be empty; null for none"),
        (["run=trial/one"], "run=trial/one: must be the name of one folder"),
        (["run=.hidden"], "run=.hidden: must be the name of one folder, without a dot in front"),
        (["data.cache_dir="], "data.cache_dir: must not be empty"),
        (["noise.gain=1.5"], "noise.gain=1.5: must be between 0 and 1"),
        (["noise.shift=-0.1"], "noise.shift=-0.1: must be finite and not negative"),
        (["noise.shift=nan"], "noise.shift=nan: must be finite"),
        (["noise.gain=0.1", "compile=true"], "compile=true: not together with noise or gems"),
        (["norm=mean_only", "sync_bn=true"], "sync_bn=true: torch synchronises norm=bn, and not norm=mean_only"),
        (["gems.mode=minibatch", "compile=true"], "compile=true: not together with noise or gems"),
        (["gems.mode=pixel"], "GEMS mode 'pixel' is not known; choose from minibatch, map, sample"),
        (["gems.mode=map", "norm=bn"], "GEMS mode 'map' cannot be used with BatchNorm2d"),
        (["gems.mode=map", "gems.limit=0"], "GEMS limit 0.0 must be at least 1"),
        (["gems.mode=map", "gems.ema=0.9"], "GEMS ema 0.9 cannot be used with mode 'map'"),
        (["gems.mode=sample", "gems.gate=error"], "GEMS gate 'error' is not known; choose from relu, grad"),
        (["momentum_match=2"], "momentum_match=2: must be at least minibatch=4, or null"),
        (["momentum_match=0", "minibatch=1"], "momentum_match=0: must be at least minibatch=1"),
        (["momentum_match=8", "lr.value=0.1"], "momentum_match=8 sets the rate from lr.base: leave lr.value null"),
    ],
)
def test_bad_values_are_refused(overrides, message):
    with pytest.raises(UserError) as error:
        check(config(*overrides))
    assert message in str(error.value)


def test_momentum_match():
    """The single-sample twin of minibatch 8: m' = 1 - (1 - m)/8 and L' = L0/8."""
    twin = config("minibatch=1", "momentum_match=8")
    check(twin)
    assert (momentum(twin), rate(twin)) == pytest.approx((0.9875, 0.0025))
    assert (momentum(config()), rate(config())) == (0.9, 0.08)
    assert (momentum(config("momentum_match=4")), rate(config("momentum_match=4"))) == pytest.approx((0.9, 0.08))
    thousandth = config("minibatch=1", "momentum_match=100")
    assert (momentum(thousandth), rate(thousandth)) == pytest.approx((0.999, 0.0002))


@pytest.mark.parametrize("minibatch", [1, 2, 8])
@pytest.mark.parametrize("plain", [0.0, 0.9])
def test_matched_momentum_gives_a_sample_the_same_weight_and_memory(minibatch, plain):
    """What torch's SGD makes of a gradient of 1 from one sample of the first minibatch, as of minibatch 8."""
    twin = config(f"minibatch={minibatch}", "momentum_match=8", f"momentum={plain}")
    weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer, moves = torch.optim.SGD([weight], rate(twin), momentum(twin)), []
    for step in range(2400 // minibatch):
        before = weight.item()
        weight.grad = torch.tensor((step == 0) / minibatch, dtype=torch.float64)
        optimizer.step()
        moves.append(before - weight.item())
    assert sum(moves) == pytest.approx(0.02 / (1 - plain))
    samples = minibatch * sum(moves) / moves[0]  # 1 / (1 - m) steps
    assert samples == pytest.approx(8 / (1 - plain))


def test_all_faults_are_listed_at_once():
    with pytest.raises(UserError) as error:
        check(config("minibatch=0", "epochs=0", "precision=fp8"))
    assert all(word in str(error.value) for word in ("minibatch=0", "epochs=0", "precision=fp8"))


def folder(*overrides):
    return folder_of(config(*overrides), overrides)


def test_a_folder_comes_from_the_configuration():
    assert str(folder()) == "outputs/cityscapes/segnet-agc-mb4-lr0.08-seed1"
    overrides = ["data.size=[64,128]", "norm=bn", "minibatch=8", "network.width=0.25"]
    overrides += ["device=cpu", "epochs=3", "compile=true"]  # may differ in a continuation
    assert folder(*overrides).name == "segnet-bn-mb8-lr0.16-seed1-data.size=64x128-network.width=0.25"
    assert folder(*overrides) == folder(*overrides[::-1])
    assert folder("name=n", "run=r") == Path("outputs/n/r")
    assert folder("augment=standard").name == "segnet-agc-mb4-lr0.08-seed1-augment.name=standard"


@pytest.mark.parametrize(
    "spellings",
    [
        ["data.flip=true", "data.flip=True", "data.flip=on", "++data.flip=true"],
        ["weight_decay=5e-4", "weight_decay=0.0005"],
        ["momentum=0.8", "momentum=0.80", "momentum='0.8'"],
        ["momentum=0.9", "momentum=.9", "lr.base=0.02", "weight_decay=0", "gems.mode=null", "lr.value=0.08"],
        ["norm.options.mean_scale=0.5", "norm.options.mean_scale=5e-1"],
    ],
)
def test_one_configuration_one_folder(spellings):
    """However it is written, and with the defaults written out or not."""
    assert len({folder(spelling) for spelling in spellings}) == 1


def test_numbers_keep_their_sign_in_a_folders_name():
    assert folder("norm.options.mean_scale=-1").name.endswith("-norm.options.mean_scale=-1")
    assert folder("norm=bn", "norm.options.eps=1e-9").name.endswith("-norm.options.eps=1e-09")


def test_what_is_no_part_of_a_run_is_not_in_its_folder():
    for key in sorted(FREE - {"name", "run"}):
        value = {"data.root": "/b", "data.cache_dir": "/c", "device": "cpu", "network.implementation": "literal"}
        other = value.get(key, "9" if key in ("images", "save_every") else "false" if key == "resume" else "true")
        assert folder(f"{key}={other}").name == folder().name, key


def test_a_folders_name_is_short():
    """Any file system takes it, and other values have another one."""
    long = [f"init_from={'long' * 99}/{i}" for i in range(2)]
    names = [str(folder("data.flip=true", one).name) for one in long]
    assert len(set(names)) == 2 and all(len(name.encode()) <= 150 for name in names)
    assert all(name.startswith("segnet-agc-mb4-lr0.08-seed1-data.flip=true-init_from=long") for name in names)


@pytest.mark.parametrize(
    ("overrides", "one", "other"),
    [
        (["network.implementation=fast,literal"], "network.implementation=fast", "network.implementation=literal"),
        (["channels_last=false,true"], "channels_last=False", "channels_last=True"),
        (["epochs=2,1", "seed=1,2"], "epochs=2", "epochs=1"),
        (["data.root=/a,/b"], "data.root=/a", "data.root=/b"),
        (["lr.value=null,0.08"], "lr.value=null", "lr.value=0.08"),
        (["run=one", "norm=agc,bn"], "norm=agc", "norm=bn"),
        (["augment=flip", "epochs=2,1"], "epochs=2", "epochs=1"),
        (["augment=none,flip", "minibatch=abc,4", "epochs=2,1"], "epochs=2", "epochs=1"),
    ],
)
def test_a_sweep_whose_runs_would_share_a_folder_is_refused(overrides, one, other):
    arguments = hydra_arguments("agcseg-train", ["-m", "experiment=none", *overrides], Config)
    with pytest.raises(UserError, match="two runs of this sweep have one folder") as error:
        check_sweep(arguments)
    said = str(error.value)
    assert ("they differ in nothing" in said) == (overrides[0].startswith(("network", "channels", "data", "lr")))
    assert {one, other} <= set(re.split(r"[ ;]|\. ", said)), said


def test_options_that_an_experiment_sweeps_can_be_given():
    """By themselves, though Hydra takes a key with a plus for another."""
    own = ["network.init=he", "norm.options.background=trimmed", "norm.options.mean_scale=0.25,0.5", "seed=1,2"]
    arguments = hydra_arguments("agcseg-train", ["-m", "experiment=background", *own], Config)
    assert "++norm.options.background=trimmed" in arguments
    arguments = spelled_as_in_files(arguments)
    assert {"norm.options.background=trimmed", "++norm.options.mean_scale=0.25,0.5"} <= {*arguments}
    check_sweep(arguments)
    jobs = {job for job, *_ in jobs_of(arguments[1:], "train", (CONFIGS,))}
    assert len(jobs) == 4 and all("norm.options.background=trimmed" in job for job in jobs)


def test_files_of_ones_own_are_seen_by_the_check(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.yaml").write_text("# @package _global_\nepochs: 3\n")
    for place in (["--config-dir", str(tmp_path)], [f"hydra.searchpath=[file://{tmp_path}]"]):
        with pytest.raises(UserError, match="two runs of this sweep have one folder"):
            check_sweep(["-m", *place, "+mine=a", "network.implementation=fast,literal"])


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a: [1\nb: 2\n", r"mine/a.yaml, line 2: expected ',' or ']'"), (b"# \xe4\n", "mine/a.yaml: is not in UTF-8")],
)
def test_files_of_ones_own_that_are_broken_are_named(tmp_path, content, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.yaml").write_bytes(content)
    for place in (["--config-dir", str(tmp_path)], [f"hydra.searchpath=[file://{tmp_path}]"], ["-cd", str(tmp_path)]):
        with pytest.raises(UserError, match=message):
            check_files([*place, "+mine=a"])
    check_files(["-cd", str(tmp_path / "nowhere")])  # Hydra says that


def test_settings_without_effect_are_no_other_run():
    usual = Config()
    for change, said in (
        (lambda config: setattr(config.lr, "power", 2.0), "lr.power=2.0, of schedule=poly alone"),
        (lambda config: setattr(config.gems, "limit", 3.0), "gems.limit=3.0, of gems.mode=map or minibatch or sample"),
        (lambda config: setattr(config.contour, "band", 5), "contour.band=5, of network.name=classnet alone"),
        (lambda config: setattr(config, "sync_bn", True), "sync_bn=True, of norm.name=bn alone"),
        (lambda config: setattr(config.data.folder, "train", "trainval"), "data.folder.train=trainval, of data.name="),
        (
            lambda config: config.norm.options.update(window=0.25),
            "norm.options.window=0.25, of norm.options.back",
        ),
    ):
        config = Config()
        change(config)
        assert folder_name(config, usual) == folder_name(usual, usual)
        assert not differences(*({"config": asdict(one), "processes": 1} for one in (usual, config)))
        assert [line.startswith(said) for line in without_effect(asdict(config))] == [True]
    config.norm.options["background"] = "window"
    assert "window=0.25" in folder_name(config, usual) and not without_effect(asdict(config))


def test_sweeps_that_may_start():
    for overrides in (["seed=1,2", "norm=agc,bn"], ["seed=1,1"], ["experiment=demo"], ["run=a,b"],
                      ["run=${network.implementation}", "network.implementation=fast,literal"],
                      ["minibatch=0,4", "norm=bn"]):  # fmt: skip
        check_sweep(hydra_arguments("agcseg-train", ["-m", *overrides], Config))
    with pytest.raises(UserError, match="experiment=norms has a sweep of its own"):
        check_sweep(["-m", "experiment=norms,gems"])


UNKNOWN = {
    "weight_dcay": "weight_decay", "data.flp": "data.flip", "noise.gian": "noise.gain", "lr.vlaue": "lr.value",
    "data.streets.siez": "data.streets.size",
}  # fmt: skip


@pytest.mark.parametrize("key", UNKNOWN)
@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_a_mistyped_key_is_refused_whatever_way_it_comes_in(plus, key, capsys):
    with pytest.raises(SystemExit):
        hydra_arguments("agcseg-train", [f"{plus}{key}=1"], Config)
    assert f"{key} is not a key of the configuration; did you mean {UNKNOWN[key]}" in capsys.readouterr().err
    if plus:
        with pytest.raises(UserError, match=f"{key} is not a key of the configuration; did you mean {UNKNOWN[key]}"):
            config(f"{plus}{key}=1")


TEXTS = [
    "2026_11_25", "1e3", "1.50", "true", "it's", 'a "b"', "a=b", "/my data (1)", "[x]", "{y}", "Zürich",
    "a, b", "-x", "a#b", "%", "a\\b", "a\\", "@", "*", "null1", " ", "choice(a)", "~/x",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_texts_arrive_as_they_are_typed(text):
    """Singly, and in a sweep, where commas part values."""
    typed = [f"{key}={text}" for key in ("data.root", "name", "init_from", "++run")]
    made = config(*hydra_arguments("agcseg-train", typed, Config))
    assert [made.data.root, made.name, made.init_from, made.run] == [text] * 4
    if "," in text or "(" in text:
        return
    _, argument = hydra_arguments("agcseg-train", ["-m", f"data.root={text},other"], Config)
    parsed = OverridesParser.create().parse_overrides([argument])
    jobs = BasicSweeper.split_arguments(parsed, None)[0]
    assert [config(*job).data.root for job in jobs] == [text, "other"]


@pytest.mark.parametrize("text", ["a${x}b", "${", "a${b"])
def test_a_text_is_no_part_of_a_reference(text):
    """It would be read as one from the run's config.yaml."""
    with pytest.raises(UserError, match=r"data.root=.*: '\$\{' begins a reference to another key"):
        config(*hydra_arguments("agcseg-train", [f"data.root={text}"], Config))


def test_texts_that_mean_something():
    for argument, value in (
        ("data.root=null", None), ("data.root='a b'", "a b"), ("data.root=${data.name}", "cityscapes"),
        ("data.root=${oc.env:NOWHERE,x}/y", "x/y"),
    ):  # fmt: skip
        assert config(*hydra_arguments("agcseg-train", [argument], Config)).data.root == value
    assert hydra_arguments("p", ["-m", "data.root='a,b',c"], Config)[1] == "data.root='a,b',c"
    swept = hydra_arguments("p", ["-m", "data.root=${oc.env:NOWHERE,x}/y,c"], Config)[1]
    assert swept == "data.root='${oc.env:NOWHERE,x}/y',c"


def test_configs_are_plain_yaml():
    for path in Path(CONFIGS).rglob("*.yaml"):
        OmegaConf.load(path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "--config-name=train", "~hydra.launcher", "minibatch=1,4"],
        ["--cfg=job", "--resolve", "~hydra.launcher"],
        ["-sc", "install=bash"],
        ["--shell-completion", "query=bash"],
        ["-cd", "outputs/t/segnet-agc-mb4-data.size=32x64", "-cn", "config", "--info", "defaults"],
        ["--config-dir=outputs/a=b", "hydra.verbose=true", "hydra/launcher=basic", "+hydra.x=1"],
    ],
)
def test_flags_of_hydra_are_not_taken_for_values(arguments):
    assert hydra_arguments("agcseg-train", arguments, Config) == arguments


def test_flags_stand_anywhere():
    said = hydra_arguments("agcseg-train", ["data=streets", "-m", "seed=1,2", "--config-dir", "mine"], Config)
    assert said == ["-m", "--config-dir", "mine", "data=streets", "seed=1,2"]


@pytest.mark.parametrize(
    "arguments",
    ["-m --cfg job", "--run -m", "-m -i", "--cfg hydra --resolve", "--resolve"]
    + ["norm=null", "experiment=null", "--hydra-help seed=1"]
    + ["minibatch=1,4", "norm=bn,agc --help", "-m norm=bn,agc --help", "seed=range(1,4) --info", "figure1=glob(*)"],
)
def test_flags_that_hydra_answers_with_a_traceback(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        hydra_arguments("agcseg-train", arguments.split(), Config)
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["epochs", "=", "3"], "epochs: expected KEY=VALUE, without spaces"),
        (["=3"], "=3: expected KEY=VALUE"),
        (["data.size=[32,64"], "data.size=[32,64: the value cannot be read"),
    ],
)
def test_what_is_no_override(arguments, message, capsys):
    with pytest.raises(SystemExit):
        hydra_arguments("agcseg-train", arguments, Config)
    assert message in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        hydra_arguments("agcseg-train", ["--version"], Config)
    assert not end.value.code and re.fullmatch(r"agcseg-train \d+\.\d+\.\d+\n", capsys.readouterr().out)
