"""The decoder's size and shapes, and the feature layers of torchvision's classifiers."""

import threading

import pytest
import torch
import torchvision
from torch import nn

import captum_ext.fcam
from captum_ext._engine.modules import find_module
from captum_ext.fcam import FCAMDecoder, find_feature_layers
from tests.captures import layer_activations
from tests.networks import RaisingLayer, SharedReluNet

# Architecture, sizes of images, and the layers that the decoder reads.
CLASSIFIERS = {
    "resnet18": ([64, (97, 65)], ["relu", "layer1", "layer2", "layer3", "layer4"]),
    "vgg11_bn": ([64], ["features.6", "features.13", "features.20", "features.27", "features"]),
    "inception_v3": (
        [107, (130, 145)],
        ["Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"],
    ),
    "densenet121": (
        [(64, 97)],
        [
            "features.relu0",
            "features.transition1.conv",
            "features.transition2.conv",
            "features.transition3.conv",
            "features",
        ],
    ),
    "mobilenet_v2": (
        [(65, 96)],
        ["features.1", "features.3", "features.6", "features.13", "features"],
    ),
    "mobilenet_v3_small": (
        [96],
        ["features.0", "features.1", "features.3", "features.8", "features"],
    ),
    "efficientnet_b0": (
        [96],
        ["features.1", "features.2", "features.3", "features.5", "features"],
    ),
    "convnext_tiny": ([97], ["features.2.0", "features.4.0", "features.6.0", "features"]),
}


def classifier(name):
    options = {"init_weights": False} if name == "inception_v3" else {}
    return getattr(torchvision.models, name)(weights=None, **options).eval()


# --- the decoder ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "center", "count"),
    [
        ([64, 256, 512, 1024, 2048], False, 9_013_218),  # the authors' ResNet-50
        ([64, 80, 288, 768, 1024], False, 5_704_674),  # Inception v3
        ([128, 256, 1024], True, 23_120_770),  # VGG-16
    ],
)
def test_the_number_of_parameters_is_that_of_the_official_code(channels, center, count):
    decoder = FCAMDecoder(channels, center=center)
    assert sum(p.numel() for p in decoder.parameters()) == count


def test_the_decoder_equals_its_layers_applied_by_hand():
    """Two features, with the convolutions of the blocks written out."""
    torch.manual_seed(0)
    decoder = FCAMDecoder([3, 5], [4, 2]).eval().double()
    shallow, deep = torch.randn(2, 3, 7, 9).double(), torch.randn(2, 5, 4, 5).double()

    def block(i, x):
        for j in (0, 3):
            x = decoder.blocks[i][j + 1](
                nn.functional.conv2d(x, decoder.blocks[i][j].weight, padding=1)
            ).relu()
        return x

    large = nn.functional.interpolate(deep, scale_factor=2)
    large = nn.functional.interpolate(large, (7, 9), mode="bilinear", align_corners=True)
    x = block(0, torch.cat((large, shallow), 1))
    x = block(1, nn.functional.interpolate(x, scale_factor=2))
    x = decoder.head(x)
    logits = nn.functional.interpolate(x, (15, 20), mode="bilinear", align_corners=True)
    torch.testing.assert_close(decoder([shallow, deep], (15, 20)), logits)


def test_features_of_equal_size_are_not_resized():
    decoder = FCAMDecoder([2, 3, 4], [4, 3, 2]).eval()
    features = [torch.randn(1, c, 6, 6) for c in (2, 3, 4)]
    x = decoder.blocks[0](torch.cat((features[2], features[1]), 1))
    x = decoder.blocks[1](torch.cat((x, features[0]), 1))
    x = decoder.head(decoder.blocks[2](nn.functional.interpolate(x, scale_factor=2)))
    torch.testing.assert_close(decoder(features, (12, 12)), x)


def test_initial_weights_and_logits_are_those_of_the_official_code():
    torch.manual_seed(0)
    decoder = FCAMDecoder([64, 64], [64, 64])
    logits = decoder([torch.randn(2, 64, 8, 8), torch.randn(2, 64, 4, 4)], (16, 16))
    assert logits.min() < 0
    assert not torch.allclose(logits.sum(1), torch.ones(2, 16, 16))
    first = decoder.blocks[0][0].weight
    assert first.abs().max() <= (6 / (128 * 9)) ** 0.5
    assert first.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert decoder.head.weight.abs().max() <= (6 / ((64 + 2) * 9)) ** 0.5
    assert (decoder.head.bias == 0).all()
    assert decoder.blocks[0][0].bias is None


@pytest.mark.parametrize("center", [False, True])
def test_all_parameters_get_gradients(center):
    decoder = FCAMDecoder([3, 4, 5], [4, 4, 4], center=center)
    features = [torch.randn(2, c, s, s) for c, s in ((3, 16), (4, 8), (5, 4))]
    decoder(features, (33, 31)).square().mean().backward()
    assert all((p.grad != 0).any() for p in decoder.parameters())


