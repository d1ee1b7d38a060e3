"""Folder layouts, on small trees made up here."""

import errno
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from captum_ext._data.pictures import PictureDataset
from captum_ext.datasets import VOC_CLASSES, ClassFolders, Cub, Example, Voc, WsolFolder
from captum_ext.fcam.views import BoxedPictures
from captum_ext.metrics import PointingGame, boxes_to_masks


def picture(path: Path, size=(40, 30), color=(200, 20, 20), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)


def grey(path: Path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)


def text(path: Path, *lines: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def cut_short(path: Path):
    """A picture that opens and does not decode."""
    noise = np.random.RandomState(0).randint(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:1500])


# --- a folder for each class ---------------------------------------------------------------------


@pytest.fixture
def photographs(tmp_path):
    root = tmp_path / "photographs"
    picture(root / "dog" / "2.png", (40, 30))
    picture(root / "dog" / "more" / "1.jpg", (10, 50))
    picture(root / "cat" / "9.png", (8, 6))
    text(root / "cat" / "notes.txt", "no picture")
    return root


def test_class_folders_are_those_of_torchvision(photographs):
    data = ClassFolders(photographs)
    assert data.samples == ImageFolder(str(photographs)).samples
    assert data.classes == ("cat", "dog")
    assert [data.name(i) for i in range(3)] == ["cat/9.png", "dog/2.png", "dog/more/1.jpg"]
    assert [data.target(i) for i in range(3)] == [0, 1, 1]
    for i, one in enumerate(data):
        assert isinstance(one, Example)
        assert (one.name, one.target) == (data.name(i), data.target(i))
        assert one.boxes is one.mask is one.ignored is None
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
    picture(photographs / "cat" / "0.jpg", (20, 10), exif=turned)
    assert ClassFolders(photographs)[0].size == (20, 10)


