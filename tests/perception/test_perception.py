"""Perception Visualization: encoder, decoder, losses and the picture."""

import threading
import warnings
from functools import partial

import pytest
import torch
from captum.attr import IntegratedGradients, LayerGradCam, NoiseTunnel, Saliency
from hypothesis import given
from hypothesis import strategies as st
from kornia.metrics import ssim
from skimage.metrics import structural_similarity as skimage_ssim
from torch import nn
from torch.nn import functional as F
from torchvision.models import (
    alexnet,
    densenet121,
    mobilenet_v3_small,
    resnet18,
    squeezenet1_1,
    swin_t,
    vit_b_16,
)

from captum_ext.attr import FIDO, RISE, LayerEigenCam, SESSWrapper, UpsampleWrapper
from captum_ext.attr.layer import channels_last_to_first, tokens_to_grid
from captum_ext.imaging import resize
from captum_ext.perception import (
    LayerEncoder,
    PerceptionDecoder,
    PerceptionVisualization,
    composite,
    deep_similarity,
    perception_loss,
    structural_similarity,
)
from captum_ext.perception.encoder import stride_fits
from tests.networks import (
    Lambda,
    UnshuffleNet,
    narrow_vgg,
    small_swin,
    strided_net,
    vision_transformer,
)

TOKENS = {"reshape_transform": tokens_to_grid}
LAST = {"reshape_transform": channels_last_to_first}
PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # pictures as they are


class Fixed(Saliency):
    """An attribution with a fixed map."""

    def __init__(self, maps):
        super().__init__(lambda x: x.sum((1, 2, 3)))
        self.maps = maps

    def attribute(self, inputs, target=None):
        return self.maps


def pv_of(model=None, attribution=None, layer="4", **options):
    model = model or strided_net()
    encoder = LayerEncoder(model, layer)
    x = torch.rand(1, 3, 32, 32)
    decoder = PerceptionDecoder.reading(encoder, x, [8, 4], [1, 1]).eval()
    attribution = attribution or LayerGradCam(model, model[4])
    return PerceptionVisualization(attribution, encoder, decoder, **options)


# --- the encoder ---------------------------------------------------------------------------------


def test_latents_are_the_layers_output_and_later_layers_do_not_run():
    model = strided_net()
    ran = []
    model[5].register_forward_hook(lambda *args: ran.append(1))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(LayerEncoder(model, "4")(x), model[:5](x))
    assert not ran
    model(x)
    assert ran


def test_the_gradient_of_latents_reaches_the_images():
    model = strided_net().double()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(LayerEncoder(model, model[4])(x).square().sum(), x)
    (direct,) = torch.autograd.grad(model[:5](x).square().sum(), x)
    assert torch.equal(ours, direct)
    assert ours.abs().max() > 0


def test_pictures_are_normalised_to_images_and_back():
    encoder = LayerEncoder(strided_net(), "4", normalize=((0.5, 0.25, 0.0), (0.5, 0.25, 2.0)))
    picture = torch.tensor([1.0, 0.5, 0.5]).reshape(1, 3, 1, 1)
    image = encoder.images(picture)
    assert image.flatten().tolist() == [1.0, 1.0, 0.25]
    assert torch.equal(encoder.pictures(image), picture)
    assert encoder.pictures(image + 9).max() == 1
    assert encoder.pictures(image - 9).min() == 0


def test_images_have_the_classifiers_dtype_and_latents_full_precision():
    model = strided_net().bfloat16()
    encoder = LayerEncoder(model, "4")
    images = encoder.images(torch.rand(1, 3, 32, 32))
    assert images.dtype == torch.bfloat16
    assert encoder(images).dtype == torch.float32


