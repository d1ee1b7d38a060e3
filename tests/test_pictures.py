"""Pictures and masks of every mode, size and format, by every reader."""

import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from captum_ext import zoo
from captum_ext._data.files import FORMATS
from captum_ext._data.pictures import PictureDataset
from captum_ext.cli.pictures import PictureFolder
from captum_ext.evaluation.examples import ExampleBatches
from captum_ext.gallery import gallery
from tests.datasets.one_picture import LAYOUTS, layout_with, make_cub, make_wsol

# --- modes ---------------------------------------------------------------------------------------


def read_layout(name):
    def read(image, folder):
        data = layout_with(name, folder, lambda path: image.save(path, "TIFF"))
        return np.asarray(data[0].image)

    return read


def load(image, folder):
    image.save(folder / "p.tif")
    return np.asarray(zoo.load_image(folder / "p.tif"))


def read_for_training(image, folder):
    data = PictureDataset([(image, 0)], (image.height, image.width))
    return data[0].pixels.permute(1, 2, 0).numpy()


def read_for_evaluation(image, folder):
    normalize = ((0.0,) * 3, (1.0,) * 3)
    example = ExampleBatches([(image, 0)], 1, None, normalize).example(0)
    return (255 * example.image).round().byte().permute(1, 2, 0).numpy()


def read_for_the_shell(image, folder):
    (folder / "a").mkdir()
    image.save(folder / "a/p.tif")
    return np.asarray(PictureFolder(str(folder))[0][0])


def preprocess(image, folder):
    side = image.height
    view = zoo.Preprocess(side, side, (0.0,) * 3, (1.0,) * 3).view
    columns = [image.crop((i, 0, i + 1, side)) for i in range(image.width)]
    return np.concatenate([np.asarray(view(column)) for column in columns], 1)


def draw(image, folder):
    drawn = gallery(image, {}).axes[0].images[0].get_array()
    return (255 * drawn).round().astype(np.uint8)


READERS = {
    "load_image": load,
    **{name: read_layout(name) for name in LAYOUTS},
    "training": read_for_training,
    "evaluate": read_for_evaluation,
    "shell": read_for_the_shell,
    "preprocess": preprocess,
    "gallery": draw,
}
every_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


@every_reader
@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.float32, [0, 0.5, 0.9], [0, 128, 230]),
        (np.float32, [0, 0.25, 0.5], [0, 64, 128]),  # a second frame, with the same scale
        (np.int32, [0, 1000, 65535], [0, 4, 255]),
        (np.int32, [0, 1000, 2000], [0, 4, 8]),
        (np.uint16, [0, 1000, 65535], [0, 4, 255]),
        (np.uint16, [300, 1000, 32768], [1, 4, 128]),
    ],
)
def test_deep_pictures_have_one_scale_for_all_readers(read, dtype, values, expected, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = read(Image.fromarray(np.array([values], dtype)), tmp_path)
    assert pixels.tolist() == [[[value] * 3 for value in expected]]


@pytest.mark.parametrize("read", [read for read in READERS.values() if read is not preprocess])
@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.float32, [-1, 0, 1], [0, 128, 255]),
        (np.float32, [0, 51, 255], [0, 51, 255]),
        (np.float32, [7, 7, 7], [0, 0, 0]),
        (np.int32, [-100, 0, 100], [0, 128, 255]),
        (np.int32, [0, 100_000, 2**31 - 1], [0, 0, 255]),
    ],
)
def test_values_beyond_white_are_stretched_with_a_warning(read, dtype, values, expected, tmp_path):
    image = Image.fromarray(np.array([values], dtype))
    with pytest.warns(UserWarning, match=r"stretched .* Scale floats to \[0, 1\]") as caught:
        pixels = read(image, tmp_path)
    assert len({str(warning.message) for warning in caught}) == 1
    assert pixels.tolist() == [[[value] * 3 for value in expected]]


@every_reader
def test_transparent_pixels_are_white_for_all_readers(read, tmp_path):
    values = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], np.uint8)
    pixels = read(Image.fromarray(values), tmp_path)
    assert pixels.tolist() == [[[10, 20, 30], [255] * 3, [204] * 3]]


def test_floats_that_are_not_finite_are_refused(tmp_path):
    image = Image.fromarray(np.array([[0, np.nan, 1]], np.float32))
    image.save(tmp_path / "p.tif")
    with pytest.raises(zoo.InputError, match="not finite"):
        zoo.load_image(tmp_path / "p.tif")
    with pytest.raises(ValueError, match="picture 0: the picture has values that are not finite"):
        PictureDataset([(image, 0)], (1, 3))[0]


