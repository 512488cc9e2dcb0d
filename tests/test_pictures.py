"""The one reader and the one listing, on odd and damaged files."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from agcseg.data.pictures import each, is_picture, list_files, open_picture, read_image, read_numbers, suffixes
from agcseg.errors import FileError, UserError, by_cause
from agcseg.predict import find_images

NOISE = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE)


def stored(picture=PICTURE, kind="png", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


DAMAGED = {
    "empty.png": b"",
    "text.png": b"no picture",
    "cut.png": stored()[:400],
    "cut.jpg": stored(kind="jpeg")[:300],
    "cut.webp": stored(kind="webp")[:100],
    "cut.tif": stored(kind="tiff")[:100],
    "cut.gif": stored(PICTURE.convert("P"), "gif")[:500],
    "pixel.png": flipped(stored(compress_level=0), 100),  # of a stored picture: it decodes, to another pixel
    "size.png": flipped(stored(), 20),
    "end.png": stored()[:-12],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(DAMAGED[name])
    with pytest.raises(FileError, match=f"{name}: cannot be decoded, truncated or not an image"):
        read_image(path)


def test_every_bit_of_a_label_file_is_watched(tmp_path):
    """No flip of one bit gives other numbers in silence."""
    numbers = np.random.default_rng(1).integers(0, 20, (9, 11), dtype=np.uint8)
    content, path = stored(Image.fromarray(numbers), compress_level=0), tmp_path / "label.png"
    wrong = 0
    for at in range(8, len(content)):
        path.write_bytes(flipped(content, at))
        try:
            assert np.array_equal(read_numbers(path), numbers), at
        except FileError:
            wrong += 1
    assert wrong > len(content) - 30


def _png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A picture with further chunks, their checksums right."""
    content = stored()
    made = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return content[:33] + made + content[33:]


@pytest.mark.parametrize(
    "content",
    [
        _png((b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n      4\nno hex"))),
        _png((b"eXIf", b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0")),
        stored(kind="webp", exif=b"Exif\0\0garbage"),
        stored(kind="jpeg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01"),
    ],
    ids=["profile", "cut", "webp", "jpeg"],
)
def test_a_damaged_note_ends_nothing(tmp_path, content):
    """The picture is read, or its file is named; nothing else escapes, and no warning is shown."""
    path = tmp_path / "picture"
    path.write_bytes(content)

    def read(path):
        try:
            return read_image(path).size
        except FileError as error:
            return str(error)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = each(read, [path])
    assert found == (20, 12) or str(path) in found


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, SyntaxError, ValueError, KeyError, MemoryError])
def test_whatever_a_decoder_raises_becomes_a_sentence(tmp_path, monkeypatch, error):
    path = tmp_path / "a.png"
    path.write_bytes(stored())

    def fail(self):
        raise error("of the decoder")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(FileError, match=r"a\.png: cannot be decoded, .*of the decoder"):
        open_picture(path)


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path, kind, orientation):
    path, exif = tmp_path / "a", turned(orientation)
    options = {"lossless": True} if kind == "webp" else {"quality": 100} if kind == "jpeg" else {}
    path.write_bytes(stored(kind=kind, exif=exif, **options))
    flat = np.asarray(Image.open(path).convert("RGB")) if kind == "jpeg" else NOISE
    undo = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a),
    }[orientation]  # fmt: skip
    assert np.array_equal(np.asarray(read_image(path)), undo(flat))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_modes(tmp_path, mode):
    """Images of 8 bits a channel become RGB; of labels, whole numbers and colours are taken as they stand."""
    path = tmp_path / ("a.png" if mode not in ("CMYK", "I", "F") else "a.tif")
    grey = PICTURE.convert("L")
    picture = Image.fromarray(np.asarray(grey).astype(np.uint16)) if mode == "I;16" else grey.convert(mode)
    picture.save(path)
    with Image.open(path) as picture:
        kept = picture.mode
    if kept[0] in "IF":
        with pytest.raises(FileError, match=f"mode {kept}, expected 8 bits a channel; convert it"):
            read_image(path)
    else:
        assert read_image(path).mode == "RGB"
    if mode in ("LA", "CMYK", "F"):
        with pytest.raises(FileError, match=f"mode {mode}, expected one channel of whole numbers, or colours"):
            read_numbers(path)
    else:
        shape = (12, 20, 3) if mode in ("RGB", "RGBA") else (12, 20)
        found = read_numbers(path)
        assert found.shape == shape and found.dtype.isnative
        if mode in ("L", "I", "I;16"):
            assert np.array_equal(found, np.asarray(grey))
        if mode == "1":
            assert set(np.unique(found)) == {0, 1}


def test_a_jpeg_is_no_label_whatever_it_is_called(tmp_path):
    for name in ("a.jpg", "a.png"):
        (tmp_path / name).write_bytes(stored(PICTURE.convert("L"), "jpeg"))
        with pytest.raises(FileError, match=f"{name}: is a JPEG, which changes the numbers in it; store labels"):
            read_numbers(tmp_path / name)
        assert read_image(tmp_path / name).size == (20, 12)


