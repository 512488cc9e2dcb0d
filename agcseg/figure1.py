"""The paper's experiment: the twelve runs of Figure 1 and the eight panels that show them. Data only."""

from typing import NamedTuple


class Setting(NamedTuple):
    """What one run of Figure 1 varies; everything else is the same for all twelve."""

    network: str  # "segnet" or "classnet"
    norm: str  # "bn" or "agc"
    minibatch: int
    rate: float  # as it is, already multiplied by the minibatch

    @property
    def name(self) -> str:
        """Such as "segnet-bn-mb1-lr0.02"."""
        return f"{self.network}-{self.norm}-mb{self.minibatch}-lr{self.rate:g}"


class Panel(NamedTuple):
    """One panel of Figure 1: `runs` against the epoch."""

    letter: str
    caption: str  # as in the paper
    metric: str  # column of metrics.csv: "pixel_error" or "val_loss"
    runs: tuple[Setting, ...]


SCALED = ((1, 0.02), (4, 0.08), (8, 0.16))  # minibatch and 0.02 times the minibatch

_segnet_bn = tuple(Setting("segnet", "bn", *pair) for pair in (*SCALED, (8, 0.08)))
_segnet_agc = tuple(Setting("segnet", "agc", *pair) for pair in (*SCALED, (8, 0.08), (8, 0.32), (8, 0.64)))
_segnet_pair = (Setting("segnet", "bn", 4, 0.08), Setting("segnet", "agc", 4, 0.08))
_classnet_pair = (Setting("classnet", "bn", 4, 0.08), Setting("classnet", "agc", 4, 0.08))

RUNS = _segnet_bn + _segnet_agc + _classnet_pair

PANELS = (
    Panel("a", "BN error with Segnet for minibatch (1,4,8) and learning rate (0.02,0.08,0.16)", "pixel_error",
          _segnet_bn[:3]),
    Panel("b", "AGC error with Segnet for minibatch (1,4,8) and learning rate (0.02,0.08,0.16)", "pixel_error",
          _segnet_agc[:3]),
    Panel("c", "AGC vs BN error with Segnet at minibatch 4 and learning rate 0.08", "pixel_error", _segnet_pair),
    Panel("d", "AGC vs BN error with Classnet at minibatch 4 and learning rate 0.08", "pixel_error", _classnet_pair),
    Panel("e", "AGC vs BN loss with Segnet at minibatch 4 and learning rate 0.08", "val_loss", _segnet_pair),
    Panel("f", "AGC vs BN loss with Classnet at minibatch 4 and learning rate 0.08", "val_loss", _classnet_pair),
    Panel("g", "BN vs learning rate with Segnet for minibatch 8 and learning rate (0.08,0.16)", "pixel_error",
          (_segnet_bn[3], _segnet_bn[2])),
    Panel("h", "AGC vs learning rate with Segnet for minibatch 8 and learning rate (0.08,0.16,0.32,0.64)",
          "pixel_error", (_segnet_agc[3], _segnet_agc[2], *_segnet_agc[4:])),
)  # fmt: skip

# Final validation pixel errors that the paper's text gives: Cityscapes, 256x512, 150 epochs, fractions.
PAPER_ERRORS = {
    Setting("segnet", "agc", 4, 0.08): 0.0973,
    Setting("segnet", "bn", 4, 0.08): 0.0957,
    Setting("classnet", "agc", 4, 0.08): 0.0534,
    Setting("classnet", "bn", 4, 0.08): 0.0553,
}


def panels_of(network: str, norm: str, minibatch: int, rate: float) -> list[Panel]:
    """The panels that show a run with these settings."""
    return [
        panel
        for panel in PANELS
        for run in panel.runs
        if run[:3] == (network, norm, minibatch) and abs(run.rate - rate) <= 1e-6 * rate
    ]
