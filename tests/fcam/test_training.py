"""Training of F-CAM: the classifier stays, the decoder learns, and killed runs go on."""

import errno
import signal
import warnings

import numpy as np
import pytest
import torch
from captum.attr import Attribution, IntegratedGradients, LayerGradCam
from lightning.pytorch import Callback
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from captum_ext._data.pictures import PictureDataset
from captum_ext._data.pixels import IMAGENET_MEAN_STD
from captum_ext._engine.state import eval_mode
from captum_ext._errors import ArgumentError
from captum_ext._training import SeededShuffle
from captum_ext.attr import FCAM, LayerClassActivationMap, SESSWrapper
from captum_ext.datasets import TexturedEllipses
from captum_ext.fcam import DenseCRFLoss, FCAMDecoder, SeedSampler
from captum_ext.fcam.fit import fit_fcam
from captum_ext.fcam.guides import guide_maps
from captum_ext.fcam.training import FCAMModule
from captum_ext.fcam.views import BoxedPictures, draw_crops
from captum_ext.metrics import MaxBoxAcc
from tests.evaluation.subjects import VersionedFunction
from tests.networks import CallCounter, three_stage_net

SMALL = {
    "size": 32,
    "widths": (8, 8, 8),
    "batch_size": 8,
    "show_progress": False,
    "n_epochs": 2,
    "seeds": SeedSampler(4, 4),
}