@pytest.mark.parametrize(
    ("channels", "widths", "named"),
    [
        ([], (4,), "channels"),
        ([3, 4], (), "widths"),
        ([3, 0], (4, 4), "channels"),
        ([3, 4], (4, 0), "widths"),
    ],
)
def test_invalid_channels_widths_and_layers_are_refused(channels, widths, named):
    with pytest.raises(ValueError, match=named):
        FCAMDecoder(channels, widths)


def test_the_last_width_is_repeated():
    decoder = FCAMDecoder([2] * 6)
    assert decoder.widths == [256, 128, 64, 32, 16, 16]
    assert [block[0].out_channels for block in decoder.blocks] == decoder.widths
    features = [torch.rand(1, 2, n, n) for n in (64, 32, 16, 8, 4, 2)]
    assert decoder.eval()(features, (128, 128)).shape == (1, 2, 128, 128)
    assert FCAMDecoder([3, 4, 5], [8]).widths == [8, 8, 8]
    assert FCAMDecoder([3, 4], [8, 6, 4]).widths == [8, 6]


def test_features_with_other_channels_are_refused():
    decoder = FCAMDecoder([3, 4], [4, 4])
    for features in ([torch.zeros(1, 3, 4, 4)], [torch.zeros(1, c, 4, 4) for c in (4, 3)]):
        with pytest.raises(ValueError, match=r"features.*\[3, 4\]"):
            decoder(features, (8, 8))


# --- what it reads -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_feature_layers_of_torchvisions_classifiers(name):
    """A decoder on these layers gives maps of the images' size, for several sizes."""
    sizes, expected = CLASSIFIERS[name]
    model = classifier(name)
    for size in sizes:
        images = torch.rand(1, 3, *(size if isinstance(size, tuple) else (size, size)))
        taps = find_feature_layers(model, images)
        assert taps == expected
        layers = [find_module(model, tap) for tap in taps]
        features = [result[0] for result in layer_activations(model, layers, (images,))[0]]
        assert [f.shape[2] for f in features] == sorted(
            (f.shape[2] for f in features), reverse=True
        )
        decoder = FCAMDecoder([f.shape[1] for f in features], (16, 8, 8, 4, 4)).eval()
        assert decoder(features, tuple(images.shape[2:])).shape == (1, 2, *images.shape[2:])


def test_modules_that_run_twice_are_no_feature_layers():
    torch.manual_seed(0)
    model, images = SharedReluNet().eval(), torch.rand(2, 3, 33, 48)
    assert find_feature_layers(model, images) == ["conv2", "conv3"]
    decoder = FCAMDecoder.reading(model, images, widths=(4, 4))
    assert decoder.channels == [5, 6]
    x = nn.functional.max_pool2d(model.conv1(images).relu(), 2)
    (result,), _ = layer_activations(model, [model.conv2], (images,))
    torch.testing.assert_close(result[0], model.conv2(x))


def test_runs_of_other_threads_do_not_change_the_feature_layers():
    """After the first block, a second thread runs the model at another size."""
    model, images = classifier("resnet18"), torch.rand(1, 3, 64, 64)
    expected = find_feature_layers(model, images)
    me, errors = threading.get_ident(), []

    def run():
        try:
            with torch.no_grad():
                model(torch.rand(1, 3, 200, 200))
        except Exception as error:
            errors.append(error)

    def meanwhile(module, args, output):
        if threading.get_ident() == me:
            other = threading.Thread(target=run)
            other.start()
            other.join()

    handle = model.layer2.register_forward_hook(meanwhile)
    assert find_feature_layers(model, images) == expected
    handle.remove()
    assert not errors


def test_find_feature_layers_leaves_no_trace():
    model = classifier("resnet18")
    model.layer1.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.warns(UserWarning, match="train mode"):
        find_feature_layers(model, torch.rand(2, 3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.layer1.training
    assert not any(m._forward_hooks for m in model.modules())

    broken = nn.Sequential(nn.Conv2d(3, 4, 3), RaisingLayer()).eval()
    with pytest.raises(RuntimeError, match="in the middle"):
        find_feature_layers(broken, torch.rand(1, 3, 8, 8))
    assert not broken[0]._forward_hooks


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), 8),
        (torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 16), 32),
        (torchvision.models.resnet18(weights=None), 1),
    ],
    ids=["mlp", "vit", "one pixel"],
)
def test_models_without_maps_are_refused(model, size):
    with pytest.raises(ValueError, match="layers"):
        find_feature_layers(model.eval(), torch.rand(1, 3, size, size))


def test_layers_with_channels_last_are_no_feature_layers():
    model = torchvision.models.swin_t(weights=None).eval()
    assert find_feature_layers(model, torch.rand(1, 3, 64, 64)) == ["features.0.0", "permute"]


def test_a_function_is_refused():
    with pytest.raises(ValueError, match=r"`classifier` must be a torch\.nn\.Module"):
        find_feature_layers(lambda x: x.mean((2, 3)), torch.rand(1, 3, 8, 8))


def test_the_old_name_of_find_feature_layers_warns():
    with pytest.deprecated_call(match="find_feature_layers"):
        assert captum_ext.fcam.find_taps is find_feature_layers
