"""Layouts of folders, on small made-up trees."""

import errno
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from captum_ext._data.pictures import PictureDataset
from captum_ext._errors import ArgumentError
from captum_ext.datasets import VOC_CLASSES, ClassFolders, Cub, Example, Voc, WsolFolder
from captum_ext.fcam.views import BoxedPictures
from captum_ext.metrics import PointingGame, boxes_to_masks


def write_picture(path: Path, size=(40, 30), color=(200, 20, 20), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)


def write_grey(path: Path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)


def write_lines(path: Path, *lines: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def write_truncated_jpeg(path: Path):
    """Write a picture that opens, but does not decode."""
    noise = np.random.RandomState(0).randint(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:1500])


# --- a folder for each class ---------------------------------------------------------------------


@pytest.fixture
def photographs(tmp_path):
    root = tmp_path / "photographs"
    write_picture(root / "dog" / "2.png", (40, 30))
    write_picture(root / "dog" / "more" / "1.jpg", (10, 50))
    write_picture(root / "cat" / "9.png", (8, 6))
    write_lines(root / "cat" / "notes.txt", "not a picture")
    return root


def test_class_folders_equal_torchvisions_image_folder(photographs):
    data = ClassFolders(photographs)
    assert data.samples == ImageFolder(str(photographs)).samples
    assert data.classes == ("cat", "dog")
    assert [data.name(i) for i in range(3)] == ["cat/9.png", "dog/2.png", "dog/more/1.jpg"]
    assert [data.target(i) for i in range(3)] == [0, 1, 1]
    for i, example in enumerate(data):
        assert isinstance(example, Example)
        assert (example.name, example.target) == (data.name(i), data.target(i))
        assert example.boxes is example.mask is example.ignored is None
    assert data[-1].size == (50, 10)
    assert data[0].image.mode == "RGB"
    for outside in (3, -4):
        with pytest.raises(IndexError):
            data[outside]


def test_classes_can_be_named_in_the_classifiers_order(photographs):
    data = ClassFolders(photographs, classes=["mouse", "dog", "bird", "cat"])
    assert [data.target(i) for i in range(3)] == [3, 1, 1]
    with pytest.raises(ValueError, match=r"classes.*'dog'.*photographs"):
        ClassFolders(photographs, classes=["cat"])


def test_photographs_are_turned_upright(photographs):
    turned = Image.Exif()
    turned[0x0112] = 6
    write_picture(photographs / "cat" / "0.jpg", (20, 10), exif=turned)
    assert ClassFolders(photographs)[0].size == (20, 10)


