"""The step that is measured: one of training, or one forward pass."""

from dataclasses import dataclass

import torch

from agcseg.losses import image_losses
from agcseg.networks import build
from agcseg.nn import GEMS, NORMS, add_noise
from agcseg.nn.background import BACKGROUNDS
from agcseg.nn.inference import inference_form
from agcseg.training.machine import compiled, keep_freed_memory
from agcseg.training.step import graphed

FOLDED = ("bn-folded", "agc-onepass")  # inference only, see `agcseg.nn.inference`
TRAINED = ("agc-gems", "agc-noise")  # training only, and not compiled
FORMS = ("agc-literal", *(f"agc-{background}" for background in BACKGROUNDS), *TRAINED, *FOLDED)
MODES = {
    "": None,
    "-compiled": "default",
    "-graphs": "reduce-overhead",
    "-graph": None,
}  # suffix -> torch.compile's mode
NUM_CLASSES = 19  # of Cityscapes
VARIANTS = tuple(name + mode for name in (*NORMS, *FORMS) for mode in MODES if not (mode and name in TRAINED))


@dataclass(frozen=True)
class Case:
    """One training step to measure, or with `inference` one forward pass. `variant` is one of VARIANTS: a norm, a form
    of it if any, and a mode of torch.compile if any, joined by hyphens. `size` is (height, width)."""

    network: str
    variant: str
    minibatch: int
    precision: str
    size: tuple[int, int]
    width: float = 1.0
    device: str = "cpu"
    channels_last: bool = False
    inference: bool = False

    @property
    def norm(self) -> str:
        return self.variant.partition("-")[0]

    @property
    def form(self) -> str:
        return self.variant.removeprefix(self.norm).removesuffix(self.suffix).removeprefix("-")

    @property
    def suffix(self) -> str:
        return next((mode for mode in MODES if mode and self.variant.endswith(mode)), "")


class Step:
    """A network with its optimiser and one fixed minibatch of noise; calling it is one training step, or with
    `case.inference` one forward pass in eval mode."""

    def __init__(self, case: Case, **options) -> None:
        """`options` of the network are beside those that follow from the case."""
        self.case, self.device = case, torch.device(case.device)
        if self.device.type == "cpu":
            keep_freed_memory()  # as a run does
        torch.manual_seed(0)
        if case.form in BACKGROUNDS:
            options["norm_options"] = {"background": case.form}
        if case.form == "literal":
            options["implementation"] = case.form
        self.network: torch.nn.Module = build(
            case.network, norm=case.norm, num_classes=NUM_CLASSES, width=case.width, **options
        )
        self.network.to(self.device).train(not case.inference)
        if case.form == "noise":
            add_noise(self.network, 0.1, 0.1, seed=0)
        self.gems = GEMS(self.network) if case.form == "gems" else None
        if case.form in ("folded", "onepass"):
            self.network = inference_form(self.network)
        images = torch.randn(case.minibatch, 3, *case.size, device=self.device)
        labels = torch.randint(0, NUM_CLASSES, (case.minibatch, *case.size), device=self.device)
        self.labels = labels.to(torch.uint8)
        self.contours = self.labels == 0  # about one pixel in NUM_CLASSES, for ClassNet
        if case.channels_last:
            self.network.to(memory_format=torch.channels_last)
            images = images.contiguous(memory_format=torch.channels_last)
        self.images = images
        mode = MODES[case.suffix]
        self.model = compiled(self.network, mode) if mode else self.network
        self.optimizer = torch.optim.SGD(self.network.parameters(), 1e-4, 0.9, fused=True)
        # None of itself otherwise: what holds itself is freed late, and counts in the next step's memory
        self.graph = graphed(self._take, self.optimizer) if case.suffix == "-graph" else None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.case.precision == "bf16")

    def loss(self) -> torch.Tensor:
        with self.autocast():
            outputs = self.model(self.images)
        parts = image_losses(outputs, self.labels, contours=self.contours)
        return sum(part.mean() for part in parts)  # type: ignore[return-value]  # there is at least one

    def __call__(self) -> None:
        (self.graph or self._take)()

    def _take(self) -> None:
        if self.case.inference:
            with torch.no_grad(), self.autocast():
                self.model(self.images)
            return
        self.optimizer.zero_grad()
        self.loss().backward()
        if self.gems:
            self.gems.scale_gradients()
        self.optimizer.step()