@pytest.fixture(autouse=True)
def quiet():
    """Ignore Lightning's advice about workers and devices."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield


class Scenes(Dataset):
    """A few scenes, as pictures and labels without masks."""

    def __init__(self, n=24, size=(32, 32)):
        scenes = TexturedEllipses(n, 0, size)
        self.items = [(scene.image, scene.target) for scene in scenes]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Teacher(Attribution):
    """A guide whose maps the test makes. It records its calls."""

    def __init__(self, forward_func, maps):
        super().__init__(forward_func)
        self.maps, self.calls = VersionedFunction(maps), []

    def attribute(self, inputs, target=None):
        self.calls.append((inputs.clone(), target.clone(), self.forward_func.training))
        return self.maps(inputs)


def brightness(images):
    return images.mean(1, keepdim=True)


# --- the classifier ------------------------------------------------------------------------------


def test_the_classifier_stays_equal_to_the_bit():
    model = three_stage_net()
    model[1].eval()
    model[0][0].weight.requires_grad_(False)
    model[5].weight.grad = torch.ones(4, 8)
    before, flags = state(model), [m.training for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad(), eval_mode(model):
        logits = model(x)
    random = torch.get_rng_state()
    fit_fcam(model, Scenes(), LayerGradCam(model, model[2]), **SMALL)
    assert torch.equal(torch.get_rng_state(), random)
    assert equal(state(model), before)
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == grads
    assert (model[5].weight.grad == 1).all()
    assert all(p.grad is None for p in model.parameters() if p is not model[5].weight)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad(), eval_mode(model):
        assert torch.equal(model(x), logits)


def test_the_guide_explains_the_label_of_each_crop_in_eval_mode():
    model = three_stage_net().train()
    guide = Teacher(model, brightness)
    data = Scenes(8)
    fit_fcam(model, data, guide, **SMALL | {"n_epochs": 1, "batch_size": 4})
    assert len(guide.calls) == 2
    assert sorted(torch.cat([t for _, t, _ in guide.calls]).tolist()) == sorted(t for _, t in data)
    assert not any(training for _, _, training in guide.calls)
    images = torch.cat([x for x, _, _ in guide.calls])
    assert images.mean().abs() < 2
    assert images.min() < 0  # normalised


def test_flags_are_restored_after_an_error():
    model = three_stage_net().train()

    def broken(images):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit_fcam(model, Scenes(8), Teacher(model, broken), **SMALL)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())


# --- learning ------------------------------------------------------------------------------------


def test_the_decoder_learns_the_guides_maps():
    """The guide's maps are bright at objects; the decoder's maps of new scenes are sharper."""
    scenes = TexturedEllipses(96, 0, (32, 32))
    result = scenes.batch()
    mask_of = {p.numpy().tobytes(): m for p, m in zip(result.pixels, result.masks, strict=True)}

    def masks(images):
        pixels = (images * 0.25 + 0.5).mul(255).round().to(torch.uint8)
        exact = [mask_of[p.numpy().tobytes()] for p in pixels]
        return nn.functional.avg_pool2d(torch.stack(exact)[:, None].float(), 8)

    model = three_stage_net().eval()
    options = SMALL | {"n_epochs": 16, "flip": False, "normalize": ((0.5,) * 3, (0.25,) * 3)}
    options |= {"widths": (16, 16, 8), "crf_weight": 5.0}
    data = [(s.image, s.target) for s in scenes]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The decoder has learned nothing")
        fcam = fit_fcam(model, data, Teacher(model, masks), **options)
    assert not fcam.decoder.training
    test = TexturedEllipses(32, 1, (32, 32)).batch()
    maps = fcam.foreground((test.pixels / 255 - 0.5) / 0.25)[:, 0]
    inside, outside = maps[test.masks].mean(), maps[~test.masks].mean()
    assert inside > outside + 0.3


def test_equal_seeds_give_equal_decoders_and_others_do_not():
    model = three_stage_net().eval()
    guide = LayerGradCam(model, model[2])
    result = [state(fit_fcam(model, Scenes(), guide, **SMALL, seed=s).decoder) for s in (0, 0, 1)]
    assert equal(result[0], result[1])
    assert not equal(result[0], result[2])


def test_maps_follow_crops_and_flips_in_training(tmp_path):
    """The maps of the seeds and the colours of the CRF are of the same crops."""
    model = three_stage_net().eval()
    seen = []

    class Seeds(SeedSampler):
        def __call__(self, maps, generator=None):
            seen.append([maps])
            return super().__call__(maps, generator)

    class Colours(nn.Module):
        def forward(self, foreground, images):
            seen[-1].append(images)
            return foreground.sum() * 0

    options = SMALL | {"resize": (40, 48), "seeds": Seeds(4, 4), "crf": Colours(), "warmup": 0}
    options |= {"rectify": False}
    for cache in ({}, {"cache": tmp_path}):
        seen.clear()
        fit_fcam(model, Scenes(), Teacher(model, brightness), **options, **cache)
        for maps, images in seen:
            # The guide saw normalised pictures, whose mean over channels is only close to this.
            both = torch.stack((maps.flatten(1), images.float().mean(1).flatten(1)), 1)
            assert min(torch.corrcoef(pair)[0, 1].item() for pair in both) > 0.99
    views = torch.cat([images for _, images in seen])
    assert len({view.numpy().tobytes() for view in views}) == len(views)


def test_cached_maps_are_those_of_the_whole_pictures(tmp_path):
    model = three_stage_net().eval()
    guide = LayerGradCam(model, model[2])
    options = SMALL | {"seeds": SeedSampler(4, 4, erosion=1)}
    random = torch.get_rng_state()
    fit_fcam(model, Scenes(), guide, **options, cache=tmp_path)
    assert torch.equal(torch.get_rng_state(), random)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["maps-00000000.pt"]
    pictures = PictureDataset(Scenes(), (32, 32))
    mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in IMAGENET_MEAN_STD)
    images = torch.stack([(item.pixels / 255 - mean) / std for item in pictures])
    labels = torch.tensor([item.label for item in pictures])
    expected = guide_maps(guide, images, labels)
    assert (expected.flatten(1).amax(1) == 1).sum() > 12
    stored = torch.load(files[0], weights_only=True)["maps"]
    torch.testing.assert_close(stored.float(), expected, atol=1e-3, rtol=0)
    time = files[0].stat().st_mtime_ns
    fit_fcam(model, Scenes(), guide, **options, cache=tmp_path)
    assert files[0].stat().st_mtime_ns == time


def other_pictures():
    data = Scenes()
    data.items = [(image.transpose(Image.Transpose.ROTATE_180), y) for image, y in data.items]
    return data


@pytest.mark.parametrize(
    ("data", "make", "message"),
    [
        (lambda: Scenes(16), lambda m: LayerGradCam(m, m[2]), "pictures was '24, .* is '16, "),
        (other_pictures, lambda m: LayerGradCam(m, m[2]), "pictures was"),
        (Scenes, lambda m: LayerGradCam(m, m[1]), r"guide was 'Layer Grad Cam.*layer=2.*layer=1"),
        (Scenes, lambda m: LayerClassActivationMap(m, m[2]), "guide was"),
    ],
    ids=["fewer", "others", "layer", "method"],
)
def test_maps_of_another_run_are_refused(data, make, message, tmp_path):
    model = three_stage_net().eval()
    options = SMALL | {"n_epochs": 1}
    fit_fcam(model, Scenes(), LayerGradCam(model, model[2]), **options, cache=tmp_path)
    with pytest.raises(ValueError, match=f"cache.*{message}"):
        fit_fcam(model, data(), make(model), **options, cache=tmp_path)


def test_maps_of_a_wrapper_with_other_options_are_refused(tmp_path):
    model = three_stage_net().eval()
    base = LayerGradCam(model, model[2])
    options = SMALL | {"n_epochs": 1, "cache": tmp_path}
    fit_fcam(model, Scenes(8), SESSWrapper(base, n_scales=2, window=24), **options)
    with pytest.raises(ValueError, match=r"guide was.*n_scales=2.*n_scales=3"):
        fit_fcam(model, Scenes(8), SESSWrapper(base, n_scales=3, window=24), **options)


# --- views ---------------------------------------------------------------------------------------


def test_crops_of_maps_follow_those_of_pictures():
    pictures = torch.rand(40, 3, 20, 30)
    maps = pictures[:, :1] * 2
    generator = torch.Generator().manual_seed(0)
    view = draw_crops(40, (20, 30), (12, 16), True, generator)
    cropped = view.crop(pictures)
    assert cropped.shape == (40, 3, 12, 16)
    assert torch.equal(view.crop(maps), cropped[:, :1] * 2)
    mirrored = 0
    for i in range(40):
        rows, columns = view.rows[i], view.columns[i]
        step = int(columns[1] - columns[0])
        mirrored += step == -1
        part = pictures[i, :, rows[0] : rows[-1] + 1]
        low, high = sorted((int(columns[0]), int(columns[-1])))
        part = part[..., low : high + 1]
        assert torch.equal(cropped[i], part if step == 1 else part.flip(2))
    assert 10 < mirrored < 30
    assert len({tuple(v.tolist()) for v in view.rows}) > 1


def test_orders_depend_on_seed_and_epoch_only():
    order = SeededShuffle(10, 3)
    first = list(order)
    order.set_epoch(1)
    second = list(order)
    order.set_epoch(0)
    assert first == list(order)
    assert first != second
    assert sorted(first) == list(range(10))


# --- guides --------------------------------------------------------------------------------------


def test_guide_maps_equal_those_made_by_hand():
    model = three_stage_net().eval()
    x, y = torch.rand(3, 3, 32, 32), torch.tensor([0, 1, 2])
    raw = LayerGradCam(model, model[2]).attribute(x, target=y).detach()
    low = raw.clamp(min=0).flatten(1)
    low = (low - low.amin(1, keepdim=True)) / (
        low.amax(1, keepdim=True) - low.amin(1, keepdim=True)
    )
    by_hand = nn.functional.interpolate(
        low.nan_to_num().reshape(3, 1, 4, 4), (32, 32), mode="bilinear"
    )
    torch.testing.assert_close(guide_maps(LayerGradCam(model, model[2]), x, y, (32, 32)), by_hand)
    signed = guide_maps(LayerGradCam(model, model[2]), x, y, rectify=False)
    assert signed.amin((1, 2, 3)).tolist() == [0] * 3
    assert signed.amax((1, 2, 3)).tolist() == [1] * 3


@pytest.mark.parametrize(
    "make",
    [
        lambda m: LayerClassActivationMap(m, m[2]),
        IntegratedGradients,
        lambda m: SESSWrapper(LayerGradCam(m, m[2]), n_scales=2, window=24),
    ],
    ids=["cam", "integrated gradients", "sess"],
)
def test_any_attribution_can_be_the_guide(make):
    model = three_stage_net().eval()
    fcam = fit_fcam(model, Scenes(8), make(model), **SMALL | {"n_epochs": 1})
    assert fcam.attribute(torch.rand(1, 3, 32, 32)).shape == (1, 3, 32, 32)


def test_maps_that_are_not_finite_become_zeros():
    model = three_stage_net().eval()
    maps = torch.rand(2, 1, 4, 4)
    maps[0, 0, 1, 1] = float("nan")
    result = guide_maps(
        Teacher(model, lambda x: maps), torch.rand(2, 3, 8, 8), torch.zeros(2).long()
    )
    assert (result[0] == 0).all()
    assert result[1].max() == 1


# --- what was killed -----------------------------------------------------------------------------


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    model = three_stage_net().eval()
    options = SMALL | {"n_epochs": 3}
    guide = LayerGradCam(model, model[2])
    straight = fit_fcam(model, Scenes(), guide, **options)

    class Killed(LayerGradCam):
        left = 5

        def attribute(self, *args, **kwargs):
            Killed.left -= 1
            if Killed.left < 0:
                raise KeyError("killed")
            return super().attribute(*args, **kwargs)

        @classmethod
        def get_name(cls):
            return LayerGradCam.get_name()

    with pytest.raises(KeyError, match="killed"):
        fit_fcam(model, Scenes(), Killed(model, model[2]), **options, checkpoints=tmp_path)
    assert (tmp_path / "last.ckpt").is_file()
    resumed = fit_fcam(model, Scenes(), guide, **options, checkpoints=tmp_path)
    assert equal(state(resumed.decoder), state(straight.decoder))


class Noisy(LayerGradCam):
    """A guide with noise of the global generator."""

    def attribute(self, *args, **kwargs):
        maps = super().attribute(*args, **kwargs)
        return maps + torch.rand_like(maps)


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_goes_on_to_more_epochs(cached, tmp_path):
    """Anchors of the CRF loss and noise of the guide are equal, too."""
    model = three_stage_net().eval()
    crf = DenseCRFLoss(n_anchors=8)
    options = SMALL | {"n_epochs": 3, "crf": crf, "resize": 36, "center": True}
    guide = Noisy(model, model[2])
    stored = {"cache": tmp_path / "maps"} if cached else {}
    straight = fit_fcam(model, Scenes(), guide, **options, **stored)
    options |= {"checkpoints": tmp_path / "run"} | stored
    fit_fcam(model, Scenes(), guide, **options | {"n_epochs": 2})
    torch.rand(5)
    resumed = fit_fcam(model, Scenes(), guide, **options)
    assert equal(state(resumed.decoder), state(straight.decoder))
    with pytest.raises(ValueError, match=r"n_epochs.* is 1.*run of 3"):
        fit_fcam(model, Scenes(), guide, **options | {"n_epochs": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.02}, "lr was 0.01 and is 0.02"),
        ({"crf": DenseCRFLoss(side=8)}, "crf was"),
        ({"center": True}, "center was False"),
        ({"resize": 40}, "size was"),
        ({"data": other_pictures}, None),
        ({"data": lambda: Scenes(16)}, "pictures was"),
        ({"classifier": 1}, "classifier was"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(change, message, tmp_path):
    options = SMALL | {"n_epochs": 1, "checkpoints": tmp_path}
    model = three_stage_net().eval()
    fit_fcam(model, Scenes(), LayerGradCam(model, model[2]), **options)
    model = three_stage_net(change.pop("classifier", 0)).eval()
    data = change.pop("data", Scenes)()
    if message is None:  # pictures may come out at random, where they are not stored
        fit_fcam(model, data, LayerGradCam(model, model[2]), **options)
        return
    with pytest.raises(ValueError, match=f"checkpoints.*{message}"):
        fit_fcam(model, data, LayerGradCam(model, model[2]), **options | change)


def test_ctrl_c_is_an_interrupt(tmp_path):
    """Lightning alone would end the process, and ignore the next Ctrl-C."""
    model = three_stage_net().eval()
    handler = signal.getsignal(signal.SIGINT)

    def interrupted(images):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_fcam(model, Scenes(8), Teacher(model, interrupted), **SMALL, checkpoints=tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_run_with_another_crf_loss_is_refused(tmp_path):
    model = three_stage_net().eval()
    guide, options = LayerGradCam(model, model[2]), SMALL | {"n_epochs": 1}
    fit_fcam(model, Scenes(8), guide, **options, cache=tmp_path / "a", checkpoints=tmp_path / "b")
    other = options | {"normalize": ((0.5,) * 3, (0.5,) * 3)}
    for folder in ({"cache": tmp_path / "a"}, {"checkpoints": tmp_path / "b"}):
        with pytest.raises(ValueError, match=rf"{next(iter(folder))}.*normalize was"):
            fit_fcam(model, Scenes(8), guide, **other, **folder)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    model = three_stage_net().eval()

    class Breaks(nn.Module):
        calls = 0

        def forward(self, foreground, images):
            Breaks.calls += 1
            return foreground.mean() * (float("nan") if Breaks.calls > 4 else 1)

    options = SMALL | {"crf": Breaks(), "warmup": 0, "n_epochs": 4}
    with pytest.raises(FloatingPointError, match=r"epoch 1, batch 1 .*crf nan"):
        fit_fcam(model, Scenes(), LayerGradCam(model, model[2]), **options, checkpoints=tmp_path)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert saved["epoch"] == 0


class Bends(torch.autograd.Function):
    """A function with a finite value and a gradient that is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return torch.full((8, 1, 32, 32), float("nan"))