def test_missing_and_empty_class_folders_are_named(tmp_path, photographs):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ClassFolders(tmp_path / "nowhere")
    (photographs / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        ClassFolders(photographs)


def test_pictures_that_do_not_decode_are_named_and_left_out_of_training(photographs):
    write_truncated_jpeg(photographs / "dog" / "0.jpg")
    write_lines(photographs / "dog" / "1.png", "not a picture")
    data = ClassFolders(photographs)
    for i, name in ((1, "0.jpg"), (2, "1.png")):
        with pytest.raises(OSError, match=name):
            data[i]
        with pytest.warns(UserWarning, match=name):
            assert not PictureDataset(data, (8, 8))[i].is_read
    assert PictureDataset(data, (8, 8))[0].is_read
    (photographs / "dog" / "2.png").unlink()
    with pytest.raises(OSError, match=r"2\.png"):
        data[3]


# --- CUB-200-2011 --------------------------------------------------------------------------------


@pytest.fixture
def cub(tmp_path):
    root = tmp_path / "CUB_200_2011"
    names = ["001.Black/a.jpg", "001.Black/b.jpg", "002.White/c.jpg"]
    write_lines(root / "images.txt", *(f"{i} {name}" for i, name in enumerate(names, 1)))
    write_lines(root / "image_class_labels.txt", "1 1", "2 1", "3 2")
    write_lines(root / "train_test_split.txt", "1 0", "2 1", "3 0")
    write_lines(
        root / "bounding_boxes.txt",
        *("1 0.0 2.0 10.0 20.0", "2 1.0 1.0 2.0 2.0", "3 30.5 3.0 12.0 4.25"),
    )
    write_lines(root / "classes.txt", "1 001.Black", "2 002.White")
    for name in names:
        write_picture(root / "images" / name)
        steps = np.repeat(51 * np.arange(6), 5)[:, None].repeat(40, 1)  # counts of five annotators
        write_grey((root / "segmentations" / name).with_suffix(".png"), steps)
    return root


def test_cub_reads_splits_classes_and_boxes(cub):
    data = Cub(cub)
    assert data.classes == ("001.Black", "002.White")
    assert [example.name for example in data] == ["001.Black/a.jpg", "002.White/c.jpg"]
    assert [example.target for example in data] == [0, 1]
    assert data[0].boxes.tolist() == [[0, 2, 10, 22]]
    assert data[1].boxes.tolist() == [[30, 3, 40, 8]]  # rounded outwards, and clipped at 40
    assert data[0].mask is None
    assert [example.name for example in Cub(cub, "train")] == ["001.Black/b.jpg"]
    assert len(Cub(cub, "all")) == 3
    assert data.samples[1][0] == str(cub / "images" / "002.White" / "c.jpg")


def test_cubs_masks_have_the_pixels_of_the_majority(cub):
    mask = Cub(cub, masks=True)[0].mask
    assert mask.any(1).tolist() == [False] * 15 + [True] * 15
    assert mask.all(1).tolist() == mask.any(1).tolist()
    (cub / "segmentations" / "001.Black" / "a.png").unlink()
    with pytest.raises(OSError, match=r"a\.png"):
        Cub(cub, masks=True)[0]


@pytest.mark.parametrize(
    "name",
    ["images.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt"],
)
def test_missing_files_of_cub_are_named(cub, name):
    (cub / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Cub(cub)


def test_cub_does_not_need_class_names_and_masks(cub):
    (cub / "classes.txt").unlink()
    assert Cub(cub).classes == ()
    (cub / "segmentations").rename(cub / "elsewhere")
    assert len(Cub(cub)) == 2
    with pytest.raises(FileNotFoundError, match="segmentations"):
        Cub(cub, masks=True)


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("image_class_labels.txt", ["1 1", "2 1"], "image_class_labels.txt.*3 pict.*lacks '3'"),
        ("image_class_labels.txt", ["1 1", "2 1", "3 2", "4 2"], "has '4'"),
        ("image_class_labels.txt", ["1 1", "2 1", "3 2", "3 2"], "'3' more than once"),
        ("image_class_labels.txt", ["1 1", "2 1", "3 3"], "class of 3 is 3.*from 1 to 2"),
        ("image_class_labels.txt", ["1 0", "2 1", "3 2"], "class of 1 is 0"),
        ("image_class_labels.txt", ["1 1", "2 x", "3 2"], "image_class_labels.txt.*'x'"),
        ("bounding_boxes.txt", ["1 0 0 1 1", "2 0 0 1"], "bounding_boxes.txt, line 2.*5 fields"),
        ("bounding_boxes.txt", ["1 0 0 1 1", "2 0 0 1 nan", "3 0 0 1 1"], "nan"),
        ("train_test_split.txt", ["1 1", "2 1", "3 1"], "no picture of 'test'"),
    ],
)
def test_inconsistent_files_of_cub_are_named(cub, name, lines, message):
    write_lines(cub / name, *lines)
    with pytest.raises(ValueError, match=message):
        Cub(cub)


def test_without_names_cub_has_two_hundred_classes(cub):
    (cub / "classes.txt").unlink()
    write_lines(cub / "image_class_labels.txt", "1 200", "2 1", "3 2")
    assert Cub(cub)[0].target == 199
    write_lines(cub / "image_class_labels.txt", "1 201", "2 1", "3 2")
    with pytest.raises(ValueError, match="from 1 to 200"):
        Cub(cub)


@pytest.mark.parametrize("box", ["40 0 5 5", "0 -9 5 5", "3 3 0 4"])
def test_a_box_outside_the_picture_raises_an_error(cub, box):
    write_lines(cub / "bounding_boxes.txt", f"1 {box}", "2 0 0 1 1", "3 0 0 1 1")
    with pytest.raises(ValueError, match=r"a\.jpg.*40 x 30"):
        Cub(cub)[0]


def test_an_unknown_split_is_named(cub):
    with pytest.raises(ValueError, match=r"split.*val"):
        Cub(cub, "val")


# --- Pascal VOC ----------------------------------------------------------------------------------