def test_classifiers_of_grey_pictures_have_grey_decoders():
    model = nn.Sequential(nn.Conv2d(1, 4, 2, stride=2), nn.Flatten(), nn.Linear(4 * 64, 2)).eval()
    encoder = LayerEncoder(model, "0", normalize=((0.5,), (0.5,)))
    color = torch.rand(2, 3, 16, 16)
    images = encoder.images(color)
    weights = torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)
    assert torch.allclose(encoder.pictures(images), (weights * color).sum(1, keepdim=True))
    decoder = PerceptionDecoder.reading(encoder, images, [4], [1])
    assert decoder(encoder(images)).shape == (2, 1, 16, 16)


def test_the_encoder_leaves_no_trace(trace_free):
    model, x = strided_net(), torch.rand(1, 3, 32, 32)
    with trace_free(model, x):
        LayerEncoder(model, "4")(x)
    model[4].register_forward_hook(lambda *args: 1 / 0)
    with trace_free(model, x), pytest.raises(ZeroDivisionError):
        LayerEncoder(model, "4")(x)


def test_threads_encode_with_one_model_at_once():
    model = strided_net()
    encoders = [LayerEncoder(model, name) for name in ("2", "4")] * 4
    xs = [torch.rand(1, 3, 32, 32) for _ in encoders]
    expected = [encoder(x) for encoder, x in zip(encoders, xs, strict=True)]
    wrong = []

    def run(i):
        for _ in range(20):
            if not torch.equal(encoders[i](xs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("layer", ["5", "6", "7"])
def test_a_layer_without_height_and_width_is_refused(layer):
    encoder = LayerEncoder(strided_net(), layer)
    with pytest.raises(ValueError, match=f"`layer` `{layer}` has no space to decode"):
        PerceptionDecoder.reading(encoder, torch.rand(1, 3, 32, 32))


def test_a_layer_that_does_not_run_or_is_unknown_is_refused():
    model = strided_net()
    with pytest.raises(ValueError, match="did not run"):
        LayerEncoder(model, nn.ReLU())(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="Closest"):
        LayerEncoder(model, "44")
    with pytest.raises(ValueError, match=r"must be a torch.nn.Module"):
        LayerEncoder(lambda x: x, "4")
    with pytest.raises(ValueError, match="normalize"):
        LayerEncoder(model, "4", normalize=((0.5, 0.5), (1, 1)))


# --- the decoder ---------------------------------------------------------------------------------


def test_the_default_decoder_is_that_of_the_paper():
    """It decodes 7 x 7 x 2048 to 224 x 224; its widths and number of weights are known."""
    decoder = PerceptionDecoder(2048, 32)
    assert decoder.widths == [512, 512, 256, 128, 64]
    assert decoder.convolutions == [2, 2, 2, 1, 1]
    inputs, count = 2048, 64 * 3 * 9 + 3
    for width, n in zip(decoder.widths, decoder.convolutions, strict=True):
        count += inputs * width * 4 + width + 2 * width + n * (width * width * 9 + width)
        inputs = width
    assert sum(p.numel() for p in decoder.parameters()) == count
    assert decoder(torch.rand(1, 2048, 7, 7)).shape == (1, 3, 224, 224)


@given(power=st.integers(0, 7), h=st.integers(1, 3), w=st.integers(1, 3), n=st.integers(1, 2))
def test_pictures_have_the_strides_size_and_values_in_0_to_1(power, h, w, n):
    decoder = PerceptionDecoder(5, 2**power, [3] * power, [1] * power).eval()
    pictures = decoder(9 * torch.randn(n, 5, h, w))
    assert pictures.shape == (n, 3, h * 2**power, w * 2**power)
    assert bool(((pictures >= 0) & (pictures <= 1)).all())


@pytest.mark.parametrize("stride", [1, 2, 8, 128])
def test_default_widths_suit_other_strides(stride):
    decoder = PerceptionDecoder(4, stride)
    wanted = ([512, 512, 512, 512, 256, 128, 64] if stride == 128 else [256, 128, 64])[
        -(stride.bit_length() - 1) or 9 :
    ]
    assert decoder.widths == wanted
    assert len(decoder.convolutions) == len(wanted)


@pytest.mark.parametrize(
    ("cells", "is_near"), [(5, False), (6, True), (7, True), (9, True), (10, True), (11, False)]
)
def test_cells_may_differ_from_the_side_by_a_quarter(cells, is_near):
    """64 pixels at a stride of 8 may have cells for 48 to 80 pixels, both included."""
    assert stride_fits(64, cells, 8) == is_near


@pytest.mark.parametrize(
    ("make", "layer", "options", "channels", "stride"),
    [
        (resnet18, "layer4", {}, 512, 32),
        (resnet18, "layer1", {}, 64, 4),
        (narrow_vgg, "features", {}, 512, 32),
        (squeezenet1_1, "features", {}, 512, 16),  # 13 x 13
        (mobilenet_v3_small, "features", {}, 576, 32),
        (partial(vision_transformer, 224), "encoder.ln", TOKENS, 32, 8),
        (small_swin, "features", LAST, 32, 8),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (alexnet, "features", {}, 256, 32),  # 6 x 6 cells of 224 pixels
                (densenet121, "features", {}, 1024, 32),
                (vit_b_16, "encoder.ln", TOKENS, 768, 16),
                (swin_t, "features", LAST, 768, 32),
            )
        ),
    ],
)
def test_a_decoder_is_made_for_any_layer(make, layer, options, channels, stride):
    model = make().eval()
    encoder = LayerEncoder(model, layer, **options)
    x = torch.rand(1, 3, 224, 224)
    n_blocks = stride.bit_length() - 1
    decoder = PerceptionDecoder.reading(encoder, x, [4] * n_blocks, [1] * n_blocks).eval()
    assert (decoder.channels, decoder.stride) == (channels, stride)
    pv = PerceptionVisualization(Saliency(model), encoder, decoder)
    assert pv.reconstruct(x).shape == x.shape


