"""The program agcseg-predict."""

import errno
import sys

from tqdm import tqdm

import agcseg
from agcseg.cli import parse_run, program, show
from agcseg.data.labels import CITYSCAPES
from agcseg.errors import FileError, UserError, by_cause, expanded
from agcseg.predict import check_submission, find_images, predict, write_prediction, write_submission
from agcseg.training.lines import on_terminal
from agcseg.training.machine import find_device, out_of_memory

KEYS = {
    "checkpoint": "last",
    "input": str,
    "output": str,
    "probabilities": False,
    "submission": False,
    "minibatch": 4,
    "device": "auto",
}
TEST_IMAGES = 1525  # of Cityscapes

EPILOG = """\
examples:
  agcseg-predict outputs/demo/segnet-agc-mb4-lr0.08-seed1 input=photo.jpg output=predicted
  agcseg-predict RUN input=film/ output=predicted minibatch=8
  agcseg-predict RUN input='film/*_left.png' output=predicted probabilities=true
  agcseg-predict RUN input=/data/cityscapes/leftImg8bit/test output=to-upload submission=true

keys:
  input=WHAT            a picture, a folder (with its subfolders), or a pattern in quotes. Pictures may have any size:
                        the network sees them at its training size, whatever their proportions, and its logits are
                        resized back
  output=FOLDER         where the files go; older ones of the same names are replaced
  checkpoint=last       which of the run's weights: last, or best, those of the lowest validation pixel error
  probabilities=false   true: the classes' probabilities too
  submission=false      true: the files of the Cityscapes benchmark, and nothing else, then checked. The pictures must
                        be the benchmark's: CITY_000000_000019_leftImg8bit.png, 1024x2048
  minibatch=4           pictures at once
  device=auto           CUDA if there is any, else the CPU; or cpu, cuda, cuda:1 ...

written for each picture NAME:
  NAME_classes.png        class numbers from 0, painted by a palette, at the picture's size
  NAME_overlay.png        the same over the picture
  NAME_contour.png        contours between instances, white where sure (ClassNet only)
  NAME_probabilities.npz  probabilities (classes, height, width) as float16 at the training size, and the classes' names
  CITY_SEQUENCE_FRAME_labelIds.png   with submission=true: label ids at 1024x2048

exit code: 0 all is well, 1 some pictures could not be used (the others are done), 2 the command or the run is wrong
"""


@program("agcseg-predict")
def main(argv: list[str] | None = None) -> int:
    """Runs agcseg-predict; returns the exit code."""
    bad: list[UserError] = []
    try:
        run, keys = parse_run("agcseg-predict", KEYS, "Predict the classes of pictures.", EPILOG, argv)
        for key in ("input", "output"):
            if not keys[key]:
                raise UserError(f"{key}= is missing; for example: agcseg-predict RUN input=photo.jpg output=predicted")
        if keys["submission"] and keys["probabilities"]:
            raise UserError("submission=true: writes the benchmark's files alone; leave out probabilities=true")
        output = expanded(keys["output"])
        images = find_images(keys["input"], output, show)
        device = find_device(keys["device"])
        trained = agcseg.load(run, keys["checkpoint"])
        if keys["submission"] and trained.classes.names != CITYSCAPES.names:
            raise UserError(f"submission=true: {trained.path} was trained on {trained.config.data.name}'s classes")
        trained.network.to(device)
        names, written = {path: name for name, path in images.items()}, []
        bar = tqdm(total=len(images), unit="image", disable=not on_terminal(sys.stderr))
        with bar:

            def skip(error: UserError) -> None:
                bad.append(error)
                bar.update()

            for path, picture, classes, contour in predict(trained, images.values(), keys["minibatch"], skip):
                try:
                    if keys["submission"]:
                        written.append(write_submission(output, path, picture, classes))
                    else:
                        base = output / names[path]
                        write_prediction(trained, base, picture, classes, contour, keys["probabilities"])
                    bar.update()
                except UserError as error:
                    skip(error)
                except OSError as error:
                    if error.errno != errno.ENAMETOOLONG:
                        raise
                    skip(FileError(path, "its name is too long for its prediction's", advice="rename it"))
        done = len(images) - len(bad)
        if keys["submission"]:
            bad += map(UserError, check_submission(output, written))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError("out of memory; try a smaller minibatch=") from None
    for line in by_cause(bad):
        print(f"agcseg-predict: {line}", file=sys.stderr)
    show(f"{done} of {len(images)} pictures predicted, in {output}")
    if keys["submission"] and not bad:
        show("all files are as the benchmark wants them")
        if done != TEST_IMAGES:
            show(f"note: the benchmark's test set has {TEST_IMAGES} images")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
