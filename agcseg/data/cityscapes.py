"""The Cityscapes layout. The built-in streets are written in it too."""

from agcseg.data.labels import CITYSCAPES
from agcseg.data.layout import Layout

TREE = """\
{root}/leftImg8bit/train/CITY/CITY_000000_000019_leftImg8bit.png        {images}
{root}/gtFine/train/CITY/CITY_000000_000019_gtFine_labelIds.png         their label ids
{root}/gtFine/train/CITY/CITY_000000_000019_gtFine_instanceIds.png      their instances"""
IMAGES = "leftImg8bit_trainvaltest.zip"
LABELS = "gtFine_trainvaltest.zip"

LAYOUT = Layout(
    name="cityscapes",
    title="Cityscapes",
    classes=CITYSCAPES,
    images="leftImg8bit/{split}/*/{name}_leftImg8bit.png",
    labels="gtFine/{split}/*/{name}_gtFine_labelIds.png",
    instances="gtFine/{split}/*/{name}_gtFine_instanceIds.png",
    instance_divisor=1000,
    archives=(IMAGES, LABELS),
    tree=TREE.replace("{images}", "2975 images, and 500 under val"),
    source=f"{IMAGES} and {LABELS} from www.cityscapes-dataset.com, after registration",
    expected={"train": 2975, "val": 500},
    image_size=(1024, 2048),
)
STREETS = LAYOUT._replace(
    name="streets",
    title="the built-in streets",
    archives=(),
    tree=TREE.replace("{images}", "images, and more under val"),
    source="agcseg-data data=streets data.root=FOLDER makes them in a folder that is empty or not there",
    expected=None,
    image_size=None,
)
