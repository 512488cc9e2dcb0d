"""A trained network as one file that runs without agcseg: ONNX, or a program of torch.export."""

import importlib
import io
import json
import logging
import math
import warnings
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.export import Dim

import agcseg
from agcseg.data.minibatches import normalise
from agcseg.errors import UserError, first_line
from agcseg.nn.background import BackgroundAGC2d
from agcseg.nn.inference import inference_form
from agcseg.trained import Trained

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
OUTPUTS = ("class_logits", "contour_logits")  # the second of ClassNet only
TOLERANCE = 1e-4  # of the largest logit
UNDECIDED = 0.01  # share of pixels that may lie beyond it, see `differences`


class _FromPixels(nn.Module):
    """From pixels to a tuple of logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.network(normalise(images))
        return (outputs.classes, outputs.contour) if self.network.contour else (outputs,)


def export(trained: Trained, format: str) -> bytes:
    """The network in its inference form (see `agcseg.nn.inference`), with the normalisation of images, in float32.

    Its input `images` is (N, 3, H, W) uint8, RGB, for any N, and any H and W that the network takes. Only where a side
    was a single multiple of the network's (32 or 128) in training, a torch program takes nothing else, and elsewhere
    it takes no side of a single multiple. The outputs are float32 logits: `class_logits`, (N, K, H, W), and of ClassNet
    `contour_logits`, (N, 1, H, W). `metadata` travels with it: as properties of the ONNX model, each as JSON, or as the
    extra file metadata.json of the program.

    Args:
        trained: its network on the CPU.
        format: "onnx" or "torch", which `torch.export.load` reads.

    Returns:
        the content of the file.

    Raises:
        UserError: `format` is neither, what ONNX needs is not installed, ONNX lacks an operation of the network's, or
            AGC's background is a window whose size follows that of the image.
    """
    check_format(format)
    for norm in trained.network.modules():
        if isinstance(norm, BackgroundAGC2d) and norm.background == "window" and norm.window < 1:
            raise UserError(
                f"norm.options.window={norm.window:g}: a window that is a share of the map cannot be exported; "
                "one of a fixed number of positions can"
            )
    multiple, labels = multiple_of(trained), metadata(trained)
    # The exporter takes a dimension of 1 in the example, or two that are equal, for a law.
    free, size = {0: Dim("batch")}, [2 * multiple, 3 * multiple]
    if trained.network.multiple == 1:  # of a third-party network nobody knows how small an image may be
        height, width = (max(side, 2 * multiple) for side in trained.config.data.size)
        size = [height, width + multiple * (height == width)]
    for i, name in enumerate(("rows", "columns")):
        if _is_free(trained, format, i):
            free[2 + i] = multiple * Dim(name)
        else:
            size[i] = multiple
    images = torch.zeros(2, 3, *size, dtype=torch.uint8)
    with _quiet():
        try:
            network = _FromPixels(inference_form(trained.network)).eval()
            program = torch.export.export(network, (images,), dynamic_shapes=(free,))
        except Exception as error:  # as many kinds as there are ways to write a forward
            if trained.network.multiple > 1:
                raise
            raise UserError(
                f"network={trained.config.network.name}: torch.export cannot write it down for images of any size "
                f"({first_line(error)})"
            ) from None
        if format == "torch":
            buffer = io.BytesIO()
            torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(labels)})
            return buffer.getvalue()
        names = list(OUTPUTS[: 1 + trained.network.contour])
        try:
            exported = torch.onnx.export(
                program, input_names=["images"], output_names=names, dynamo=True, verbose=False
            )
        except torch.onnx.OnnxExporterError as error:
            norm, lines = trained.config.norm, str(error.__cause__ or error).splitlines()
            what = " ".join([f"norm={norm.name}", *(f"norm.options.{key}={norm.options[key]}" for key in norm.options)])
            raise UserError(f"{what} cannot be written as ONNX ({lines[0]}); try format=torch") from None
    assert exported
    model = exported.model_proto
    del model.graph.value_info[:]  # names the dimensions by the exporter's symbols
    for value in (*model.graph.input, *model.graph.output):
        for i, name in ((0, "batch"), (2, "height"), (3, "width")):
            value.type.tensor_type.shape.dim[i].dim_param = name
    for key, value in labels.items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    return model.SerializeToString()


def multiple_of(trained: Trained) -> int:
    """Of which the sides of images are multiples; in a third-party network what divides the training size, up to 32."""
    multiple = trained.network.multiple
    return math.gcd(32, *trained.config.data.size) if multiple == 1 else multiple


def _is_free(trained: Trained, format: str, side: int) -> bool:
    return format == "onnx" or trained.config.data.size[side] > multiple_of(trained)


@contextmanager
def _quiet():
    """The exporters warn of their own affairs only; their errors still come."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def check_format(format: str) -> None:
    """Raise UserError if `format` is not known, or if what it needs is not installed."""
    if format not in FORMATS:
        raise UserError(f"format={format}: choose from {', '.join(FORMATS)}")
    for package in ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ():
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"format=onnx needs the extra onnx ({error}): pip install '.[onnx]'") from None


def metadata(trained: Trained) -> dict:
    """What a user of the file needs to know: classes and colours in the order of the logits, sizes, origin."""
    config, classes = trained.config, trained.classes
    return {
        "classes": list(classes.names),
        "colors": [list(color) for color in classes.colors],
        "training_size": list(config.data.size),
        "multiple": multiple_of(trained),
        "network": config.network.name,
        "norm": config.norm.name,
        "width": config.network.width,
        "data": config.data.name,
        "epoch": trained.epoch,
        "agcseg": agcseg.__version__,
    }


def loaded(content: bytes, format: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """What `export` gave, as a function from images to logits, run on the CPU by ONNX Runtime, or by torch."""
    if format == "torch":
        return torch.export.load(io.BytesIO(content)).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()})))


@torch.no_grad()
def differences(trained: Trained, content: bytes, format: str) -> list[tuple[tuple[int, ...], float, float]]:
    """Compare what `export` gave with the trained network, in float32, on random images of several shapes.

    A correct file may differ in a few pixels: where two pixels of a pooling window tie within rounding, SegNet unpools
    their value to another place. Ties in the deepest maps, of which one reaches many pixels, are rare: where more than
    `UNDECIDED` differ, other images are tried, once.

    Returns:
        for each minibatch its shape, the largest difference of two logits as a share of the largest logit, and the
        share of pixels with a difference above `TOLERANCE`; of classes and contour the worse.
    """
    run, generator = loaded(content, format), torch.Generator().manual_seed(0)
    size, multiple = trained.config.data.size, multiple_of(trained)
    other = [side + multiple * _is_free(trained, format, i) for i, side in enumerate(size)]

    def compare(shape: tuple[int, ...]) -> tuple[float, float]:
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        parts = []
        for expected, got in zip(_FromPixels(trained.network)(images), run(images), strict=True):
            parts.append((got - expected).abs().amax(1) / expected.abs().max())
        beyond = [float((~(part <= TOLERANCE)).double().mean()) for part in parts]  # NaN is beyond
        return max(float(part.max()) for part in parts), max(beyond)

    found = []
    for shape in ((1, 3, *size), (3, 3, *size), (2, 3, *other)):
        largest, beyond = compare(shape)
        if beyond > UNDECIDED:
            largest, beyond = compare(shape)
        found.append((shape, largest, beyond))
    return found