def _grey(values: list[int], bits: int, kind: int = 0) -> bytes:
    """A PNG of one row, greys or colours of any depth, as Pillow writes none."""
    row = int("0" + "".join(f"{value:0{bits}b}" for value in values).ljust(-(-len(values) * bits // 8) * 8, "0"), 2)
    row = b"\0" + row.to_bytes(-(-len(values) * bits // 8), "big")
    width = len(values) // (3 if kind == 2 else 1)
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, kind, 0, 0, 0)),
        (b"IDAT", zlib.compress(row)),
        (b"IEND", b""),
    )
    chunks = (struct.pack(">I", len(body)) + name + body for name, body in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk + struct.pack(">I", zlib.crc32(chunk[4:])) for chunk in chunks)


BILEVEL = Image.fromarray(np.array([[0, 1, 1, 0]], np.uint8), "P")
BILEVEL.putpalette([0, 0, 0, 255, 255, 255])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("2.png", _grey([0, 1, 2, 3], 2)),
        ("4.png", _grey([0, 15], 4)),
        ("3.pgm", b"P5 4 1 3\n" + bytes([0, 1, 2, 3])),
        ("1000.pgm", b"P5 2 1 1000\n" + bytes([0, 3, 3, 232])),
        ("white.tif", stored(PICTURE.convert("L"), "tiff", tiffinfo={262: 0})),
        ("palette.bmp", stored(BILEVEL, "bmp")),
        ("plain.pbm", b"P1\n4 2\n0 1 1 0\n1 0 0 0\n"),
        ("bits.pbm", stored(BILEVEL.convert("1"), "ppm")),
        ("white1.tif", stored(BILEVEL.convert("1"), "tiff", tiffinfo={262: 0})),
    ],
)
def test_numbers_that_decoding_changes(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError, match=f"{name}: decoding would scale or invert its numbers; store labels"):
        read_numbers(tmp_path / name)
    read_image(tmp_path / name) if name != "1000.pgm" else None


def test_numbers_in_a_pgm_and_in_pages(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 65535\n" + bytes([0, 1, 2, 3, 255, 255]))
    assert read_numbers(tmp_path / "a.pgm").tolist() == [[1, 515, 65535]]
    pages = [Image.new("L", (4, 3), page) for page in range(3)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(FileError, match=r"pages.tif: has 3 pages; store labels and instances one by one"):
        read_numbers(tmp_path / "pages.tif")
    assert read_image(tmp_path / "pages.tif").size == (4, 3)


def test_colours_of_16_bits(tmp_path):
    """Pillow keeps their upper halves, of 12-bit photographs hardly anything."""
    (tmp_path / "a.png").write_bytes(_grey([4095, 2048, 300], 16, kind=2))
    for read in (read_image, read_numbers):
        with pytest.raises(FileError, match="a.png: mode RGB of 16 bits, expected 8 bits a channel; convert it to 8"):
            read(tmp_path / "a.png")


def test_links_round_in_a_circle(tmp_path):
    for here, there in (("a", "b"), ("b", "a")):
        (tmp_path / here).mkdir()
        (tmp_path / here / "to").symlink_to(f"../{there}")
    (tmp_path / "a/1.png").touch()
    (tmp_path / "a/2.png").symlink_to("2.png")
    found = ["a/1.png", "a/2.png", "b/to/1.png", "b/to/2.png"]
    assert [path.relative_to(tmp_path).as_posix() for path in list_files(tmp_path)] == found
    assert len(find_images(str(tmp_path), tmp_path / "out")) == 4


def test_a_large_picture(tmp_path, monkeypatch):
    import agcseg.cli  # the programs allow a gigapixel

    path = tmp_path / "large.png"
    path.write_bytes(stored())
    assert Image.MAX_IMAGE_PIXELS >= 2**29 and agcseg.cli
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(FileError, match="has too many pixels .*240 pixels.*; make it smaller; from Python, PIL.Image"):
        read_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # between limit and twice that, Pillow warns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [picture.size for picture in each(read_image, [path])] == [(20, 12)]


def test_files_are_listed(tmp_path):
    (tmp_path / "pictures/sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "pictures"
    for name in ("a.png", "B.PNG", "c.JpEg", "d.gif", "e.jp2", "sub/f.tga", "g.txt", "h.heic2", ".i.png", "._a.png"):
        (folder / name).touch()
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails/j.png").touch()
    (tmp_path / "elsewhere/k.png").touch()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "sub/round").symlink_to(folder)
    (folder / "l.png").symlink_to(tmp_path / "elsewhere/k.png")
    (folder / "m.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(folder / "n.png")
    found = [path.relative_to(folder).as_posix() for path in list_files(folder) if is_picture(path)]
    assert found == ["B.PNG", "a.png", "c.JpEg", "d.gif", "e.jp2", "l.png", "linked/k.png", "m.png", "sub/f.tga"]
    said = []
    names = find_images(str(folder), tmp_path / "out", said.append)
    assert [*names] == [name.rpartition(".")[0] for name in found]
    assert said == [f"{folder}: 3 other files left out: g.txt, h.heic2, n.png"]
    assert {".png", ".jpeg", ".jfif", ".gif", ".tga", ".pgm", ".bmp", ".webp"} <= suffixes() and ".h5" not in suffixes()
    with pytest.raises(FileError, match="m.png: missing, a link to nothing"):
        read_image(folder / "m.png")


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a/picture.png").touch()
    original = os.scandir

    def scandir(path):  # the tests may run as root, who may read everything
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="b: cannot be read .Permission denied"):
        find_images(str(tmp_path), tmp_path / "out")


def test_one_line_for_one_cause(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(300)]
    errors = [FileError(path, "is bad", f"by {i}", "mend it") for i, path in enumerate(paths)]
    others = [FileError(paths[0], "missing"), UserError("something else")]
    few = [FileError(path, "is worse") for path in paths[:3]]
    lines = by_cause([*errors, *others, *few])
    assert lines == [
        f"300 files: is bad; mend it. Such as {paths[0]} (by 0), {paths[1]} (by 1), {paths[2]} (by 2)",
        f"{paths[0]}: missing",
        "something else",
        *(f"{path}: is worse" for path in paths[:3]),
    ]
    assert str(errors[7]) == f"{paths[7]}: is bad (by 7); mend it"