@pytest.mark.parametrize("size", [(64, 64), (65, 90), (95, 64), (100, 127)])
@pytest.mark.parametrize("make", [resnet18, narrow_vgg])
def test_sizes_need_not_be_multiples_of_the_stride(make, size):
    """A ResNet rounds the number of cells up, a VGG rounds it down."""
    encoder = LayerEncoder(make().eval(), "layer4" if make is resnet18 else "features")
    x = torch.rand(1, 3, *size)
    decoder = PerceptionDecoder.reading(encoder, x, [4] * 5, [1] * 5)
    assert decoder.stride == 32
    assert decoder(encoder(x), size).shape == (1, 3, *size)


def test_a_stride_that_is_no_power_of_two_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=3), nn.Flatten(), nn.Linear(400, 2))
    with pytest.raises(ValueError, match="power of two"):
        PerceptionDecoder.reading(LayerEncoder(model, "0"), torch.rand(1, 3, 30, 30))
    with pytest.raises(ValueError, match="`stride` must be a power of two, got 12"):
        PerceptionDecoder(4, 12)


def test_a_decoder_refuses_another_encoder(tmp_path):
    """Channels and stride are equal, so that only the fingerprint differs."""
    model, x = strided_net(), torch.rand(1, 3, 32, 32)
    decoder = PerceptionDecoder.reading(LayerEncoder(model, "3"), x, [4, 4], [1, 1])
    other = LayerEncoder(model, "4")
    with pytest.raises(ValueError, match="made for: layer was '3' and is '4'"):
        PerceptionVisualization(Saliency(model), other, decoder)
    with pytest.raises(ValueError, match="made for: layer was '3' and is '4'"):
        decoder.save(tmp_path / "decoder.pt", other)
    with pytest.raises(TypeError, match="`encoder` must be a LayerEncoder"):
        decoder.save(other, "decoder.pt")
    decoder.save(tmp_path / "new" / "decoder.pt", LayerEncoder(model, "3"))
    assert (tmp_path / "new" / "decoder.pt").is_file()