def test_weights_that_are_not_finite_are_not_stored(tmp_path):
    """No loss follows the last step of an epoch, so that the weights are checked themselves."""
    model = three_stage_net().eval()

    class Breaks(nn.Module):
        calls = 0

        def forward(self, foreground, images):
            Breaks.calls += 1
            return Bends.apply(foreground) if Breaks.calls == 6 else foreground.sum() * 0

    options = SMALL | {"crf": Breaks(), "warmup": 0, "n_epochs": 3}
    with pytest.raises(FloatingPointError, match=r"epoch 1, after its last batch"):
        fit_fcam(model, Scenes(), LayerGradCam(model, model[2]), **options, checkpoints=tmp_path)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["epoch"] == 0
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())


@pytest.mark.parametrize(
    ("maps", "message", "code"),
    [
        (torch.zeros(8, 1, 4, 4), "Teacher gave no seeds", "no_seeds"),
        (torch.full((8, 1, 4, 4), float("nan")), "Teacher gave no seeds", "no_seeds"),
        (torch.rand(8, 1, 1, 1), "Teacher gives maps of a single pixel", "single_cell"),
    ],
    ids=["flat", "nan", "one pixel"],
)
def test_a_guide_without_seeds_is_refused(maps, message, code):
    model = three_stage_net().eval()
    with pytest.raises(ArgumentError, match=f"`guide` {message}") as caught:
        fit_fcam(model, Scenes(8), Teacher(model, lambda x: maps), **SMALL)
    assert (caught.value.argument, caught.value.code) == ("guide", code)


