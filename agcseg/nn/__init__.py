"""The layers. They know torch and nothing else of this package."""

from agcseg.nn.agc import AGC2d, agc, agc_conv2d
from agcseg.nn.conv import ConvUnit
from agcseg.nn.init import INITS, initialise
from agcseg.nn.norms import NORMS
from agcseg.nn.pooling import max_pool2d, max_unpool2d

__all__ = ["AGC2d", "ConvUnit", "INITS", "NORMS", "agc", "agc_conv2d", "initialise", "max_pool2d", "max_unpool2d"]
