"""`captum-ext evaluate` on data sets with boxes and masks: layouts, labels, errors."""

import json
from pathlib import Path

import pytest
import torch
import torchvision.models
from captum.attr import LayerGradCam

from captum_ext import evaluation, zoo
from captum_ext.cli import layouts
from captum_ext.datasets import Cub, TexturedEllipses, Voc, WsolFolder
from captum_ext.evaluation import summary
from tests.datasets import test_folders
from tests.evaluation.subjects import exported, forget
from tests.test_cli_evaluate import run

torch.set_num_threads(1)

# The small trees of the layouts' own tests.
cub, voc, wsol = test_folders.cub, test_folders.voc, test_folders.wsol
open_images, photographs = test_folders.open_images, test_folders.photographs
text = test_folders.write_lines

LOCALIZATION = ["pointing_game", "energy", "max_box_acc", "max_box_acc_v2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A function that writes the weights of a small network of n classes."""
    folder = tmp_path_factory.mktemp("weights")

    def made(n):
        path = folder / f"{n}.pt"
        if not path.is_file():
            torch.manual_seed(0)
            torch.save(torchvision.models.squeezenet1_1(num_classes=n).state_dict(), path)
        return path

    return made


@pytest.fixture
def evaluated(weights, tmp_path, monkeypatch, capsys):
    """A function that runs `evaluate` with a network of n classes: exit code, stderr."""
    monkeypatch.chdir(tmp_path)
    flags = ("--model", "squeezenet1_1", "--layer", "features.5", "--size", 40, "--device", "cpu")
    flags += ("--method", "grad-cam")

    def of(n, *more):
        code = run("evaluate", "--output", "run", *more, *flags, "--weights", weights(n))
        return code, capsys.readouterr().err

    return of


def straight(weights, n, data, metrics):
    """The library's own evaluation."""
    loaded = zoo.load_model("squeezenet1_1", weights(n))
    cam = LayerGradCam(loaded.module, loaded.module.features[5])
    methods = {"grad-cam": (cam, {"relu_attributions": True})}
    options = {"size": 40, "show_progress": False, "output": "straight"}
    return evaluation.evaluate(methods, data, metrics, **options)


# --- results -------------------------------------------------------------------------------------


def test_cub_is_measured_by_boxes_and_masks_and_by_the_model(cub, evaluated, weights):
    code, err = evaluated(2, cub)
    assert (code, err) == (0, f"captum-ext: note: {str(cub)!r} has the files of --layout cub\n")
    metrics = ["localization", "insertion", "deletion"]
    result, library = summary("run"), straight(weights, 2, Cub(cub, masks=True), metrics)
    assert result.figures == library.figures
    assert list(result.higher_is_better) == list(library.higher_is_better)
    assert result.higher_is_better.keys() > {*LOCALIZATION, "pxap", "insertion", "deletion"}
    assert result.images == {"grad-cam": 2}
    assert Path("run/rows.csv").read_bytes() == Path("straight/rows.csv").read_bytes()


def test_cub_without_segmentations_has_no_pxap(cub, evaluated):
    (cub / "segmentations").rename(cub / "elsewhere")
    assert evaluated(2, cub, "--split", "all", "--metrics", "localization")[0] == 0
    assert list(summary("run").higher_is_better) == LOCALIZATION
    assert summary("run").images == {"grad-cam": 3}


def test_voc_is_measured_by_class_and_picture(voc, evaluated, weights):
    assert evaluated(20, voc, "--layout", "voc", "--metrics", "localization") == (0, "")
    result, library = summary("run"), straight(weights, 20, Voc(voc), "localization")
    assert result.figures == library.figures
    assert result.images == {"grad-cam": 3}


def test_vocs_flagged_objects_and_splits(voc, evaluated):
    assert evaluated(20, voc, "--flagged", "--metrics", "energy")[0] == 0
    assert summary("run").images == {"grad-cam": 5}
    assert evaluated(20, voc, "--split", "val", "--metrics", "energy", "--output", "val")[0] == 0
    assert summary("val").images == {"grad-cam": 1}


def test_voc_for_a_model_with_classes_in_another_order(voc, evaluated):
    text(Path("names.txt"), "person", "cat", "", "dog")
    names = ("--class-names", "names.txt", "--metrics", "energy")
    assert evaluated(3, voc, *names)[0] == 0
    lines = Path("run/rows.csv").read_text().splitlines()[1:]
    assert [line.split(",")[1:4:2] for line in lines] == [
        ["000001-person", "0"],
        ["000001-dog", "2"],
        ["000002-dog", "2"],
    ]


def test_wsol_with_boxes(wsol, evaluated, weights):
    meta, images = wsol
    code, err = evaluated(8, meta, "--images", images, "--metrics", "localization")
    assert (code, err) == (
        0,
        f"captum-ext: note: {str(meta)!r} has the files of --layout wsol\n",
    )
    library = straight(weights, 8, WsolFolder(meta, images), "localization")
    assert summary("run").figures == library.figures


def test_wsol_with_masks(open_images, evaluated):
    meta, images, masks = open_images
    where = ("--images", images, "--masks", masks, "--split", "val")
    code, err = evaluated(4, meta, *where, "--metrics", "localization")
    assert code == 0
    assert "has labels up to 2, and squeezenet1_1 4 classes: label i is taken for class i" in err
    assert "pxap" in summary("run").higher_is_better


def test_wsol_without_localization_is_measured_by_the_model(wsol, evaluated):
    meta, images = wsol
    (meta / "test" / "localization.txt").unlink()
    assert evaluated(8, meta, "--images", images)[0] == 0
    assert list(summary("run").higher_is_better) == ["insertion", "deletion"]


def test_some_classes_of_a_larger_model(photographs, evaluated):
    text(Path("names.txt"), "mouse", "dog", "bird", "cat")
    names = ("--class-names", "names.txt", "--metrics", "average_drop")
    assert evaluated(4, photographs, *names) == (0, "")
    lines = Path("run/rows.csv").read_text().splitlines()[1:]
    assert [line.split(",")[1:4:2] for line in lines] == [
        ["cat/9.png", "3"],
        ["dog/2.png", "1"],
        ["dog/more/1.jpg", "1"],
    ]


def test_drawn_pictures(evaluated, weights):
    drawn = ("--layout", "textured-ellipses", "--pictures", 3, "--seed", 5)
    assert evaluated(4, *drawn, "--metrics", "localization") == (0, "")
    data = TexturedEllipses(3, seed=5)
    assert summary("run").figures == straight(weights, 4, data, "localization").figures


def test_a_stopped_run_ends_with_the_same_rows(cub, evaluated):
    (cub / "segmentations").rename(cub / "elsewhere")
    command = (2, cub, "--split", "all", "--batch-size", 1, "--metrics", "localization")
    assert evaluated(*command)[0] == 0
    before = exported(Path("run"))
    assert forget(Path("run"), "number > 0") == 2
    assert evaluated(*command)[0] == 0
    assert exported(Path("run")) == before


def test_a_missing_picture_is_a_failed_row(cub, evaluated):
    (cub / "images" / "001.Black" / "a.jpg").unlink()
    code, err = evaluated(2, cub, "--metrics", "energy")
    assert code == 1
    assert "1 of 2 rows failed" in err
    assert "a.jpg" in summary("run").reasons["grad-cam"]


# --- errors that the user can correct -------------------------------------------------------------


def refused(evaluated, message, n, *more):
    code, error = evaluated(n, *more)
    assert code == 2
    assert error.count("\n") == 1, error
    assert error.startswith("captum-ext: error: ")
    assert message in error
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("n", "message"),
    [
        (3, "has 2 classes, and squeezenet1_1 has 3 classes: give --weights of a classifier"),
        (1000, "has 2 classes, and squeezenet1_1 has 1000 classes"),
    ],
)
def test_cubs_classes_must_be_the_models(n, message, cub, evaluated):
    refused(evaluated, message, n, cub, "--layout", "cub")