def test_what_class_folders_lack(tmp_path, photographs):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ClassFolders(tmp_path / "nowhere")
    (photographs / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        ClassFolders(photographs)


def test_pictures_that_do_not_decode_are_named_and_left_out_of_training(photographs):
    cut_short(photographs / "dog" / "0.jpg")
    text(photographs / "dog" / "1.png", "not a picture")
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
    text(root / "images.txt", *(f"{i} {name}" for i, name in enumerate(names, 1)))
    text(root / "image_class_labels.txt", "1 1", "2 1", "3 2")
    text(root / "train_test_split.txt", "1 0", "2 1", "3 0")
    text(
        root / "bounding_boxes.txt",
        *("1 0.0 2.0 10.0 20.0", "2 1.0 1.0 2.0 2.0", "3 30.5 3.0 12.0 4.25"),
    )
    text(root / "classes.txt", "1 001.Black", "2 002.White")
    for name in names:
        picture(root / "images" / name)
        steps = np.repeat(51 * np.arange(6), 5)[:, None].repeat(40, 1)  # of five annotators
        grey((root / "segmentations" / name).with_suffix(".png"), steps)
    return root


def test_cub(cub):
    data = Cub(cub)
    assert data.classes == ("001.Black", "002.White")
    assert [one.name for one in data] == ["001.Black/a.jpg", "002.White/c.jpg"]
    assert [one.target for one in data] == [0, 1]
    assert data[0].boxes.tolist() == [[0, 2, 10, 22]]
    assert data[1].boxes.tolist() == [[30, 3, 40, 8]]  # outwards, and cut off at 40
    assert data[0].mask is None
    assert [one.name for one in Cub(cub, "train")] == ["001.Black/b.jpg"]
    assert len(Cub(cub, "all")) == 3
    assert data.samples[1][0] == str(cub / "images" / "002.White" / "c.jpg")


def test_cubs_masks_are_of_the_majority(cub):
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
def test_files_that_cub_lacks_are_named(cub, name):
    (cub / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Cub(cub)


def test_cub_without_what_is_not_needed(cub):
    (cub / "classes.txt").unlink()
    assert Cub(cub).classes == ()
    (cub / "segmentations").rename(cub / "elsewhere")
    assert len(Cub(cub)) == 2
    with pytest.raises(FileNotFoundError, match="segmentations"):
        Cub(cub, masks=True)


@pytest.mark.parametrize(
    ("name", "lines", "said"),
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
def test_cubs_files_that_do_not_fit_together(cub, name, lines, said):
    text(cub / name, *lines)
    with pytest.raises(ValueError, match=said):
        Cub(cub)


def test_without_names_cub_has_two_hundred_classes(cub):
    (cub / "classes.txt").unlink()
    text(cub / "image_class_labels.txt", "1 200", "2 1", "3 2")
    assert Cub(cub)[0].target == 199
    text(cub / "image_class_labels.txt", "1 201", "2 1", "3 2")
    with pytest.raises(ValueError, match="from 1 to 200"):
        Cub(cub)


@pytest.mark.parametrize("box", ["40 0 5 5", "0 -9 5 5", "3 3 0 4"])
def test_a_box_outside_the_picture(cub, box):
    text(cub / "bounding_boxes.txt", f"1 {box}", "2 0 0 1 1", "3 0 0 1 1")
    with pytest.raises(ValueError, match=r"a\.jpg.*40 x 30"):
        Cub(cub)[0]


def test_an_unknown_split(cub):
    with pytest.raises(ValueError, match=r"split.*val"):
        Cub(cub, "val")


# --- Pascal VOC ----------------------------------------------------------------------------------


def voc_object(name, box, difficult="<difficult>0</difficult>", more=""):
    ends = "".join(
        f"<{end}>{value}</{end}>"
        for end, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name>{difficult}{more}<bndbox>{ends}</bndbox></object>"


def annotation(root, key, *objects):
    text(root / "Annotations" / f"{key}.xml", "<annotation>", *objects, "</annotation>")


FLAG = "<difficult>1</difficult>"


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOC2007"
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    annotation(
        root,
        "000001",
        voc_object("person", (1, 1, 40, 30), more=part),
        voc_object("dog", (3, 4, 10, 12)),
        voc_object("dog", (5, 5, 5, 5), FLAG),
        voc_object("dog", (21, 11, 30, 12.5), difficult=""),
    )
    annotation(
        root, "000002", voc_object("cat", (2, 2, 9, 9), FLAG), voc_object("dog", (1, 1, 2, 3))
    )
    annotation(root, "000003", voc_object("cat", (2, 2, 9, 9), FLAG))
    annotation(root, "000004", voc_object("cat", (2, 2, 9, 9)))
    text(root / "ImageSets" / "Main" / "test.txt", "000001", "000002", "000003")
    text(root / "ImageSets" / "Main" / "val.txt", "000004", "")
    for i in range(1, 5):
        picture(root / "JPEGImages" / f"00000{i}.jpg")
    return root


def test_voc_gives_an_example_for_each_class_in_a_picture(voc):
    dog, person, cat = (VOC_CLASSES.index(name) for name in ("dog", "person", "cat"))
    assert len(VOC_CLASSES) == 20
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)
    data = Voc(voc)
    assert [one.name for one in data] == ["000001-dog", "000001-person", "000002-dog"]
    assert [one.target for one in data] == [dog, person, dog]
    dogs, people, other = data
    # From 1 and inclusive to from 0 and half-open; fractions outwards.
    assert dogs.boxes.tolist() == [[2, 3, 10, 12], [20, 10, 30, 13]]
    assert dogs.flagged_boxes.tolist() == [[4, 4, 5, 5]]
    assert people.boxes.tolist() == [[0, 0, 40, 30]]
    assert people.flagged_boxes.shape == (0, 4)
    assert dogs.other_targets == (person,)
    assert other.other_targets == (cat,)
    assert (dogs.difficult, people.difficult, other.difficult) == (True, False, True)
    assert [one.name for one in Voc(voc, "val")] == ["000004-cat"]
    assert not Voc(voc, "val")[0].difficult  # small, and alone


def test_flagged_objects_count_if_asked_for(voc):
    data = Voc(voc, use_flagged=True)
    assert [one.name for one in data][2:] == ["000002-cat", "000002-dog", "000003-cat"]
    assert data[0].boxes.tolist() == [[2, 3, 10, 12], [4, 4, 5, 5], [20, 10, 30, 13]]
    assert data[0].flagged_boxes.tolist() == [[4, 4, 5, 5]]
    assert [one.difficult for one in data] == [True, False, True, True, False]


def test_the_pointing_games_sets_of_voc_by_hand(voc):
    """Hit and difficult are dog, person and the other dog: (1, 1), (1, 0), (0, 1)."""
    examples = list(Voc(voc))
    maps = torch.zeros(3, 30, 40)
    maps[0, 5, 5] = maps[1, 29, 39] = maps[2, 20, 30] = 1
    masks = boxes_to_masks([one.boxes for one in examples], (30, 40))
    for average, shares in (("micro", (2 / 3, 1 / 2)), ("macro", (3 / 4, 1 / 2))):
        game = PointingGame(num_classes=20, average=average)
        target = torch.tensor([one.target for one in examples])
        game.update(maps, masks, target, torch.tensor([one.difficult for one in examples]))
        found = game.compute()
        assert (found["all"].item(), found["difficult"].item()) == pytest.approx(shares)


@pytest.mark.parametrize(
    ("path", "content", "error", "said"),
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
def test_what_voc_lacks(voc, path, content, error, said):
    if content is None:
        (voc / path).unlink()
    else:
        text(voc / path, content)
    with pytest.raises(error, match=said):
        Voc(voc)


def test_voc_with_other_classes(voc):
    data = Voc(voc, classes=("person", "cat", "dog"))
    assert [one.target for one in data] == [0, 2, 2]


# --- wsolevaluation ------------------------------------------------------------------------------


@pytest.fixture
def wsol(tmp_path):
    """With boxes: the text files and the pictures."""
    meta, images = tmp_path / "metadata", tmp_path / "dataset"
    text(meta / "test" / "image_ids.txt", "val/a.jpg", "val/b,1.jpg")
    text(meta / "test" / "class_labels.txt", "val/b,1.jpg,7", "val/a.jpg,0")
    text(meta / "test" / "image_sizes.txt", "val/a.jpg,40,30", "val/b,1.jpg,80,90")
    text(
        meta / "test" / "localization.txt",
        *("val/a.jpg,1,2,11,12", "val/b,1.jpg,1,3,7,9", "val/a.jpg,30,20,41,30"),
    )
    for name in ("val/a.jpg", "val/b,1.jpg"):
        picture(images / name)
    return meta, images


def test_wsol_boxes(wsol):
    data = WsolFolder(*wsol)
    assert [one.name for one in data] == ["val/a.jpg", "val/b,1.jpg"]
    assert [one.target for one in data] == [0, 7]
    assert data[0].boxes.tolist() == [[1, 2, 11, 12], [30, 20, 40, 30]]
    # Of a picture of 80 x 90 that is stored as 40 x 30: halves and thirds, outwards.
    assert data[1].boxes.tolist() == [[0, 1, 4, 3]]
    assert data[0].mask is data[0].ignored is None
    assert pickle.loads(pickle.dumps(data))[1].boxes.tolist() == data[1].boxes.tolist()


def test_scaled_boxes_are_not_widened_by_rounding(wsol):
    """87 * (40 / 116) is 30 and a little, 77 * (40 / 154) is 20 less a little."""
    meta, images = wsol
    text(meta / "test" / "image_sizes.txt", "val/a.jpg,116,30", "val/b,1.jpg,154,30")
    text(meta / "test" / "localization.txt", "val/a.jpg,0,0,87,30", "val/b,1.jpg,77,0,154,30")
    a, b = WsolFolder(meta, images)
    assert a.boxes.tolist() == [[0, 0, 30, 30]]
    assert b.boxes.tolist() == [[20, 0, 40, 30]]


def test_wsol_labels_alone(wsol):
    meta, images = wsol
    for name in ("localization.txt", "image_sizes.txt"):
        (meta / "test" / name).unlink()
    data = WsolFolder(meta, images, localization=False)
    assert data[0].boxes is data[0].mask is None
    assert data[1].target == 7


@pytest.fixture
def open_images(tmp_path):
    """With masks and pixels to ignore; the masks of "a" are half as large as the picture."""
    meta, images, masks = (tmp_path / name for name in ("metadata", "images", "masks"))
    text(meta / "val" / "image_ids.txt", "a.jpg", "b.jpg")
    text(meta / "val" / "class_labels.txt", "a.jpg,1", "b.jpg,2")
    text(
        meta / "val" / "localization.txt",
        *("a.jpg,m/1.png,m/i.png", "a.jpg,m/2.png,m/i.png", "b.jpg,m/3.png,"),
    )
    boxes = {"1": (1, 0, 0, 5, 5), "2": (255, 15, 10, 20, 15), "i": (255, 0, 0, 20, 5)}
    for name, (value, x1, y1, x2, y2) in boxes.items():
        values = np.zeros((15, 20))
        values[y1:y2, x1:x2] = value  # what is not 0 counts
        grey(masks / "m" / f"{name}.png", values)
    grey(masks / "m" / "3.png", np.full((30, 40), 255))
    for name in ("a.jpg", "b.jpg"):
        picture(images / name)
    return meta, images, masks


def test_wsol_masks_and_what_is_ignored(open_images):
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
def test_files_that_wsol_lacks_are_named(wsol, name):
    (wsol[0] / "test" / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        WsolFolder(*wsol)


@pytest.mark.parametrize(
    ("name", "lines", "said"),
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
def test_wsol_files_that_do_not_fit_together(wsol, name, lines, said):
    text(wsol[0] / "test" / name, *lines)
    with pytest.raises(ValueError, match=said):
        WsolFolder(*wsol, n_classes=8)


# --- all of them ---------------------------------------------------------------------------------


def test_training_takes_folders(cub, wsol, voc):
    for data in (Cub(cub), Voc(voc), WsolFolder(*wsol)):
        pixels, boxes = BoxedPictures(data, (30, 40))[0]
        assert pixels.shape == (3, 30, 40)
        assert boxes.tolist() == data[0].boxes.tolist()
        pictures = PictureDataset(data, (30, 40))
        assert pictures[1].label == data.target(1)
        assert pictures.name(1) == data.samples[1][0]
        assert pictures.fingerprint() == PictureDataset(data, (30, 40)).fingerprint()


def test_pictures_of_layouts_that_do_not_decode_are_named(cub, monkeypatch):
    cut_short(cub / "images" / "001.Black" / "a.jpg")
    data = Cub(cub)
    with pytest.raises(OSError, match=r"a\.jpg"):
        data[0]
    assert data[1].target == 1
    assert data.name(0) == "001.Black/a.jpg"
    (cub / "images" / "001.Black" / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.jpg"):
        data[0]

    def too_many(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    # The machine's fault is told from the picture's: training must not leave it out.
    monkeypatch.setattr(Image, "open", too_many)
    with pytest.raises(OSError, match=r"c\.jpg") as raised:
        data[1]
    assert raised.value.errno == errno.EMFILE
    with pytest.raises(OSError, match="Too many"):
        PictureDataset(data, (8, 8))[1]


def test_class_folders_tell_the_machines_fault(photographs, monkeypatch):
    def too_many(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", too_many)
    with pytest.raises(OSError, match="Too many") as raised:
        ClassFolders(photographs)[0]
    assert raised.value.errno == errno.EMFILE