def test_the_transparent_level_of_a_deep_png_is_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1000, 65535]], np.uint16))
    image.save(tmp_path / "p.png")
    png, chunk = (tmp_path / "p.png").read_bytes(), b"tRNS" + struct.pack(">H", 1000)
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "p.png").write_bytes(png[:33] + chunk + png[33:])  # behind the header
    assert np.asarray(zoo.load_image(tmp_path / "p.png"))[0, :, 0].tolist() == [0, 255, 255]


# --- masks ---------------------------------------------------------------------------------------


def mask_of(image, folder, format_="TIFF"):
    (folder / "masks").mkdir()
    (folder / "images").mkdir()
    image.save(folder / "masks/m.png", format_)
    Image.new("RGB", image.size).save(folder / "images/p.jpg")
    return make_wsol(folder, "p.jpg", localization=True)[0].mask[0].tolist()


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (np.uint8, [0, 1, 255]),
        (np.uint16, [0, 1, 256]),  # 65535 / 257 / 2 would round 1 to 0
        (np.int32, [0, 1, 2**31 - 1]),
        (np.float32, [0, 1e-9, 0.5]),
        (np.float32, [0, 0.5, 300]),
        (bool, [0, 1, 1]),
    ],
)
def test_every_value_above_0_counts_in_a_mask(dtype, values, tmp_path):
    image = Image.fromarray(np.array([values], dtype))
    assert mask_of(image, tmp_path) == [False, True, True]


def test_dark_colours_count_in_a_mask(tmp_path):
    colours = np.array([[[0, 0, 0], [0, 0, 1], [2, 0, 0]]], np.uint8)
    assert mask_of(Image.fromarray(colours), tmp_path) == [False, True, True]


def test_palettes_count_by_their_colours_in_a_mask(tmp_path):
    labels = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    labels.putpalette([0, 0, 0, 0, 0, 1, 128, 0, 0])
    assert mask_of(labels, tmp_path, "PNG") == [False, True, True]


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (np.uint8, [127, 128]),
        (np.uint16, [32767, 32768]),
        (np.int32, [32767, 32768]),
        (np.float32, [0.5, 0.51]),
    ],
)
def test_half_of_the_annotators_is_half_of_white(dtype, values, tmp_path):
    (tmp_path / "segmentations").mkdir()
    (tmp_path / "images").mkdir()
    Image.fromarray(np.array([values], dtype)).save(tmp_path / "segmentations/p.png", "TIFF")
    Image.new("RGB", (2, 1)).save(tmp_path / "images/p.jpg")
    mask = make_cub(tmp_path, "p.jpg", masks=True)[0].mask
    assert mask.tolist() == [[False, True]]


# --- sizes and formats ---------------------------------------------------------------------------


def write_claim(path, width=10_000, height=5_001):
    """Write a PNG that claims a size and has no pixels."""

    def chunk(content):
        ends = struct.pack(">I", len(content) - 4), struct.pack(">I", zlib.crc32(content))
        return ends[0] + content + ends[1]

    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(header) + chunk(b"IDAT"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_refuses_more_than_50_megapixels(layout, tmp_path):
    data = layout_with(layout, tmp_path, write_claim)
    with pytest.raises(OSError, match=r"p\.jpg' is larger than 50 megapixels"):
        data[0]


@pytest.mark.parametrize("folder", ["cub", "wsol"])
def test_masks_of_more_than_50_megapixels_are_refused(folder, tmp_path):
    names = {"cub": ("segmentations", "p"), "wsol": ("masks", "m")}[folder]
    (tmp_path / "images").mkdir()
    (tmp_path / names[0]).mkdir()
    Image.new("RGB", (2, 1)).save(tmp_path / "images/p.jpg")
    write_claim(tmp_path / names[0] / f"{names[1]}.png")
    options = {"cub": {"masks": True}, "wsol": {"localization": True}}[folder]
    data = LAYOUTS[folder][0](tmp_path, "p.jpg", **options)
    with pytest.raises(OSError, match=r"png' is larger than 50 megapixels"):
        data[0]


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
def test_the_usual_formats_are_read_whatever_a_file_is_called(format_, tmp_path):
    assert format_ in FORMATS
    Image.new("RGB", (4, 4), (200, 10, 10)).save(tmp_path / "p.png", format_)
    red, green, _ = np.asarray(zoo.load_image(tmp_path / "p.png"))[0, 0]
    assert red > 190
    assert green < 20


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format_", ["EPS", "TGA", "PCX", "PDF"])
def test_other_formats_are_not_decoded(layout, format_, tmp_path, monkeypatch):
    """A file may be called .jpg and be PostScript, for which Pillow would start Ghostscript."""

    def refuse(*args, **kwargs):
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", refuse)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", refuse)
    image = Image.new("RGB", (4, 4))
    data = layout_with(layout, tmp_path, lambda path: image.save(path, format_))
    with pytest.raises(OSError, match=r"p\.jpg' cannot be read as an image"):
        data[0]
