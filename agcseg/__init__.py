"""agcseg: automatic gain control (AGC) for convolutional networks, and the experiments of Deep Control (Ruff 2017).

Importing this package loads torch and nothing else.
"""

from agcseg.networks import build
from agcseg.nn import AGC2d, AGCReLU2d, ConvUnit, agc, agc_relu, agc_unit, convert_batchnorm

__version__ = "0.1.0"
__all__ = ["AGC2d", "AGCReLU2d", "ConvUnit", "agc", "agc_relu", "agc_unit", "build", "convert_batchnorm"]
