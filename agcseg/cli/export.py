"""The program agcseg-export."""

import os
import sys

import agcseg
from agcseg.cli import parse_run, program, show
from agcseg.errors import UserError, expanded
from agcseg.export import FORMATS, TOLERANCE, UNDECIDED, check_format, differences, export
from agcseg.record.files import write

KEYS = {"checkpoint": "last", "format": "onnx", "output": str}

EPILOG = """\
examples:
  agcseg-export outputs/demo/segnet-agc-mb4-lr0.08-seed1
  agcseg-export RUN output=street.onnx
  agcseg-export RUN format=torch

keys:
  format=onnx     for ONNX Runtime and others; needs the extra onnx: pip install '.[onnx]'. torch: a program for
                  torch.export.load, which needs torch alone
  checkpoint=last which of the run's weights: last, or best, those of the lowest validation pixel error
  output=FILE     if not given, network.onnx or network.pt2 in the run's folder, of checkpoint=best network-best; an
                  older file is replaced

the exported network:
  images          in: (N, 3, H, W) uint8, RGB; it normalises them itself. N is free, H and W in multiples of 32 (SegNet)
                  or 128 (ClassNet). Give it the size it was trained at: to AGC, a tile is another picture
  class_logits    out: (N, classes, H, W) float32; the largest is the class
  contour_logits  out: (N, 1, H, W) float32, ClassNet only; above 0 is contour
  metadata        classes, colors, training_size, ...: ONNX properties, each as JSON, or the extra file metadata.json

AGC and batch normalisation are folded into the convolutions, other norms stay as they are. Arithmetic is float32,
whatever the precision in training. Before it is written, the file is run on random images of several sizes and compared
with the trained network.

exit code: 0 all is well, 1 the exported network says something else than the trained one (nothing is written), 2 the
command or the run is wrong
"""


@program("agcseg-export")
def main(argv: list[str] | None = None) -> int:
    """Runs agcseg-export; returns the exit code."""
    run, keys = parse_run("agcseg-export", KEYS, "A trained network as a file for inference.", EPILOG, argv)
    format = keys["format"]
    check_format(format)
    trained = agcseg.load(run, keys["checkpoint"])
    best = "-best" if trained.path.name == "best.pt" else ""
    output = expanded(keys["output"] or trained.path.with_name(f"network{best}{FORMATS[format]}"))
    if output.suffix != FORMATS[format]:
        raise UserError(f"output={output}: a file of format={format} ends in {FORMATS[format]}")
    there = next(folder for folder in output.absolute().parents if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):  # asked first: exporting takes its time
        raise UserError(f"output={output}: {there} cannot be written; give another file")
    content = export(trained, format)
    found = differences(trained, content, format)
    for shape, largest, beyond in found:
        images = "x".join(map(str, shape))
        show(f"{images}: differs by at most {largest:.1e} of the largest logit{_share(beyond)}")
    if any(beyond > UNDECIDED for _, _, beyond in found):
        complaint = f"{output}: not written, for it does not say what {trained.path} says"
        print(f"agcseg-export: error: {complaint}", file=sys.stderr)
        return 1
    output.parent.mkdir(parents=True, exist_ok=True)
    write(output, content)
    show(f"wrote {output} ({len(content) / 2**20:.1f} MiB)")
    return 0


def _share(beyond: float) -> str:
    return f"; by more than {TOLERANCE:g} in {beyond:.2%} of the pixels" if beyond else ""


if __name__ == "__main__":
    raise SystemExit(main())