def voc_object(name, box, difficult="<difficult>0</difficult>", more=""):
    ends = "".join(
        f"<{end}>{value}</{end}>"
        for end, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name>{difficult}{more}<bndbox>{ends}</bndbox></object>"


def write_annotation(root, key, *objects):
    write_lines(root / "Annotations" / f"{key}.xml", "<annotation>", *objects, "</annotation>")


FLAG = "<difficult>1</difficult>"


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOC2007"
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    write_annotation(
        root,
        "000001",
        voc_object("person", (1, 1, 40, 30), more=part),
        voc_object("dog", (3, 4, 10, 12)),
        voc_object("dog", (5, 5, 5, 5), FLAG),
        voc_object("dog", (21, 11, 30, 12.5), difficult=""),
    )
    write_annotation(
        root, "000002", voc_object("cat", (2, 2, 9, 9), FLAG), voc_object("dog", (1, 1, 2, 3))
    )
    write_annotation(root, "000003", voc_object("cat", (2, 2, 9, 9), FLAG))
    write_annotation(root, "000004", voc_object("cat", (2, 2, 9, 9)))
    write_lines(root / "ImageSets" / "Main" / "test.txt", "000001", "000002", "000003")
    write_lines(root / "ImageSets" / "Main" / "val.txt", "000004", "")
    for i in range(1, 5):
        write_picture(root / "JPEGImages" / f"00000{i}.jpg")
    return root


def test_voc_gives_an_example_for_each_class_in_a_picture(voc):
    dog, person, cat = (VOC_CLASSES.index(name) for name in ("dog", "person", "cat"))
    assert len(VOC_CLASSES) == 20
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)
    data = Voc(voc)
    assert [example.name for example in data] == ["000001-dog", "000001-person", "000002-dog"]
    assert [example.target for example in data] == [dog, person, dog]
    dogs, people, other = data
    # Boxes in the file are inclusive from 1, and become half-open from 0; fractions go outwards.
    assert dogs.boxes.tolist() == [[2, 3, 10, 12], [20, 10, 30, 13]]
    assert dogs.flagged_boxes.tolist() == [[4, 4, 5, 5]]
    assert people.boxes.tolist() == [[0, 0, 40, 30]]
    assert people.flagged_boxes.shape == (0, 4)
    assert dogs.other_targets == (person,)
    assert other.other_targets == (cat,)
    assert (dogs.difficult, people.difficult, other.difficult) == (True, False, True)
    assert [example.name for example in Voc(voc, "val")] == ["000004-cat"]
    assert not Voc(voc, "val")[0].difficult  # small, but alone


def test_use_flagged_counts_flagged_objects(voc):
    data = Voc(voc, use_flagged=True)
    assert [example.name for example in data][2:] == ["000002-cat", "000002-dog", "000003-cat"]
    assert data[0].boxes.tolist() == [[2, 3, 10, 12], [4, 4, 5, 5], [20, 10, 30, 13]]
    assert data[0].flagged_boxes.tolist() == [[4, 4, 5, 5]]
    assert [example.difficult for example in data] == [True, False, True, True, False]


def test_the_pointing_game_on_voc_by_hand(voc):
    """The examples are a difficult hit, an easy hit and a difficult miss."""
    examples = list(Voc(voc))
    maps = torch.zeros(3, 30, 40)
    maps[0, 5, 5] = maps[1, 29, 39] = maps[2, 20, 30] = 1
    masks = boxes_to_masks([example.boxes for example in examples], (30, 40))
    for average, shares in (("micro", (2 / 3, 1 / 2)), ("macro", (3 / 4, 1 / 2))):
        game = PointingGame(num_classes=20, average=average)
        target = torch.tensor([example.target for example in examples])
        game.update(maps, masks, target, torch.tensor([example.difficult for example in examples]))
        means = game.compute()
        assert (means["all"].item(), means["difficult"].item()) == pytest.approx(shares)


@pytest.mark.parametrize(
    ("path", "content", "error", "message"),
    [
        ("ImageSets/Main/test.txt", None, FileNotFoundError, "test.txt"),
        ("Annotations/000002.xml", None, FileNotFoundError, "000002.xml"),
        ("Annotations/000002.xml", "<annotation>", ValueError, "000002.xml"),
        (
            "Annotations/000002.xml",
            f"<annotation>{voc_object('unicorn', (1, 1, 2, 2))}</annotation>",
            ValueError,
            "000002.xml.*'unicorn'.*classes",
        ),
        (
            "Annotations/000002.xml",
            f"<annotation>{voc_object('dog', ('', 1, 2, 2))}</annotation>",
            ValueError,
            "000002.xml",
        ),
        ("ImageSets/Main/test.txt", "000001 -1", ValueError, "test.txt, line 1"),
        ("ImageSets/Main/test.txt", "000001\n000001", ValueError, "more than once"),
        ("ImageSets/Main/test.txt", "000003", ValueError, "no object"),
    ],
)
def test_missing_and_invalid_files_of_voc_are_named(voc, path, content, error, message):
    if content is None:
        (voc / path).unlink()
    else:
        write_lines(voc / path, content)
    with pytest.raises(error, match=message):
        Voc(voc)


