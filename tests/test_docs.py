"""Every command and every Python snippet of README.md and docs/*.md, in small.

Commands are the indented blocks (or ```bash), snippets are ```python, and what they print is ```text, compared but for
its numbers. A page runs from top to bottom in a folder of its own, on tiny data and networks of few stages. Sweeps, and
what needs several devices, are composed and checked instead. What nothing here knows how to run or check fails, with
file and line.
"""

import contextlib
import copy
import functools
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.machinery import SourceFileLoader
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from PIL import Image
from test_data import write_camvid
from test_folder import write_folder

import agcseg.cli.bench
import agcseg.cli.data
import agcseg.cli.eval
import agcseg.cli.export
import agcseg.cli.predict
import agcseg.cli.report
from agcseg.check import check
from agcseg.cli import CONFIGS, hydra_arguments, parse_run, to_object
from agcseg.cli.jobs import check_sweep, folder_of, spelled_as_in_files
from agcseg.config import Config
from agcseg.data import LAYOUTS
from agcseg.networks import NETWORKS, classnet, segnet
from agcseg.networks import kind as kind_of_network
from agcseg.record.identity import flat
from agcseg.training.run import run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTIONAL = {"onnx", "onnxruntime", "onnxscript", "torchvision"}  # without them, what imports them is left out
LAUNCHERS = {"ray": {"init": {"address": None}}, "submitit_slurm": {"partition": None}}  # those of Hydra's plugins
FORMULAS = ("O = (I∗W",)  # indented, and no command


