"""The layers. They know torch and nothing else of this package."""

from agcseg.nn.agc import AGC2d, agc, agc_conv2d
from agcseg.nn.conv import IMPLEMENTATIONS, ConvUnit
from agcseg.nn.fast import agc_unit
from agcseg.nn.init import INITS, initialise
from agcseg.nn.norms import NORMS
from agcseg.nn.pooling import max_pool2d, max_unpool2d

__all__ = [
    "AGC2d",
    "ConvUnit",
    "IMPLEMENTATIONS",
    "INITS",
    "NORMS",
    "agc",
    "agc_conv2d",
    "agc_unit",
    "initialise",
    "max_pool2d",
    "max_unpool2d",
]