def test_latents_that_do_not_fit_the_decoder_are_refused():
    decoder = PerceptionDecoder(8, 4, [4, 4], [1, 1])
    with pytest.raises(ValueError, match=r"`latents` must be \(N, 8, h, w\)"):
        decoder(torch.rand(1, 9, 4, 4))
    with pytest.raises(ValueError, match="does not fit"):
        decoder(torch.rand(1, 8, 4, 4), (32, 32))
    for name in ("widths", "convolutions"):
        with pytest.raises(ValueError, match=f"`{name}` must be 2 numbers"):
            PerceptionDecoder(8, 4, **{name: [1]})
        with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1"):
            PerceptionDecoder(8, 4, **{name: [1, 0]})


def test_a_decoder_may_have_half_precision():
    decoder = PerceptionDecoder(8, 4, [4, 4], [1, 1]).bfloat16().eval()
    assert decoder(torch.rand(1, 8, 4, 4).bfloat16(), (16, 15)).dtype == torch.bfloat16


# --- its file ------------------------------------------------------------------------------------


def test_a_saved_decoder_is_loaded(tmp_path):
    model, x = strided_net(), torch.rand(2, 3, 32, 32)
    encoder = LayerEncoder(model, "4")
    decoder = PerceptionDecoder.reading(encoder, x, [8, 4], [2, 1])
    decoder(encoder(x))  # updates batch statistics, which are part of the file
    decoder.eval().save(tmp_path / "decoder.pt", encoder)
    torch.load(tmp_path / "decoder.pt", weights_only=True)
    result = PerceptionDecoder.load(tmp_path / "decoder.pt", encoder)
    assert not result.training
    assert torch.equal(result(encoder(x)), decoder(encoder(x)))


def test_other_files_and_other_encoders_are_refused(tmp_path):
    model, x = strided_net(), torch.rand(2, 3, 32, 32)
    encoder, file = LayerEncoder(model, "4"), tmp_path / "decoder.pt"
    PerceptionDecoder.reading(encoder, x, [8, 4], [2, 1]).save(file, encoder)
    with pytest.raises(ValueError, match="made for: layer was '4' and is '2'"):
        PerceptionDecoder.load(file, LayerEncoder(model, "2"))
    other = LayerEncoder(model, "4", normalize=PLAIN)
    with pytest.raises(ValueError, match="made for: normalize was"):
        PerceptionDecoder.load(file, other)
    saved = torch.load(file, weights_only=True)
    torch.save(saved | {"widths": [8, 8]}, file)
    with pytest.raises(ValueError, match=r"of another architecture than its options.*blocks"):
        PerceptionDecoder.load(file, encoder)
    torch.save(saved, file)
    other = strided_net()
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match=r"not the classifier.*0\.weight"):
        PerceptionDecoder.load(file, LayerEncoder(other, "4"))
    torch.save({"some": "thing"}, file)
    with pytest.raises(ValueError, match="no decoder of Perception Visualization"):
        PerceptionDecoder.load(file, encoder)
    file.write_text("nothing")
    with pytest.raises(ValueError, match="no decoder of Perception Visualization"):
        PerceptionDecoder.load(file, encoder)
    with pytest.raises(FileNotFoundError):
        PerceptionDecoder.load(tmp_path / "none.pt", encoder)