def test_a_collapsed_decoder_gives_a_warning(tmp_path):
    """A finished run that is called again warns again."""
    model = three_stage_net().eval()
    options = SMALL | {"checkpoints": tmp_path}
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"has collapsed.*seeds was 0\.[67]"):
            fit_fcam(model, Scenes(8), Teacher(model, lambda x: torch.rand(8, 1, 8, 8)), **options)


# --- pictures ------------------------------------------------------------------------------------


def test_pictures_may_have_any_form():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    as_bytes = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    data = [(image, 1), (as_bytes, 2, "more"), (as_bytes / 255, torch.tensor(3))]
    pictures = PictureDataset(data, (4, 4), 4)
    for i, label in enumerate((1, 2, 3)):
        item = pictures[i]
        assert torch.equal(item.pixels, as_bytes)
        assert item[1:] == (label, i, True)
    grey = PictureDataset([(Image.new("L", (9, 6), 7), 0)], (4, 4))[0]
    assert (grey.pixels == 7).all()


class Broken(Scenes):
    def __init__(self):
        super().__init__()
        self.samples = [(f"{i}.jpg", 0) for i in range(24)]

    def __getitem__(self, index):
        if index == 3:
            raise OSError("image file is truncated")
        if index == 4:
            raise SyntaxError("broken PNG file")
        return super().__getitem__(index)


