"""agcseg: automatic gain control (AGC) for convolutional networks, and the experiments of Deep Control (Ruff 2017).

Importing this package loads torch and nothing else.
"""

from typing import TYPE_CHECKING

from agcseg.networks import build
from agcseg.nn import AGC2d, AGCReLU2d, ConvUnit, agc, agc_relu, agc_unit, convert_batchnorm

if TYPE_CHECKING:
    from pathlib import Path

    from agcseg.trained import Trained


def load(path: "str | Path", checkpoint: str = "last") -> "Trained":
    """A trained network from its run's folder or checkpoint: network in eval mode, classes, config, epoch, path.

    See `agcseg.trained.load`; only calling it loads what else is needed to read checkpoints.

    Raises:
        UserError: there is no such run or checkpoint, or it cannot be used.
    """
    from agcseg.trained import load

    return load(path, checkpoint)


__version__ = "0.1.0"
__all__ = ["AGC2d", "AGCReLU2d", "ConvUnit", "agc", "agc_relu", "agc_unit", "build", "convert_batchnorm", "load"]
