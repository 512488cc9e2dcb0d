"""Street scenes: one reader per layout, one memory map at training size, minibatches cut from it. Knows no network."""

from collections.abc import Callable
from pathlib import Path

from agcseg.data import camvid, cityscapes
from agcseg.data.cache import Cached, locked, not_writable, open_cache
from agcseg.data.layout import SPLITS, Layout, list_samples
from agcseg.data.streets import make_streets

STREETS_VERSION = 1  # of how the built-in streets look; a new number leaves those made earlier unused
LAYOUTS = {layout.name: layout for layout in (cityscapes.LAYOUT, camvid.LAYOUT, cityscapes.STREETS)}


def open_data(
    name: str,
    root: str | Path,
    size: tuple[int, int],
    cache_dir: str | Path,
    progress: Callable = lambda items, total: items,
    say: Callable[[str], None] = print,
) -> tuple[Layout, dict[str, Cached]]:
    """Both splits of a data set at training size, from the cache, which is built first where it is missing.

    Args:
        name: "cityscapes", "camvid" or "streets".
        root: the data set's folder.
        size: (height, width).
        cache_dir: folder of the caches.
        progress: wraps an iteration, called with it and its length.
        say: takes the lines that a person should see.

    Raises:
        UserError: the data set is missing, incomplete or broken; it says what was looked for, where, and what to do.
    """
    layout, root, cache_dir = LAYOUTS[name], Path(root).expanduser(), Path(cache_dir).expanduser()
    samples = {split: list_samples(layout, root, split) for split in SPLITS}
    return layout, {
        split: open_cache(layout, samples[split], size, cache_dir, split, progress, say) for split in SPLITS
    }


def streets_root(cache_dir: str | Path, train: int, val: int, size: tuple[int, int], seed: int, say=print) -> Path:
    """The folder of the built-in streets with these parameters; they are made first where they are missing.

    Raises:
        UserError: `cache_dir` cannot be written.
    """
    cache_dir = Path(cache_dir).expanduser()
    root = cache_dir / f"streets{STREETS_VERSION}-{train}+{val}-{size[0]}x{size[1]}-seed{seed}"
    if not root.is_dir():
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with locked(root, say):
                if not root.is_dir():
                    say(f"making {train} + {val} street scenes of {size[0]}x{size[1]} in {root}")
                    make_streets(root, train, val, size, seed)
        except OSError as error:
            raise not_writable(error, cache_dir) from None
    return root