def test_pictures_that_do_not_decode_are_left_out_named_and_counted():
    model = three_stage_net().eval()
    with pytest.warns(UserWarning, match="cannot be read") as caught:
        result = fit_fcam(model, Broken(), LayerGradCam(model, model[2]), **SMALL)
    messages = [str(warning.message) for warning in caught]
    assert any(message.startswith("3.jpg cannot be read") for message in messages)
    assert "2 of 24 pictures cannot be read and are left out: 3.jpg, 4.jpg" in messages
    assert torch.isfinite(result.foreground(torch.rand(1, 3, 32, 32))).all()


def test_pictures_that_open_but_do_not_decode_are_left_out(tmp_path):
    """`Image.open` does not decode yet. Too many open files are an error of the machine instead."""
    Scenes().items[0][0].resize((200, 200)).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])

    class Opened(Scenes):
        def __getitem__(self, index):
            return Image.open(tmp_path / ("cut.jpg" if index == 1 else "whole.jpg")), 0

    with pytest.warns(UserWarning, match="picture 1 cannot be read"):
        read = [PictureDataset(Opened(), (32, 32))[i].is_read for i in range(3)]
    assert read == [True, False, True]

    class Exhausted(Scenes):
        def __getitem__(self, index):
            raise OSError(errno.EMFILE, "Too many open files")

    with pytest.raises(OSError, match="Too many"):
        PictureDataset(Exhausted(), (32, 32))[0]