def blocks(page: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, "command", "python" or "text", and text of each command, snippet and output of a page."""
    lines, i = page.read_text().splitlines(), 0
    while i < len(lines):
        start, line = i, lines[i]
        if line.startswith("```"):
            while not lines[i := i + 1].startswith("```"):
                pass
            language, inside = line[3:].strip(), lines[start + 1 : i]
            if language == "python":
                yield start + 2, "python", "\n".join(inside)
            elif language in ("bash", "sh"):
                yield from _commands(inside, start + 2)
            else:
                hidden = [said for said in inside if said.startswith(("agcseg-", "scripts/", "$ "))]
                assert not hidden, (
                    f"{page.name}:{start + 1}: no output but a command, which belongs into ```bash: {hidden}"
                )
                if language == "text":
                    yield start + 2, "text", "\n".join(inside)
        elif line.startswith("    ") and (start == 0 or not lines[start - 1].strip()):
            while i + 1 < len(lines) and lines[i + 1].startswith("    "):
                i += 1
            yield from _commands(lines[start : i + 1], start + 1)
        i += 1


def _commands(lines: list[str], number: int) -> Iterator[tuple[int, str, str]]:
    whole, first = "", number
    for i, line in enumerate(lines, number):
        whole, first = whole + line.strip().removesuffix("\\"), first if whole else i
        if not line.endswith("\\"):
            for command in whole.split(" && "):
                if not command.startswith("#"):
                    yield first, "command", command
            whole = ""


def words(command: str) -> list[str]:
    """As a shell splits it; `...` stands for more of the same."""
    return [word for word in shlex.split(command, comments=True) if word != "..."]


@functools.cache
def jobs(arguments: tuple[str, ...]) -> list[tuple[Config, Path]]:
    """Configuration and folder of what agcseg-train would run.

    Of a sweep so many jobs that each value on the command line occurs, but for seeds. Of what an experiment's file
    sweeps, or a pattern takes of a folder, the first; test_config.py checks the others.
    """
    typed = hydra_arguments("agcseg-train", list(arguments), Config)
    if {"-m", "--multirun"} & {*typed}:
        typed = spelled_as_in_files(typed)
        check_sweep(typed)
    overrides = [argument for argument in typed if argument not in ("-m", "--multirun")]
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        chosen = [overrides]
        if len(overrides) < len(arguments):
            parser = OverridesParser.create(GlobalHydra.instance().config_loader())
            swept = parser.parse_overrides(overrides)
            fixed = [part.input_line for part in swept if not part.is_sweep_override()]
            params = compose("train", fixed, return_hydra_config=True).hydra.sweeper.params or {}
            first = parser.parse_overrides([f"{key}={value}" for key, value in params.items()])
            first = [f"{part.key_or_group}={next(part.sweep_string_iterator())}" for part in first]
            chosen, seen = [], set()
            left_out = ("seed=", *(f"{part.key_or_group}=" for part in swept if "=glob(" in part.input_line))
            for job in BasicSweeper.split_arguments([*parser.parse_overrides(first), *swept], None)[0]:
                new = {override for override in job if not override.startswith(left_out)} - seen
                if new or not chosen:
                    chosen.append(list(job))
                    seen |= new
        made = []
        for job in chosen:
            config = to_object(compose("train", job), Config)
            check(config)
            made.append((config, folder_of(config, job)))
    return made


def small(config: Config) -> Config:
    """The same run, in a second."""
    multiple = max(32, kind_of_network(config.network.name).multiple)
    width = 0.05 if config.network.name in NETWORKS else 1.0
    streets = config.data.streets if config.data.root else replace(config.data.streets, train=4, val=2, size=[64, 128])
    return replace(
        config,
        network=replace(config.network, width=width),
        data=replace(config.data, size=[multiple, 2 * multiple], train_images=None, val_images=None, streets=streets),
        minibatch=2, accumulate=1, momentum_match=None, epochs=1, warmup=0, images=1, device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def setting(streets, tmp_path_factory):
    """Networks of few stages, data sets in small, launchers that may not be installed, and one run of each network."""
    folder = tmp_path_factory.mktemp("docs")
    cityscapes, test = folder / "data/cityscapes", folder / "data/cityscapes/leftImg8bit/test/berlin"
    shutil.copytree(streets, cityscapes)
    write_camvid(folder / "data/CamVid")
    (write_folder(folder / "data/mine") / "classes.yaml").unlink()  # a page drafts it
    test.mkdir(parents=True)
    scene = Image.open(next(streets.glob("leftImg8bit/val/*/*.png")))
    scene.resize((2048, 1024)).save(test / "berlin_000000_000019_leftImg8bit.png")
    scene.save(folder / "photo.jpg")
    with pytest.MonkeyPatch.context() as patch:
        store, _ = ConfigStore.instance(), Plugins.instance()  # plugins store their own once, and are not to lose it
        patch.setattr(store, "repo", copy.deepcopy(store.repo))  # what other tests of this process know stays as it is
        for plugin, node in LAUNCHERS.items():
            package = {"ray": "hydra_ray_launcher", "submitit_slurm": "hydra_submitit_launcher"}[plugin]
            if importlib.util.find_spec(f"hydra_plugins.{package}") is None:
                store.store(group="hydra/launcher", name=plugin, node=node)
        patch.setattr(segnet, "STAGES", segnet.STAGES[:1])
        patch.setattr(classnet, "WIDTHS", classnet.WIDTHS[:2])
        patch.setitem(LAYOUTS, "cityscapes", LAYOUTS["cityscapes"]._replace(expected=None, image_size=None))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("HOME", str(folder))
        patch.setattr(agcseg.cli.bench, "delivery", lambda *arguments: 100.0)
        patch.setattr(agcseg.cli.bench, "largest_minibatch", lambda case, budget: (1, "not tried"))
        for name in NETWORKS:
            config, _ = jobs(("data=streets", f"network={name}", "data.size=[128,128]", f"data.root={streets}"))[0]
            run(small(config), folder / name)
        yield folder


@pytest.fixture(scope="module")
def known(setting):
    """Folders of the runs that the commands of all pages make."""
    folders = set()
    for page in PAGES:
        for _, kind, text in blocks(page):
            if kind == "command" and words(text)[0] == "agcseg-train":
                with contextlib.suppress(Exception, SystemExit):  # its own page complains
                    folders |= {path for _, path in jobs(tuple(words(text)[1:]))}
    return folders


class Page:
    """Runs what stands in one page; the methods named after programs take their arguments."""

    def __init__(self, setting: Path, known: set[Path]) -> None:
        self.setting, self.known, self.names = setting, known, {}
        self.left_out = False  # a command, for want of an optional package: what it prints is not known

    def command(self, command: str) -> None:
        program, *arguments = words(command.replace("/data/", f"{self.setting}/data/"))
        name = re.sub(r"\W", "_", Path(program).name)
        assert program.startswith("scripts/") or hasattr(self, name), f"nothing here runs or checks {program}"
        self.provide(command)
        self.script(program, arguments) if program.startswith("scripts/") else getattr(self, name)(arguments)

    def python_block(self, code: str) -> None:
        self.provide(code)
        code = (
            code.replace("/data/", f"{self.setting}/data/")
            .replace("256, 512", "32, 64")
            .replace("width=0.25", "width=0.05")
        )
        try:
            exec(code, self.names)
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise

    def provide(self, text: str) -> None:
        """The runs that a command or snippet names, if a command of some page makes them; RUN is any run."""
        for path in map(Path, re.findall(r"\boutputs/(?!bench)[\w.=-]+(?:/[\w.=-]+)?|\bRUN\b", text)):
            network = "classnet" if "classnet" in path.name else "segnet"
            if path.name == "RUN":
                assert path == Path("RUN") or path.parent in {folder.parent for folder in self.known}, (
                    f"what is {path}?"
                )
                target = path
            elif len(path.parts) == 2:
                assert path in {folder.parent for folder in self.known}, f"what makes {path}?"
                target = path / "some-run"
                if list(path.glob("*/last.pt")):
                    continue
            else:
                assert path in self.known, f"what makes {path}?"
                target = path
            if not target.exists():
                shutil.copytree(self.setting / network, target)

    def agcseg_train(self, arguments: list[str]) -> None:
        made = jobs(tuple(argument.replace(f"{self.setting}/data/", "/data/") for argument in arguments))
        if not {"-m", "--multirun"} & {*arguments}:
            config, folder = made[0]
            if config.data.root:
                config.data.root = config.data.root.replace("/data/", f"{self.setting}/data/", 1)
            assert run(small(config), folder)["state"] == "finished"

    def agcseg_data(self, arguments: list[str]) -> None:
        less = [
            "data.train_images=null",
            "data.val_images=null",
            "data.streets.train=2",
            "data.streets.val=1",
            "data.streets.size=[64,128]",
            "data.size=[32,64]",
        ]
        sys.argv = ["agcseg-data", *arguments, *less]
        agcseg.cli.data.main()

    def agcseg_report(self, arguments: list[str]) -> None:
        if "--reference" in arguments:  # one of the settings that are only composed here
            i = arguments.index("--reference")
            arguments = arguments[:i] + arguments[i + 2 :]
        assert agcseg.cli.report.main(arguments) == 0

    def agcseg_eval(self, arguments: list[str]) -> None:
        assert agcseg.cli.eval.main([re.sub(r"^images=\d+", "images=2", argument) for argument in arguments]) == 0

    def agcseg_predict(self, arguments: list[str]) -> None:
        assert agcseg.cli.predict.main(arguments) == 0

    def agcseg_export(self, arguments: list[str]) -> None:
        _, keys = parse_run("agcseg-export", agcseg.cli.export.KEYS, "", "", arguments)
        if keys["format"] == "torch" or all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))):
            assert agcseg.cli.export.main(arguments) == 0
        else:
            self.left_out = True

    def agcseg_bench(self, arguments: list[str]) -> None:
        size = "128x128" if "classnet" in arguments else "32x64"
        less = ["--width", "0.05", "--size", size, "--rounds", "1", "--no-memory", "--device", "cpu"]
        with pytest.MonkeyPatch.context() as patch:
            if re.search("-(compiled|graphs)", str(arguments)):  # it would take minutes
                patch.setattr(agcseg.cli.bench, "_bench", lambda parsed: 0)
            patch.setattr(agcseg.cli.bench, "_show", lambda folders, out: 0)
            assert agcseg.cli.bench.main([*arguments, *less]) == 0

    def tensorboard(self, arguments: list[str]) -> None:
        assert arguments[0] == "--logdir" and list(Path(arguments[1]).glob("*/events.out*"))

    def pip(self, arguments: list[str]) -> None:
        assert re.fullmatch(r"install \.(\[\w+\])?", " ".join(arguments))
        extra = re.search(r"\[(\w+)\]", arguments[1])
        assert not extra or f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text()

    def torchrun(self, arguments: list[str]) -> None:
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(arguments)
        self.python(["-m", parsed.training_script, *parsed.training_script_args], only_compose=True)

    def python(self, arguments: list[str], only_compose: bool = False) -> None:
        if arguments[0] == "-c":
            return self.python_block(arguments[1])
        _, module, *rest = arguments
        program = f"agcseg_{module.removeprefix('agcseg.cli.')}"
        assert arguments[0] == "-m" and (module == "pytest" or hasattr(self, program)), f"what is {module}?"
        if only_compose:
            jobs(tuple(argument.replace(f"{self.setting}/data/", "/data/") for argument in rest))
        elif module != "pytest":
            getattr(self, program)(rest)

    def ruff(self, arguments: list[str]) -> None:
        assert arguments == ["check", "."]

    def mypy(self, arguments: list[str]) -> None:
        assert not arguments  # pyproject.toml says what

    def script(self, program: str, arguments: list[str]) -> None:
        """The script itself, in a checkout whose programs only write down how they are called."""
        checkout = Path("checkout").absolute()
        shutil.copytree(ROOT / "scripts", checkout / "scripts", dirs_exist_ok=True)
        (checkout / "scripts/setup").write_text("#!/bin/sh\n")
        for name in ("python", "ruff", "mypy", "agcseg-train", "agcseg-report"):
            stub = checkout / ".venv/bin" / name
            stub.parent.mkdir(parents=True, exist_ok=True)
            stub.write_text(f'#!/bin/sh\necho "{name} $*" >> {checkout}/calls\n')
            stub.chmod(0o755)
        (checkout / "calls").write_text("")
        done = subprocess.run([checkout / program, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for call in (checkout / "calls").read_text().splitlines():
            self.command(call)


def without_numbers(line: str) -> str:
    line = re.sub(r"\d+(\.\d+)?(e-\d+)?", "0", line)
    line = re.sub(r"\b0 (min|h) left", "0 s left", line)
    return " ".join(line.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page, setting, known, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (setting / "data/mine/classes.yaml").unlink(missing_ok=True)  # more than one page drafts it
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which a network of one's own adds the current folder
    Path("film").mkdir()
    for _, kind_of, text in blocks(page):
        if kind_of == "python" and "def make(num_classes" in text:  # what the page calls mynet.py
            Path("mynet.py").write_text(text)
    shutil.copy(setting / "photo.jpg", "photo.jpg")
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save("film/1.png")
    this, problems, printed = Page(setting, known), [], io.StringIO()
    for line, kind, text in blocks(page):
        if text.startswith(FORMULAS):
            continue
        if kind == "text":
            lines = {without_numbers(line) for line in [*printed.getvalue().splitlines(), *caplog.messages]}
            problems += [
                f"{page.name}:{number}: nothing prints {shown}"
                for number, shown in enumerate(text.splitlines(), line)
                if not this.left_out and shown.strip() != "..." and without_numbers(shown) not in lines
            ]
            continue
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
                this.command(text) if kind == "command" else this.python_block(text)
        except (Exception, SystemExit) as error:
            if not (isinstance(error, SystemExit) and not error.code):
                why = said.getvalue().strip() if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
                problems.append(f"{page.name}:{line}: {text.splitlines()[0]}\n    {why}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links(page):
    """Pages, pictures and headings that a page points to are there."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        other = page.parent / path if path else page
        assert other.exists(), f"{page.name}: {target}"
        headings = re.findall(r"^#+ (.+)$", other.read_text(), flags=re.MULTILINE) if heading else []
        slugs = [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings]
        assert not heading or heading in slugs, f"{page.name}: {target}"


def test_reference_of_the_configuration_is_up_to_date():
    loader = SourceFileLoader("configuration", str(ROOT / "scripts/configuration"))
    made = importlib.util.module_from_spec(importlib.util.spec_from_loader("configuration", loader))
    loader.exec_module(made)
    assert made.page() == (ROOT / "docs/configuration.md").read_text(), "run scripts/configuration"


def test_every_key_is_in_the_reference():
    page = (ROOT / "docs/configuration.md").read_text()
    keys = [key for key in flat(asdict(Config())) if not key.endswith(".options")]
    left = [key for key in keys if f"| `{key}` |" not in page and f"`{key.partition('.')[0]}=" not in page]
    assert len(keys) > 40 and not left