def test_voc_may_have_other_classes(voc):
    data = Voc(voc, classes=("person", "cat", "dog"))
    assert [example.target for example in data] == [0, 2, 2]


# --- wsolevaluation ------------------------------------------------------------------------------


@pytest.fixture
def wsol(tmp_path):
    """The folders of the text files and of the pictures, with boxes."""
    meta, images = tmp_path / "metadata", tmp_path / "dataset"
    write_lines(meta / "test" / "image_ids.txt", "val/a.jpg", "val/b,1.jpg")
    write_lines(meta / "test" / "class_labels.txt", "val/b,1.jpg,7", "val/a.jpg,0")
    write_lines(meta / "test" / "image_sizes.txt", "val/a.jpg,40,30", "val/b,1.jpg,80,90")
    write_lines(
        meta / "test" / "localization.txt",
        *("val/a.jpg,1,2,11,12", "val/b,1.jpg,1,3,7,9", "val/a.jpg,30,20,41,30"),
    )
    for name in ("val/a.jpg", "val/b,1.jpg"):
        write_picture(images / name)
    return meta, images


def test_wsol_scales_boxes_to_the_stored_picture(wsol):
    data = WsolFolder(*wsol)
    assert [example.name for example in data] == ["val/a.jpg", "val/b,1.jpg"]
    assert [example.target for example in data] == [0, 7]
    assert data[0].boxes.tolist() == [[1, 2, 11, 12], [30, 20, 40, 30]]
    # A picture of 80 x 90 is stored as 40 x 30: boxes are scaled by 1/2 and 1/3, outwards.
    assert data[1].boxes.tolist() == [[0, 1, 4, 3]]
    assert data[0].mask is data[0].ignored is None
    assert pickle.loads(pickle.dumps(data))[1].boxes.tolist() == data[1].boxes.tolist()


def test_scaled_boxes_are_not_widened_by_rounding(wsol):
    """In floats, 87 * (40 / 116) is a little above 30, and 77 * (40 / 154) a little below 20."""
    meta, images = wsol
    write_lines(meta / "test" / "image_sizes.txt", "val/a.jpg,116,30", "val/b,1.jpg,154,30")
    write_lines(
        meta / "test" / "localization.txt", "val/a.jpg,0,0,87,30", "val/b,1.jpg,77,0,154,30"
    )
    a, b = WsolFolder(meta, images)
    assert a.boxes.tolist() == [[0, 0, 30, 30]]
    assert b.boxes.tolist() == [[20, 0, 40, 30]]


def test_wsol_without_localization_has_labels_only(wsol):
    meta, images = wsol
    for name in ("localization.txt", "image_sizes.txt"):
        (meta / "test" / name).unlink()
    data = WsolFolder(meta, images, localization=False)
    assert data[0].boxes is data[0].mask is None
    assert data[1].target == 7


@pytest.fixture
def open_images(tmp_path):
    """The folders of a set with masks; those of "a" are half as large as the picture."""
    meta, images, masks = (tmp_path / name for name in ("metadata", "images", "masks"))
    write_lines(meta / "val" / "image_ids.txt", "a.jpg", "b.jpg")
    write_lines(meta / "val" / "class_labels.txt", "a.jpg,1", "b.jpg,2")
    write_lines(
        meta / "val" / "localization.txt",
        *("a.jpg,m/1.png,m/i.png", "a.jpg,m/2.png,m/i.png", "b.jpg,m/3.png,"),
    )
    boxes = {"1": (1, 0, 0, 5, 5), "2": (255, 15, 10, 20, 15), "i": (255, 0, 0, 20, 5)}
    for name, (value, x1, y1, x2, y2) in boxes.items():
        values = np.zeros((15, 20))
        values[y1:y2, x1:x2] = value  # any value but 0 counts
        write_grey(masks / "m" / f"{name}.png", values)
    write_grey(masks / "m" / "3.png", np.full((30, 40), 255))
    for name in ("a.jpg", "b.jpg"):
        write_picture(images / name)
    return meta, images, masks


def test_wsol_reads_masks_and_ignored_pixels(open_images):
    meta, images, masks = open_images
    a, b = WsolFolder(meta, images, "val", masks=masks)
    mask, ignored = torch.zeros(2, 30, 40, dtype=torch.bool)
    mask[:10, :10] = mask[20:, 30:] = True
    ignored[:10, 10:] = True
    assert torch.equal(a.mask, mask)
    assert torch.equal(a.ignored, ignored)
    assert b.mask.all()
    assert b.ignored is None
    assert a.boxes is b.boxes is None
    with pytest.raises(OSError, match=r"1\.png"):
        WsolFolder(meta, images, "val")[0]