@pytest.mark.parametrize(
    ("picture", "error", "message"),
    [
        (torch.full((3, 8, 8), 1.5), ValueError, "normalised"),
        (torch.full((3, 8, 8), float("nan")), ValueError, "normalised"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), ValueError, "int64"),
        (torch.zeros(8, 8), ValueError, r"\(8, 8\)"),
        ("a.jpg", TypeError, "str"),
    ],
)
def test_entries_without_a_picture_are_refused(picture, error, message):
    with pytest.raises(error, match=f"`data`: picture 0: .*{message}"):
        PictureDataset([(picture, 0)], (8, 8))[0]
    with pytest.raises(TypeError, match="`data`: picture 0: entries must be"):
        PictureDataset([{"image": picture}], (8, 8))[0]


@pytest.mark.parametrize(
    "entry", [torch.rand(3, 8, 8), (torch.rand(3, 8, 8),), [Image.new("L", (8, 8)), "a"]]
)
def test_entries_without_a_label_are_refused(entry):
    with pytest.raises((TypeError, ValueError), match="`data`: picture 0: "):
        PictureDataset([entry], (8, 8))[0]


def test_grey_pictures_are_repeated_over_the_channels():
    grey = torch.arange(0, 256, 4, dtype=torch.uint8).reshape(1, 8, 8)
    deep = Image.fromarray(grey[0].numpy().astype(np.uint16) * 257)
    assert deep.mode.startswith("I;16")
    for picture in (grey, grey / 255, Image.fromarray(grey[0].numpy()), deep):
        assert torch.equal(PictureDataset([(picture, 0)], (8, 8))[0].pixels, grey.expand(3, 8, 8))


def test_16_bit_greys_are_rounded_to_bytes():
    deep = np.array([[0, 128, 129, 65406, 65407, 65535]], dtype=np.uint16)
    pixels = PictureDataset([(Image.fromarray(deep), 0)], (1, 6))[0].pixels
    assert pixels[0].tolist() == [[0, 0, 1, 254, 255, 255]]


def test_a_classifier_of_grey_pictures_is_trained_on_grey_ones():
    model = three_stage_net().eval()
    model[0][0] = nn.Conv2d(1, 6, 3, 2, 1)
    guide = Teacher(model, brightness)
    data = [(torch.full((1, 32, 32), 102, dtype=torch.uint8), 0)] * 8
    with pytest.raises(ValueError, match="gave no seed"):
        fit_fcam(model, data, guide, **SMALL, normalize=((0.2,), (0.5,)))
    torch.testing.assert_close(guide.calls[0][0], torch.full((8, 1, 32, 32), 0.4))
    fcam = fit_fcam(model, Scenes(8), guide, **SMALL, normalize=((0.5,), (0.5,)))
    assert fcam.attribute(torch.rand(1, 1, 32, 32)).shape == (1, 1, 32, 32)