def test_the_predicted_class_needs_no_labels(cub, evaluated):
    predicted = ("--layout", "cub", "--target", "predicted", "--metrics", "energy")
    code, err = evaluated(5, cub, *predicted)
    assert code == 0
    assert "has 2 classes, and squeezenet1_1 5 classes: the predicted ones are explained" in err


def test_vocs_classes_must_be_twenty(voc, evaluated):
    refused(evaluated, "has 20 classes, and squeezenet1_1 has 21 classes", 21, voc)


def test_wsols_labels_must_be_classes_of_the_model(wsol, evaluated):
    message = "has labels up to 7, and squeezenet1_1 has 7 classes"
    refused(evaluated, message, 7, wsol[0], "--images", wsol[1])


def test_class_names_must_be_the_models(photographs, evaluated):
    text(Path("names.txt"), "cat", "dog", "mouse")
    refused(evaluated, "has 3 classes, and sq", 2, photographs, "--class-names", "names.txt")
    refused(evaluated, "has 3 classes, and sq", 4, photographs, "--class-names", "names.txt")
    refused(evaluated, "there is no such file", 4, photographs, "--class-names", "nam.txt")
    text(Path("names.txt"), "cat")
    message = "--class-names lacks 'dog'"
    refused(evaluated, message, 2, photographs, "--class-names", "names.txt")
    text(Path("names.txt"), "cat", "cat")
    message = "must have a name on each line, each once"
    refused(evaluated, message, 2, photographs, "--class-names", "names.txt")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--split", "val"), "--split must be one of ['test', 'train', 'all'], got 'val'"),
        (("--images", "x"), "--images is for --layout wsol, not for cub"),
        (("--flagged",), "--flagged is for --layout voc, not for cub"),
        (
            ("--class-names", "x"),
            "--class-names is for --layout classes or voc or coco, not for cub",
        ),
        (("--pictures", "3"), "--pictures is for --layout pasted-scenes or"),
        (("--layout", "voc"), "test.txt is missing: the layout is voc and the split 'test'"),
        (("--layout", "wsol"), "--layout wsol needs the folder of the pictures: give --images"),
        (("--layout", "imagenet"), "--layout"),
        (("--layout", "pasted-scenes"), "is drawn: leave out DATA"),
    ],
)
def test_options_of_other_layouts_are_refused(flags, message, cub, evaluated):
    refused(evaluated, message, 2, cub, *flags)