@pytest.mark.parametrize(
    "name", ["image_ids.txt", "class_labels.txt", "image_sizes.txt", "localization.txt"]
)
def test_missing_files_of_wsol_are_named(wsol, name):
    (wsol[0] / "test" / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        WsolFolder(*wsol)


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("image_ids.txt", [], "no picture"),
        ("image_ids.txt", ["val/a.jpg", "val/a.jpg"], "more than once"),
        ("class_labels.txt", ["val/a.jpg,0"], r"class_labels.txt.*2 pict.*lacks 'val/b,1\.jpg'"),
        ("class_labels.txt", ["val/a.jpg,0", "val/b,1.jpg,8"], "is 8.*from 0 to 7"),
        ("class_labels.txt", ["val/a.jpg,-1", "val/b,1.jpg,1"], "is -1"),
        ("class_labels.txt", ["val/a.jpg"], "class_labels.txt, line 1"),
        ("image_sizes.txt", ["val/a.jpg,0,30", "val/b,1.jpg,80,90"], "image_sizes.txt.*'0'"),
        ("localization.txt", ["val/a.jpg,1,2,11,12"], "localization.txt.*lacks"),
        ("localization.txt", ["val/a.jpg,1,2,11,12", "val/b,1.jpg,1,inf,3,4"], "inf"),
        ("localization.txt", ["val/a.jpg,1,2,11,12", "val/b,1.jpg,1,x,3,4"], "'x'"),
    ],
)
def test_inconsistent_files_of_wsol_are_named(wsol, name, lines, message):
    write_lines(wsol[0] / "test" / name, *lines)
    with pytest.raises(ValueError, match=message):
        WsolFolder(*wsol, n_classes=8)


# --- all layouts ---------------------------------------------------------------------------------


def test_layouts_show_their_options(cub, wsol, voc, photographs):
    assert repr(Cub(cub, masks=True)) == f"Cub('{cub}', masks=True)"
    assert repr(Voc(voc, "val")) == f"Voc('{voc}', split='val')"
    meta, images = map(str, wsol)
    assert repr(WsolFolder(meta, images)) == f"WsolFolder('{meta}', images='{images}')"
    assert repr(ClassFolders(photographs)) == f"ClassFolders('{photographs}')"


def test_errors_about_classes_carry_the_name_of_the_argument(voc, photographs):
    for make in (lambda: Voc(voc, classes=["cat"]), lambda: ClassFolders(photographs, ["cat"])):
        with pytest.raises(ArgumentError) as raised:
            make()
        assert raised.value.argument == "classes"


def test_training_accepts_all_layouts(cub, wsol, voc):
    for data in (Cub(cub), Voc(voc), WsolFolder(*wsol)):
        pixels, boxes = BoxedPictures(data, (30, 40))[0]
        assert pixels.shape == (3, 30, 40)
        assert boxes.tolist() == data[0].boxes.tolist()
        pictures = PictureDataset(data, (30, 40))
        assert pictures[1].label == data.target(1)
        assert pictures.name(1) == data.samples[1][0]
        assert pictures.fingerprint() == PictureDataset(data, (30, 40)).fingerprint()


def test_pictures_that_do_not_decode_are_named_and_other_errors_are_raised(cub, monkeypatch):
    write_truncated_jpeg(cub / "images" / "001.Black" / "a.jpg")
    data = Cub(cub)
    with pytest.raises(OSError, match=r"a\.jpg"):
        data[0]
    assert data[1].target == 1
    assert data.name(0) == "001.Black/a.jpg"
    (cub / "images" / "001.Black" / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.jpg"):
        data[0]

    def fail_to_open(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    # An error of the machine is not one of the picture: training must not leave the picture out.
    monkeypatch.setattr(Image, "open", fail_to_open)
    with pytest.raises(OSError, match=r"c\.jpg") as raised:
        data[1]
    assert raised.value.errno == errno.EMFILE
    with pytest.raises(OSError, match="Too many"):
        PictureDataset(data, (8, 8))[1]


def test_class_folders_raise_errors_of_the_machine(photographs, monkeypatch):
    def fail_to_open(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", fail_to_open)
    with pytest.raises(OSError, match="Too many") as raised:
        ClassFolders(photographs)[0]
    assert raised.value.errno == errno.EMFILE
