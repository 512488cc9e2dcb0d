"""The layers. They know torch, and of this package `agcseg.errors` alone."""

from agcseg.nn.agc import AGC2d, agc
from agcseg.nn.conv import IMPLEMENTATIONS, ConvUnit
from agcseg.nn.convert import Conversion, convert_batchnorm
from agcseg.nn.fast import AGCReLU2d, agc_relu, agc_unit
from agcseg.nn.gems import GEMS
from agcseg.nn.inference import inference_form
from agcseg.nn.init import INITS, initialise
from agcseg.nn.noise import add_noise
from agcseg.nn.norms import NORMS
from agcseg.nn.pooling import max_pool2d, max_unpool2d
from agcseg.nn.signals import layer_signals

__all__ = [
    "AGC2d",
    "AGCReLU2d",
    "ConvUnit",
    "Conversion",
    "GEMS",
    "IMPLEMENTATIONS",
    "INITS",
    "NORMS",
    "add_noise",
    "agc",
    "agc_relu",
    "agc_unit",
    "convert_batchnorm",
    "inference_form",
    "initialise",
    "layer_signals",
    "max_pool2d",
    "max_unpool2d",
]
