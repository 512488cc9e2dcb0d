"""Reader of CamVid in the layout that the SegNet authors publish with their tutorial."""

from pathlib import Path

from agcseg.data.labels import CAMVID
from agcseg.data.layout import Layout, Sample

TREE = """\
{root}/train/NAME.png          367 images (or .jpg), and 101 under val
{root}/trainannot/NAME.png     class numbers 0 to 10, 11 for void; and valannot"""


def scan(root: Path, split: str) -> tuple[list[Sample], list[str]]:
    """List the samples of one split, sorted by name, and everything that is missing."""
    image_folder, label_folder = root / split, root / f"{split}annot"
    problems = [f"{folder}: no such folder" for folder in (image_folder, label_folder) if not folder.is_dir()]
    if problems:
        return [], problems
    images = {path.stem: path for path in sorted(image_folder.iterdir()) if path.suffix in (".png", ".jpg")}
    labels = {path.stem: path for path in sorted(label_folder.iterdir()) if path.suffix == ".png"}
    if not images:
        problems.append(f"{image_folder}: holds no .png or .jpg")
    problems += [f"{label_folder / stem}.png: missing" for stem in images if stem not in labels]
    problems += [f"{image_folder / stem}.png (or .jpg): missing" for stem in labels if stem not in images]
    samples = [Sample(stem, images[stem], labels[stem], None) for stem in sorted(images.keys() & labels.keys())]
    return samples, problems


LAYOUT = Layout(
    name="camvid",
    title="CamVid",
    classes=CAMVID,
    scan=scan,
    tree=TREE,
    source="the folder CamVid of the SegNet authors' tutorial",
    expected={"train": 367, "val": 101},
    image_size=None,
)