# --- what surrounds a run ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_classifiers_may_have_another_precision(dtype):
    model = three_stage_net().eval().to(dtype)
    fcam = fit_fcam(model, Scenes(8), LayerGradCam(model, model[2]), **SMALL)
    assert {p.dtype for p in fcam.decoder.parameters()} == {torch.float32}
    assert fcam.attribute(torch.rand(1, 3, 32, 32, dtype=dtype)).dtype == dtype


def test_the_grad_mode_stays_as_it_was():
    model = three_stage_net().eval()
    guide = LayerGradCam(model, model[2])
    with torch.no_grad():
        inside = fit_fcam(model, Scenes(8), guide, **SMALL)
        assert not torch.is_grad_enabled()
    assert equal(state(inside.decoder), state(fit_fcam(model, Scenes(8), guide, **SMALL).decoder))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        fit_fcam(model, Scenes(8), guide, **SMALL)


def test_buffers_that_count_calls_are_restored():
    model = three_stage_net().eval()
    model[1].add_module("counts", CallCounter())
    fit_fcam(model, Scenes(8), LayerGradCam(model, model[2]), **SMALL)
    assert model[1].counts.calls == 0


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_out_of_range_are_refused(label):
    model = three_stage_net().eval()
    data = [(Image.new("RGB", (32, 32)), label)]
    with pytest.raises(ValueError, match=rf"label of picture 0 is {label}"):
        fit_fcam(model, data, LayerGradCam(model, model[2]), **SMALL)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"data": []}, ValueError, "data"),
        ({"guide": "cam"}, TypeError, "guide"),
        ({"guide": LayerGradCam(three_stage_net(1), three_stage_net(1)[2])}, ValueError, "guide"),
        ({"classifier": lambda x: x}, TypeError, "classifier"),
        ({"n_epochs": 0}, ValueError, "n_epochs"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"size": (32, 32, 32)}, ValueError, "size"),
        ({"resize": 16}, ValueError, "resize"),
        ({"lr": 0}, ValueError, "lr"),
        ({"crf": 3.0}, TypeError, "crf"),
        ({"seeds": 5}, TypeError, "seeds"),
        ({"seed": "a"}, TypeError, "seed"),
        ({"trainer": 5}, TypeError, "trainer"),
        ({"normalize": ((0.5,) * 4, (0.5,) * 4)}, ValueError, "normalize"),
        ({"normalize": ((0.5,) * 3, (0.0,) * 3)}, ValueError, "normalize"),
        ({"normalize": 0.5}, ValueError, "normalize"),
        ({"classifier": three_stage_net()[:3]}, ValueError, "guide"),
        ({"crf_weight": -1}, ValueError, "crf_weight"),
        ({"layers": ["0", "nowhere"]}, ValueError, "nowhere"),
        ({"size": 1}, ValueError, "layers"),
    ],
)
def test_invalid_arguments_are_refused(change, error, named):
    model = three_stage_net().eval()
    arguments = {"classifier": model, "data": Scenes(8), "guide": LayerGradCam(model, model[2])}
    with pytest.raises(error, match=named):
        fit_fcam(**arguments | SMALL | change)


def test_models_without_logits_are_refused():
    class Named(nn.Sequential):
        def forward(self, x):
            return {"out": super().forward(x)}

    model = Named(*three_stage_net()).eval()
    with pytest.raises(ValueError, match=r"`classifier` must give logits.*dict"):
        fit_fcam(model, Scenes(8), IntegratedGradients(model), **SMALL)


def test_a_guide_at_a_layer_of_another_model_is_refused():
    model, other = three_stage_net().eval(), three_stage_net(1).eval()
    for guide in (
        LayerGradCam(model, other[2]),
        SESSWrapper(LayerGradCam(other, other[2]), n_scales=2, window=24),
    ):
        with pytest.raises(
            ValueError, match=r"`guide` Layer Grad Cam (is at a layer|explains anoth)"
        ):
            fit_fcam(model, Scenes(8), guide, **SMALL)


def test_the_module_alone_runs_in_lightning():
    from lightning import Trainer
    from torch.utils.data import DataLoader

    model = three_stage_net().eval()
    decoder = FCAMDecoder.reading(model, torch.rand(1, 3, 32, 32), widths=(8, 8, 8))
    module = FCAMModule(model, decoder, LayerGradCam(model, model[2]), (32, 32))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(PictureDataset(Scenes(8), (32, 32)), 4))
    assert not any(name.startswith("_frozen") for name in module.state_dict())
    assert FCAM(model, decoder.eval()).attribute(torch.rand(1, 3, 32, 32)).shape == (1, 3, 32, 32)


