"""Reader of the Cityscapes layout. The built-in streets are written in it too."""

from pathlib import Path

from agcseg.data.labels import CITYSCAPES
from agcseg.data.layout import Layout, Sample

TREE = """\
{root}/leftImg8bit/train/CITY/CITY_000000_000019_leftImg8bit.png        {images}
{root}/gtFine/train/CITY/CITY_000000_000019_gtFine_labelIds.png         their label ids
{root}/gtFine/train/CITY/CITY_000000_000019_gtFine_instanceIds.png      their instances"""
IMAGES = "leftImg8bit_trainvaltest.zip"
LABELS = "gtFine_trainvaltest.zip"


def scan(root: Path, split: str) -> tuple[list[Sample], list[str]]:
    """List the samples of one split, sorted by city and name, and everything that is missing."""
    image_folder, label_folder = root / "leftImg8bit" / split, root / "gtFine" / split
    problems = [
        f"{folder}: no such folder (it comes with {archive})"
        for folder, archive in ((image_folder, IMAGES), (label_folder, LABELS))
        if not folder.is_dir()
    ]
    if problems:
        return [], problems
    images = {_stem(path, "_leftImg8bit.png"): path for path in image_folder.glob("*/*_leftImg8bit.png")}
    labels = {_stem(path, "_gtFine_labelIds.png"): path for path in label_folder.glob("*/*_gtFine_labelIds.png")}
    if not images:
        problems.append(f"{image_folder}: holds no CITY/*_leftImg8bit.png (they come with {IMAGES})")
    samples = []
    for stem, image in sorted(images.items()):
        label = labels.get(stem, label_folder / f"{stem}_gtFine_labelIds.png")
        instance = label_folder / f"{stem}_gtFine_instanceIds.png"
        missing = [path for path in (label, instance) if not path.is_file()]
        problems += [f"{path}: missing (it comes with {LABELS})" for path in missing]
        if not missing:
            samples.append(Sample(stem, image, label, instance))
    for stem in sorted(labels.keys() - images.keys()):
        problems.append(f"{image_folder / stem}_leftImg8bit.png: missing (it comes with {IMAGES})")
    return samples, problems


def _stem(path: Path, ending: str) -> str:
    return f"{path.parent.name}/{path.name[: -len(ending)]}"


LAYOUT = Layout(
    name="cityscapes",
    title="Cityscapes",
    classes=CITYSCAPES,
    scan=scan,
    tree=TREE.replace("{images}", "2975 images, and 500 under val"),
    source=f"{IMAGES} and {LABELS} from www.cityscapes-dataset.com, after registration",
    expected={"train": 2975, "val": 500},
    image_size=(1024, 2048),
)
STREETS = LAYOUT._replace(
    name="streets",
    title="the built-in streets",
    tree=TREE.replace("{images}", "images, and more under val"),
    source="agcseg-data data=streets makes them",
    expected=None,
    image_size=None,
)
