"""CamVid in the layout that the SegNet authors publish with their tutorial."""

from agcseg.data.labels import CAMVID
from agcseg.data.layout import Layout

LAYOUT = Layout(
    name="camvid",
    title="CamVid",
    classes=CAMVID,
    images="{split}/{name}",
    labels="{split}annot/{name}",
    tree="""\
{root}/train/NAME.png          367 images (or .jpg), and 101 under val
{root}/trainannot/NAME.png     class numbers 0 to 10, 11 for void; and valannot""",
    source="the folder CamVid of the SegNet authors' tutorial",
    expected={"train": 367, "val": 101},
)