def test_files_that_contradict_each_other_are_refused(cub, evaluated):
    text(cub / "image_class_labels.txt", "1 1", "2 1")
    refused(evaluated, "image_class_labels.txt must have each of the 3 pictures", 2, cub)


def test_a_folder_of_several_layouts_or_above_one_is_refused(cub, voc, evaluated):
    above = cub.parent / "above"
    above.mkdir()
    inside = cub.rename(above / "CUB_200_2011")
    message = f"has no files of a layout, but {str(inside)!r} has those of cub"
    refused(evaluated, message, 2, above)
    voc.joinpath("Annotations").rename(inside / "Annotations")
    voc.joinpath("ImageSets").rename(inside / "ImageSets")
    refused(evaluated, "has the files of cub and voc: give --layout", 2, inside)


def test_folders_by_class_are_recognised(photographs):
    assert layouts.find_layout(str(photographs)) == "classes"


def test_missing_data_is_an_error(evaluated):
    message = "the following arguments are required: DATA; DATA goes in front of --method"
    refused(evaluated, message, 2)


def test_a_run_of_another_split_is_another_run(cub, evaluated):
    """Rows of one split are not continued with another."""
    assert evaluated(2, cub, "--metrics", "energy")[0] == 0
    code, err = evaluated(2, cub, "--metrics", "energy", "--split", "all")
    assert code == 2
    assert "--output run has the rows of another run: " in err
    assert json.loads(Path("run/settings.json").read_text())["examples"] == 2