class Kept(Callback):
    """Writes the decoder of each process to a file."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        weights = dict(pl_module.decoder.named_parameters())
        torch.save(weights, self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_two_processes_train_one_decoder(strategy, tmp_path):
    """Two CPU processes (gloo): the classifier stays, and the decoder learns from both halves."""
    model = three_stage_net().eval()
    before = state(model)
    guide = LayerGradCam(model, model[2])
    options = SMALL | {"batch_size": 4}
    trainer = {"devices": 2, "strategy": strategy, "callbacks": Kept(tmp_path)}
    result = fit_fcam(model, Scenes(16), guide, **options, trainer=trainer)
    assert equal(state(model), before)
    # Without shared gradients the two decoders would differ, as each saw another half.
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert equal(*ranks)
    assert equal(ranks[0], dict(result.decoder.named_parameters()))
    alone = fit_fcam(model, Scenes(16), guide, **options)
    assert not equal(state(result.decoder), state(alone.decoder))
    counts = [f.decoder.blocks[0][1].num_batches_tracked.item() for f in (result, alone)]
    assert counts == [4, 8]  # each process saw half of the batches, in each of two epochs
    assert torch.isfinite(result.foreground(torch.rand(1, 3, 32, 32))).all()


# --- a validation set ----------------------------------------------------------------------------


def validated(tmp_path=None, **options):
    """The result of a run with a validation set of boxes."""
    model = three_stage_net().eval()
    scenes = TexturedEllipses(12, 5, (32, 32))
    guide = LayerGradCam(model, model[2])
    options = SMALL | {"n_epochs": 4, "lr": 0.2, "validation": list(scenes)} | options
    return fit_fcam(model, Scenes(), guide, **options, checkpoints=tmp_path)


def max_box_acc(fcam):
    scenes = TexturedEllipses(12, 5, (32, 32)).batch()
    images = (
        scenes.pixels / 255 - torch.tensor(IMAGENET_MEAN_STD[0])[:, None, None]
    ) / torch.tensor(IMAGENET_MEAN_STD[1])[:, None, None]
    metric = MaxBoxAcc(convention="wsolevaluation")
    metric.update(fcam.foreground(images)[:, 0], [box[None] for box in scenes.boxes])
    return metric.compute().item()


def test_boxes_select_the_epoch_and_nothing_else(tmp_path):
    """The result is the best of the decoders of runs of 1, 2, ... epochs without boxes."""
    runs = [validated(validation=None, n_epochs=n) for n in (1, 2, 3, 4)]
    scores = [max_box_acc(run) for run in runs]
    best = scores.index(max(scores))
    assert best < 3  # otherwise the last epoch would do
    result = validated(tmp_path)
    assert equal(state(result.decoder), state(runs[best].decoder))
    again = validated(tmp_path)  # there is nothing left to train
    assert equal(state(again.decoder), state(runs[best].decoder))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["best"]["epoch"] == best
    assert saved["best"]["score"] == pytest.approx(scores[best])


def test_boxes_are_scaled_with_their_pictures():
    image = Image.new("RGB", (40, 20))
    boxes = [[4, 4, 20, 16], [0, 0, 39, 19]]
    for entry in ((image, 0, boxes), (torch.zeros(3, 20, 40), 0, torch.tensor(boxes))):
        pixels, result = BoxedPictures([entry], (10, 10))[0]
        assert pixels.shape == (3, 10, 10)
        assert result.tolist() == [[1, 2, 5, 8], [0, 0, 9, 9]]


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ([], "validation"),
        ([(Image.new("RGB", (32, 32)), 0)], "validation.*no boxes"),
        ([(Image.new("RGB", (32, 32)), 0, torch.zeros(0, 4))], r"validation.*\(0, 4\)"),
    ],
)
def test_a_validation_set_without_boxes_is_refused(validation, message):
    with pytest.raises(ValueError, match=message):
        validated(validation=validation, n_epochs=1)