def test_files_of_before_are_those_of_now(tmp_path):
    """The stored settings have a fixed form, so that earlier files can be loaded."""
    encoder = LayerEncoder(strided_net(), "4", normalize=((0.5,), (0.25,)))
    decoder = PerceptionDecoder(8, stride=4, widths=(4, 4), convolutions=(1, 1), colors=1)
    decoder.save(tmp_path / "new" / "a.pt", encoder)
    saved = torch.load(tmp_path / "new" / "a.pt", weights_only=True)
    assert list(saved) == [
        *("decoder", "channels", "stride", "widths", "convolutions", "colors", "encoder"),
        *("classifier", "dtypes"),
    ]
    assert saved["encoder"] | {"architecture": ""} == {
        "architecture": "",
        "layer": "4",
        "normalize": [[0.5], [0.25]],
        "reshape_transform": "NoneType",
    }
    grid = partial(tokens_to_grid, grid=(2, 3))
    fingerprint = LayerEncoder(strided_net(), "4", reshape_transform=grid).fingerprint()
    assert fingerprint["reshape_transform"] == "tokens_to_grid, (), [('grid', (2, 3))]"


def test_a_transform_without_a_version_is_refused():
    encoder = LayerEncoder(strided_net(), "4", reshape_transform=lambda x: x)
    with pytest.raises(ValueError, match=r"^`reshape_transform` is .*`function\.version = "):
        PerceptionDecoder.reading(encoder, torch.rand(1, 3, 16, 16))


# --- losses --------------------------------------------------------------------------------------


def test_ssim_equals_that_of_scikit_image():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, 3, 24, 31, dtype=torch.float64, generator=generator)
    y = (x + 0.3 * torch.randn(x.shape, dtype=torch.float64, generator=generator)).clamp(0, 1)
    result = structural_similarity(x, y)
    for i in range(2):
        for c in range(3):
            _, full = skimage_ssim(
                x[i, c].numpy(), y[i, c].numpy(), data_range=1.0, gaussian_weights=True,
                sigma=1.5, use_sample_covariance=False, full=True,
            )  # fmt: skip
            assert result[i, c].item() == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-10)
    assert torch.equal(structural_similarity(x, x), torch.ones(2, 3, dtype=torch.float64))
    assert (structural_similarity(x, 1 - x) < 0).all()


def test_the_loss_equals_its_formula():
    x = torch.zeros(2, 3, 11, 11, dtype=torch.float64)
    y = torch.full_like(x, 0.5)
    z, w = torch.zeros(2, 4, 1, 2, dtype=torch.float64), torch.full((2, 4, 1, 2), 3.0)
    parts = perception_loss(x, y, z, w.double())
    # The SSIM of two flat pictures is c_1 / (0.25 + c_1), c_1 = 1e-4.
    expected = {"pixel": 0.2 * 0.25, "deep": 0.4 * 9, "ssim": -0.4 * 3 * 1e-4 / (0.25 + 1e-4)}
    assert {k: v.item() for k, v in parts.items()} == pytest.approx(expected, rel=1e-9)
    assert perception_loss(x, y, z, w, (0.4, 0, 0.6)).keys() == {"pixel", "ssim"}
    assert deep_similarity(z, w).tolist() == [9.0, 9.0]


def test_pictures_below_the_window_of_ssim_are_refused():
    x = torch.rand(1, 3, 10, 20)
    with pytest.raises(ValueError, match="at least 11 x 11"):
        structural_similarity(x, x)
    with pytest.raises(ValueError, match="`pictures`"):
        structural_similarity(torch.rand(1, 3, 20, 20), torch.rand(1, 3, 20, 21))


def test_ssim_accumulates_in_single_precision():
    x = torch.rand(1, 3, 32, 32).bfloat16()
    result = structural_similarity(x, 1 - x)
    assert result.dtype == torch.float32
    assert torch.allclose(
        result, ssim(x.float(), (1 - x).float(), 11)[..., 5:-5, 5:-5].mean((2, 3))
    )


def test_autocast_does_not_reach_ssim():
    """Kornia 0.8 follows autocast: it would give 1.25 instead of 0.87."""
    generator = torch.Generator().manual_seed(1)
    x = 0.8 + 0.1 * torch.rand(2, 3, 32, 32, generator=generator)
    y = (x + 0.02 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = structural_similarity(x, y)
    assert torch.equal(result, structural_similarity(x, y))


# --- the picture ---------------------------------------------------------------------------------


def test_an_invertible_encoder_gives_the_picture_back():
    """The reconstruction and its latents are exact, and the mask shows the picture itself."""
    model = UnshuffleNet()
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    encoder = LayerEncoder(model, "unshuffle", normalize=PLAIN)
    cam = UpsampleWrapper(LayerGradCam(model, model.unshuffle))
    decoder = Lambda(lambda latents, size: F.pixel_shuffle(latents, 4))
    pv = PerceptionVisualization(cam, encoder, decoder)
    image, mask, reconstruction = pv.visualize(x, target=2)
    assert torch.equal(reconstruction, x)
    similarity, distance = pv.quality(x)
    assert torch.equal(distance, torch.zeros(2, dtype=torch.float64))
    assert torch.equal(similarity, torch.ones(2, dtype=torch.float64))
    assert torch.allclose(image, 1 - mask * (1 - x), atol=1e-12)
    assert 0 < mask.min(1).values.max() <= 1


@pytest.mark.parametrize(
    ("value", "is_visible"), [(1.0, True), (7.0, True), (0.0, False), (-1, False)]
)
def test_a_mask_of_1_shows_the_reconstruction_and_of_0_the_background(value, is_visible):
    x = torch.rand(2, 3, 32, 32)
    pv = pv_of(attribution=Fixed(torch.full((2, 1, 8, 8), value)))
    image, mask, reconstruction = pv.visualize(x)
    assert torch.equal(image, reconstruction if is_visible else torch.ones_like(x))
    assert torch.equal(mask, torch.full((2, 1, 32, 32), float(is_visible)))
    assert reconstruction.std() > 0


def test_the_mask_equals_one_made_by_hand():
    """Channels are summed, negative values cut off, maps divided by their maximum and resized."""
    maps = torch.tensor([[[[1.0, -4.0]], [[3.0, 1.0]]]])  # sums 4 and -3
    x = torch.rand(1, 3, 32, 32)
    mask = pv_of(attribution=Fixed(maps)).mask(x)
    line = F.interpolate(torch.tensor([[[[1.0, 0.0]]]]), (32, 32), mode="bilinear")
    assert torch.equal(mask, line)
    twice = torch.tensor([[[[4.0, -3.0]], [[4.0, -3.0]]]])  # equal channels: one of them
    assert torch.equal(pv_of(attribution=Fixed(twice)).mask(x), line)
    high = torch.tensor([[[[8.0, 6.0]]]])
    assert pv_of(attribution=Fixed(high)).mask(x).min() == 0.75
    assert torch.equal(pv_of(attribution=Fixed(high), scale="min-max").mask(x), line)
    assert (
        pv_of(attribution=Fixed(high.expand(1, 1, 1, 2) * 0 + 5), scale="min-max")
        .mask(x)
        .eq(0)
        .all()
    )


def test_masks_and_pictures_do_not_exceed_1():
    """Weights of an interpolation may sum to 1 + 2^-23, for example from 7 to 33 cells."""
    assert resize(torch.ones(1, 1, 7, 7), (33, 33)).max() > 1
    encoder = LayerEncoder(nn.Sequential(nn.Conv2d(3, 12, 5, 5)), "0")
    decoder = PerceptionDecoder(12, 4, [4, 4], [1, 1]).eval()
    nn.init.constant_(decoder.head.bias, 99.0)
    x = torch.rand(1, 3, 35, 35)
    assert decoder(encoder(x), (29, 30)).max() == 1
    pv = PerceptionVisualization(Fixed(torch.ones(1, 1, 7, 7)), encoder, decoder)
    assert pv.mask(torch.rand(1, 3, 33, 33)).max() == 1


def test_threshold_gamma_and_background_act_as_documented():
    x = torch.rand(1, 3, 32, 32)
    plain = pv_of(attribution=Fixed(torch.rand(1, 1, 32, 32)))
    mask = plain.mask(x)
    edited = PerceptionVisualization(
        plain.attribution, plain.encoder, plain.decoder, threshold=0.3, gamma=2 / 3, background=0.5
    )
    image, result, reconstruction = edited.visualize(x)
    assert torch.equal(result, torch.where(mask < 0.3, 0, mask) ** (2 / 3))
    assert torch.allclose(image, result * reconstruction + 0.5 * (1 - result))
    assert (mask < 0.3).any()


def test_composite_applies_the_mask_to_any_picture():
    x, m = torch.rand(2, 3, 4, 4), torch.rand(2, 1, 4, 4)
    assert torch.allclose(composite(x, m), 1 - m * (1 - x))


def methods(model):
    cam = LayerGradCam(model, model[4])
    return {
        "layer": cam,
        "ours": LayerEigenCam(model, model[4]),
        "upsampled": UpsampleWrapper(cam),
        "SESS": SESSWrapper(cam, n_scales=2),
        "pixels": IntegratedGradients(model),
        "tunnel": NoiseTunnel(Saliency(model)),
        "FIDO": FIDO(model),
        "RISE": RISE(model),
    }


@pytest.mark.parametrize("name", methods(strided_net()))
def test_any_attribution_makes_the_mask(name, trace_free):
    model, x = strided_net(), torch.rand(2, 3, 32, 32)
    pv = pv_of(model, methods(model)[name])
    options = {"FIDO": {"n_steps": 2, "n_masks": 1}, "RISE": {"n_masks": 8, "grid": 4}}
    with trace_free(model, x, keeps_rng=False):
        torch.manual_seed(0)
        result = pv.visualize(x, target=[1, 2], **options.get(name, {}))
    assert 0.65 < result.mask.max() <= 1
    assert result.mask.min() >= 0
    torch.manual_seed(0)
    maps = pv.attribution.attribute(x, target=[1, 2], **options.get(name, {}))
    positive = maps.sum(1, keepdim=True).clamp(min=0)
    scaled = (positive / positive.amax((2, 3), keepdim=True)).nan_to_num()
    expected = F.interpolate(scaled, (32, 32), mode="bilinear")
    assert torch.allclose(result.mask, expected, atol=1e-5)


def test_batches_grad_modes_and_frozen_parameters_change_nothing():
    model = strided_net()
    for weight in model.parameters():
        weight.requires_grad_(False)
    pv, x = pv_of(model, UpsampleWrapper(LayerGradCam(model, model[4]))), torch.rand(3, 3, 32, 32)
    target = [0, 3, 1]
    together = pv.visualize(x, target=target)
    for i in range(3):
        alone = pv.visualize(x[i : i + 1], target=target[i])
        for alone_part, all_ in zip(alone, together, strict=True):
            assert torch.allclose(alone_part[0], all_[i], atol=1e-6)
    assert not any(part.requires_grad for part in together)


def test_train_mode_gives_a_warning_and_statistics_stay(trace_free):
    model = strided_net().train()
    pv, x = pv_of(model), torch.rand(2, 3, 32, 32)
    pv.decoder.train()
    with trace_free(model, x), trace_free(pv.decoder), pytest.warns(UserWarning, match="train"):
        pv.reconstruct(x)
    with trace_free(model, x), trace_free(pv.decoder), pytest.warns(UserWarning, match="train"):
        pv.quality(x)
    with trace_free(model, x, keeps_rng=False), pytest.warns(UserWarning, match="train"):
        PerceptionDecoder.reading(pv.encoder, x)


def test_sizes_may_differ_from_that_of_the_training():
    pv = pv_of()
    for size in ((32, 48), (33, 50), (16, 64)):
        x = torch.rand(1, 3, *size)
        assert pv.visualize(x, target=0).image.shape == x.shape


def test_half_precision_gives_results_in_float32():
    model = strided_net().bfloat16()
    encoder = LayerEncoder(model, "4")
    decoder = PerceptionDecoder(12, 4, [4, 4], [1, 1]).eval()
    pv = PerceptionVisualization(Saliency(model), encoder, decoder)
    result = pv.visualize(torch.rand(2, 3, 32, 32).bfloat16(), target=1)
    assert {part.dtype for part in result} == {torch.float32}


def test_invalid_arguments_are_refused():
    x = torch.rand(2, 3, 32, 32)
    model = strided_net()
    encoder, decoder = LayerEncoder(model, "4"), PerceptionDecoder(12, 4, [4, 4], [1, 1]).eval()
    cam = LayerGradCam(model, model[4])
    for wrong in ((model, encoder, decoder), (cam, model, decoder), (cam, encoder, len)):
        with pytest.raises(TypeError, match="must be an instance of"):
            PerceptionVisualization(*wrong)
    for name, value in (
        ("scale", "none"),
        ("threshold", 1.5),
        ("gamma", 0),
        ("background", -0.1),
    ):
        with pytest.raises(ValueError, match=f"`{name}`"):
            PerceptionVisualization(cam, encoder, decoder, **{name: value})
    pv = PerceptionVisualization(cam, encoder, decoder)
    with pytest.raises(ValueError, match="not finite"):
        pv.visualize(x * torch.nan, target=0)
    with pytest.raises(ValueError, match="`inputs` must be images"):
        pv.visualize(x[0], target=0)
    with pytest.raises(AssertionError):
        pv.visualize(x, target=[0])
    grey = PerceptionDecoder(12, 4, [4, 4], [1, 1], colors=1).eval()
    with pytest.raises(ValueError, match=r"`decoder` must give pictures \(2, 3, 32, 32\)"):
        PerceptionVisualization(cam, encoder, grey).reconstruct(x)
    with pytest.raises(ValueError, match="does not fit"):
        PerceptionVisualization(
            cam, encoder, PerceptionDecoder(12, 8, [4] * 3, [1] * 3).eval()
        ).reconstruct(x)
    for maps in (torch.rand(2, 8), torch.rand(1, 1, 8, 8), None):
        with pytest.raises(ValueError, match="`attribution` must give a map"):
            PerceptionVisualization(Fixed(maps), encoder, decoder).mask(x)
    with pytest.raises(ValueError, match="not finite"):
        PerceptionVisualization(Fixed(torch.rand(2, 1, 8, 8) / 0), encoder, decoder).mask(x)


def test_valid_calls_give_no_warning(no_warnings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Setting forward, backward hooks")
        pv_of().visualize(torch.rand(1, 3, 32, 32), target=0)


@pytest.mark.gpu
def test_results_stay_on_the_gpu():
    model = strided_net()
    x = torch.rand(2, 3, 32, 32)
    cpu = pv_of(model)
    expected = cpu.visualize(x, target=1), cpu.quality(x)
    model.cuda(), cpu.decoder.cuda()
    result = cpu.visualize(x.cuda(), target=1), cpu.quality(x.cuda())
    for ours, theirs in zip(sum(result, ()), sum(expected, ()), strict=True):
        assert ours.is_cuda
        assert torch.allclose(ours.cpu(), theirs, atol=1e-4)


def test_reprs_are_short():
    model = strided_net()
    encoder = LayerEncoder(model, model[4], normalize=PLAIN)
    assert repr(encoder) == (
        "LayerEncoder(Sequential, layer='4', normalize=((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))"
    )
    assert repr(LayerEncoder(model, "4")) == "LayerEncoder(Sequential, layer='4')"
    perception = pv_of(model, gamma=2.0).visualize(torch.rand(1, 3, 32, 32), target=1)
    assert repr(perception) == (
        "Perception(image=Tensor((1, 3, 32, 32), float32), mask=Tensor((1, 1, 32, 32), float32), "
        "reconstruction=Tensor((1, 3, 32, 32), float32))"
    )
