"""Training of the decoder: the classifier stays, the decoder learns, and killed runs go on."""

import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from captum.attr import LayerGradCam
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from captum_ext._data.pictures import PictureDataset
from captum_ext._data.pixels import to_byte_tensor
from captum_ext.datasets import TexturedEllipses
from captum_ext.perception import (
    LayerEncoder,
    PerceptionDecoder,
    PerceptionModule,
    PerceptionVisualization,
    deep_similarity,
    fit_perception,
    structural_similarity,
)
from tests.networks import dropout_net

SMALL = {
    "size": 32,
    "widths": (8, 4),
    "convolutions": (1, 1),
    "batch_size": 8,
    "n_epochs": 2,
    "show_progress": False,
}


@pytest.fixture(autouse=True)
def quiet():
    """Ignore Lightning's advice about workers and devices."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield


def pictures(n=24, seed=0):
    return [scene.image for scene in TexturedEllipses(n, seed, (32, 32))]


def encoder_of(model=None, **options):
    return LayerEncoder(model or dropout_net(), "1", **options)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def as_tensor(images):
    return torch.stack([to_byte_tensor(image) for image in images]) / 255


class Losses(Callback):
    """Records the loss of each step."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found.append(outputs["loss"].item())


# --- learning ------------------------------------------------------------------------------------


def test_the_loss_falls_on_eight_images_and_the_classifier_stays(trace_free):
    model = dropout_net()
    losses = Losses()
    options = SMALL | {"n_epochs": 60, "lr": 1e-2, "trainer": {"callbacks": [losses]}}
    with trace_free(model):
        decoder = fit_perception(encoder_of(model), pictures(8), **options)
    assert len(losses.found) == 60
    assert losses.found[-1] < losses.found[0] - 0.3
    assert all(weight.grad is None for weight in model.parameters())
    assert not decoder.training


def test_reconstructions_of_held_out_pictures_are_better_than_the_mean_picture(tmp_path):
    """SSIM and latents are better for each of 60 new pictures, not only on average.

    The layer keeps much of the picture, so that little training is needed.
    """
    train, test = pictures(160, seed=1), as_tensor(pictures(60, seed=2))
    model = dropout_net()
    encoder = LayerEncoder(model, "0")
    before = state(model)
    options = {"n_epochs": 12, "lr": 1e-2, "widths": (16,), "convolutions": (1,)}
    decoder = fit_perception(encoder, train, **SMALL | options)
    assert equal(state(model), before)
    images = encoder.images(test)
    pv = PerceptionVisualization(LayerGradCam(model, model[0]), encoder, decoder)
    similarity, distance = pv.quality(images)
    mean = as_tensor(train).mean(0, keepdim=True).expand_as(test)
    baseline = structural_similarity(test, mean).mean(1)
    with torch.no_grad():
        apart = deep_similarity(encoder(images), encoder(encoder.images(mean)))
    assert similarity.mean() > baseline.mean() + 0.1
    assert distance.mean() < 0.25 * apart.mean()
    assert (similarity > baseline).float().mean() > 0.8
    assert (distance < apart).all()


def test_a_training_step_equals_one_made_by_hand():
    """The gradient of the loss through the classifier, and one step of Adam, are written out."""
    model, images = dropout_net(), pictures(8)
    encoder = encoder_of(model)
    trained = fit_perception(encoder, images, **SMALL | {"n_epochs": 1, "lr": 0.01})
    x = as_tensor(images)
    start = {}

    class Kept(Callback):
        def on_train_start(self, trainer, pl_module):
            start.update(state(pl_module.decoder))

    fit_perception(
        encoder, images, **SMALL | {"n_epochs": 1, "lr": 0.01, "trainer": {"callbacks": [Kept()]}}
    )
    decoder = PerceptionDecoder.reading(encoder, encoder.images(x), (8, 4), (1, 1))
    decoder.load_state_dict(start)
    from kornia.metrics import ssim

    z = model[:2](encoder.images(x)).detach()
    y = decoder(z)
    again = model[:2](encoder.images(y))
    similarity = ssim(x, y, 11, padding="valid").mean((0, 2, 3)).sum()
    loss = 0.2 * (x - y).pow(2).mean() + 0.4 * (again - z).pow(2).mean() - 0.4 * similarity
    optimizer = torch.optim.Adam(decoder.parameters(), 0.01)
    loss.backward()
    optimizer.step()
    for name, value in decoder.state_dict().items():
        if value.is_floating_point() and not re.fullmatch(r"blocks\.\d\.0\.bias", name):
            worst = (value - trained.state_dict()[name]).abs()
            # Where the gradient is zero up to rounding, Adam's step has a random sign: as in the
            # biases in front of batch normalisation.
            assert (worst < 1e-4).float().mean() > 0.97, name


def test_each_weight_scales_its_part_of_the_loss():
    """A fit to pixels alone is nearer in pixels than a fit to SSIM alone."""
    model, images = dropout_net(), pictures(16)
    encoder = encoder_of(model)
    x = as_tensor(images)
    error = {}
    for weights in ((1, 0, 0), (0, 0, 1), (0, 1, 0)):
        options = SMALL | {"n_epochs": 40, "lr": 1e-2, "weights": weights}
        decoder = fit_perception(encoder, images, **options)
        with torch.no_grad():
            z = encoder(encoder.images(x))
            y = decoder(z)
            error[weights] = (
                (x - y).pow(2).mean().item(),
                deep_similarity(z, encoder(encoder.images(y))).mean().item(),
                -structural_similarity(x, y).mean().item(),
            )
    for part, best in enumerate(((1, 0, 0), (0, 1, 0), (0, 0, 1))):
        assert min(error, key=lambda weights: error[weights][part]) == best


def test_a_classifier_in_train_mode_runs_in_eval_mode_and_stays_in_train_mode(trace_free):
    model = dropout_net()
    straight = fit_perception(encoder_of(model), pictures(8), **SMALL)
    model.train()
    with trace_free(model):
        result = fit_perception(encoder_of(model), pictures(8), **SMALL)
    assert equal(state(result), state(straight))


def test_frozen_parameters_grad_modes_and_random_state_stay(trace_free):
    model = dropout_net()
    straight = fit_perception(encoder_of(model), pictures(8), **SMALL)
    model.requires_grad_(False)
    torch.rand(7)
    with torch.no_grad(), trace_free(model):
        result = fit_perception(encoder_of(model), pictures(8), **SMALL)
    assert equal(state(result), state(straight))
    other = fit_perception(encoder_of(model), pictures(8), **SMALL | {"seed": 1})
    assert not equal(state(other), state(straight))


def test_a_training_that_fails_leaves_no_trace(trace_free):
    class Fails(Callback):
        def on_train_batch_end(self, *args, **kwargs):
            raise KeyError("killed")

    model = dropout_net().train()
    with trace_free(model), pytest.raises(KeyError, match="killed"):
        fit_perception(
            encoder_of(model), pictures(8), **SMALL | {"trainer": {"callbacks": Fails()}}
        )


def fit_by_trainer(module, images):
    loader = DataLoader(PictureDataset(images, (32, 32), has_labels=False), 4)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(max_epochs=1, enable_checkpointing=False, accelerator="cpu", **options).fit(
        module, loader
    )


def test_the_module_alone_runs_in_lightning(trace_free):
    """The classifier runs in eval mode, and frozen weights of the decoder stay."""
    model = dropout_net().train()
    encoder = encoder_of(model)
    decoder = PerceptionDecoder.reading(
        encoder_of(dropout_net()), torch.rand(1, 3, 32, 32), (8, 4), (1, 1)
    )
    decoder.head.requires_grad_(False)
    before = state(decoder)
    module = PerceptionModule(encoder, decoder, lr=0.01)
    with trace_free(model, keeps_rng=False):
        fit_by_trainer(module, pictures(8))
    after = state(decoder)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "blocks.0.0.weight" in moved
    assert not moved & {"head.weight", "head.bias"}


# --- data ----------------------------------------------------------------------------------------


def test_pictures_may_have_any_form():
    images = pictures(8)
    forms = [
        images,
        [(image, 3) for image in images],
        [(image, "no label") for image in images],
        list(TexturedEllipses(8, 0, (32, 32))),
        list(as_tensor(images)),
        list((255 * as_tensor(images)).round().byte()),
    ]
    result = [state(fit_perception(encoder_of(), form, **SMALL)) for form in forms]
    assert all(equal(result[0], other) for other in result[1:])


def test_a_classifier_of_grey_pictures_is_trained_on_grey_ones():
    encoder = encoder_of(dropout_net(channels=1), normalize=((0.5,), (0.5,)))
    decoder = fit_perception(encoder, pictures(8), **SMALL)
    assert decoder.colors == 1
    assert decoder(encoder(encoder.images(as_tensor(pictures(2))))).shape == (2, 1, 32, 32)


def test_pictures_that_cannot_be_read_are_left_out():
    class Some(list):
        def __getitem__(self, index):
            if index % 2:
                raise OSError("truncated")
            return super().__getitem__(index)

    with pytest.warns(UserWarning, match="4 of 8 pictures cannot be read and are left out"):
        fit_perception(encoder_of(), Some(pictures(8)), **SMALL | {"batch_size": 1})


def test_data_without_a_readable_picture_are_refused(tmp_path):
    """A finished run, which reads no picture any more, is refused, too."""

    class Unreadable(list):
        def __getitem__(self, index):
            raise OSError("truncated")

    stored = SMALL | {"checkpoints": tmp_path, "n_epochs": 1}
    for _ in range(2):
        with pytest.raises(ValueError, match="none of its 8 pictures can be read"):
            fit_perception(encoder_of(), Unreadable(pictures(8)), **stored)


def test_sizes_need_not_be_multiples_of_the_stride():
    decoder = fit_perception(encoder_of(), pictures(4), **SMALL | {"size": (33, 46), "n_epochs": 1})
    assert decoder.stride == 4


# --- what was killed -----------------------------------------------------------------------------


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    options = SMALL | {"n_epochs": 3}
    straight = fit_perception(encoder_of(), pictures(), **options)

    class Killed(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args, **kwargs):
            if trainer.global_step == 5:
                raise KeyError("killed")

    stored = options | {"checkpoints": tmp_path}
    with pytest.raises(KeyError, match="killed"):
        fit_perception(encoder_of(), pictures(), **stored | {"trainer": {"callbacks": Killed()}})
    assert (tmp_path / "last.ckpt").is_file()
    torch.rand(9)
    resumed = fit_perception(encoder_of(), pictures(), **stored)
    assert equal(state(resumed), state(straight))
    more = fit_perception(encoder_of(), pictures(), **stored | {"n_epochs": 4})
    assert not equal(state(more), state(straight))
    with pytest.raises(ValueError, match=r"n_epochs.* is 3.*run of 4"):
        fit_perception(encoder_of(), pictures(), **stored)


def test_a_resumed_run_with_workers_has_the_same_order(tmp_path):
    """Lightning starts workers before it sets the epoch."""
    options = SMALL | {"n_epochs": 2}
    straight = fit_perception(encoder_of(), pictures(16), **options)
    stored = options | {"checkpoints": tmp_path, "num_workers": 1}
    fit_perception(encoder_of(), pictures(16), **stored | {"n_epochs": 1})
    resumed = fit_perception(encoder_of(), pictures(16), **stored)
    assert equal(state(resumed), state(straight))


SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from tests.perception.test_training import SMALL, encoder_of, pictures
from captum_ext.perception import fit_perception
fit_perception(encoder_of(), pictures(), **SMALL | {"n_epochs": 400, "checkpoints": sys.argv[1]})
"""


def test_a_run_that_got_sigkill_goes_on_to_the_same_weights(tmp_path):
    """A process is killed during the training, and the next one goes on."""
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    file, until = tmp_path / "last.ckpt", time.monotonic() + 120
    while not file.is_file() and run.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    done = torch.load(file, weights_only=True)["epoch"] + 1
    options = SMALL | {"n_epochs": done + 2}
    resumed = fit_perception(encoder_of(), pictures(), **options, checkpoints=tmp_path)
    straight = fit_perception(encoder_of(), pictures(), **options)
    assert equal(state(resumed), state(straight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (8, 8)}, r"widths was \[8, 4\] and is \[8, 8\]"),
        ({"convolutions": (2, 1)}, "convolutions was"),
        ({"weights": (0.4, 0.0, 0.6)}, "weights was"),
        ({"lr": 1e-3}, "lr was"),
        ({"batch_size": 4}, "batch_size was 8 and is 4"),
        ({"seed": 5}, "seed was"),
        ({"size": 36}, "size was"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(change, message, tmp_path):
    stored = SMALL | {"checkpoints": tmp_path, "n_epochs": 1}
    fit_perception(encoder_of(), pictures(8), **stored)
    with pytest.raises(ValueError, match=f"`checkpoints` has another run's: .*{message}"):
        fit_perception(encoder_of(), pictures(8), **stored | change)


def test_a_checkpoint_of_another_classifier_layer_or_data_is_refused(tmp_path):
    stored = SMALL | {"checkpoints": tmp_path, "n_epochs": 1}
    fit_perception(encoder_of(), pictures(8), **stored)
    with pytest.raises(ValueError, match="classifier was"):
        fit_perception(encoder_of(dropout_net(1)), pictures(8), **stored)
    with pytest.raises(ValueError, match="layer was '1' and is '0'"):
        fit_perception(
            LayerEncoder(dropout_net(), "0"),
            pictures(8),
            **stored | {"widths": [8], "convolutions": [1]},
        )
    with pytest.raises(ValueError, match="pictures was"):
        fit_perception(encoder_of(), pictures(8, seed=3), **stored)


class Rank(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        weights = dict(pl_module.decoder.named_parameters())
        torch.save(weights, self.folder / f"{trainer.global_rank}.pt")


def test_two_processes_train_one_decoder(tmp_path):
    """Without shared gradients the two CPU processes (gloo) would differ, as each has a half."""
    trainer = {"devices": 2, "strategy": "ddp_fork", "callbacks": Rank(tmp_path)}
    options = SMALL | {"batch_size": 4}
    result = fit_perception(encoder_of(), pictures(16), **options, trainer=trainer)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert equal(*ranks)
    assert equal(ranks[0], dict(result.named_parameters()))
    alone = fit_perception(encoder_of(), pictures(16), **options)
    assert not equal(state(alone), state(result))


# --- what is wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n_epochs": 0}, ValueError, "`n_epochs`"),
        ({"batch_size": 0}, ValueError, "`batch_size`"),
        ({"size": 0}, ValueError, "`size`"),
        ({"size": (1, 2, 3)}, ValueError, "`size`"),
        ({"size": 8}, ValueError, "at least 11 x 11"),
        ({"lr": 0.0}, ValueError, "`lr`"),
        ({"weights": (0, 0, 0)}, ValueError, "`weights`"),
        ({"weights": (1, 1)}, ValueError, "`weights`"),
        ({"weights": (1, -1, 1)}, ValueError, "`weights`"),
        ({"widths": (8,)}, ValueError, "`widths` must be 2 numbers"),
        ({"seed": "0"}, TypeError, "`seed`"),
        ({"trainer": 3}, TypeError, "`trainer`"),
        ({"lr": 1e30}, FloatingPointError, "not finite in epoch"),
    ],
)
def test_invalid_arguments_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        fit_perception(encoder_of(), pictures(8), **SMALL | change)


def test_invalid_encoders_data_and_modes_are_refused():
    with pytest.raises(TypeError, match="`encoder` must be a LayerEncoder"):
        fit_perception(dropout_net(), pictures(8), **SMALL)
    with pytest.raises(
        ValueError, match=r"got a path: pass torchvision's ImageFolder\('pictures'\)"
    ):
        fit_perception(encoder_of(), "pictures", **SMALL)
    with pytest.raises(ValueError, match="`data` must have a length"):
        fit_perception(encoder_of(), [], **SMALL)
    with pytest.raises(TypeError, match="picture 0"):
        fit_perception(encoder_of(), ["a.png"], **SMALL)
    with pytest.raises(ValueError, match="no space to decode"):
        fit_perception(LayerEncoder(dropout_net(), "4"), pictures(8), **SMALL)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        fit_perception(encoder_of(), pictures(8), **SMALL)


@pytest.mark.gpu
def test_the_decoder_is_trained_on_the_classifiers_device():
    model = dropout_net().cuda()
    decoder = fit_perception(encoder_of(model), pictures(), **SMALL | {"n_epochs": 8, "lr": 1e-2})
    assert next(decoder.parameters()).is_cuda
    straight = fit_perception(encoder_of(), pictures(), **SMALL | {"n_epochs": 8, "lr": 1e-2})
    x = as_tensor(pictures(8, 3))
    encoder = encoder_of(model)
    ours = decoder(encoder(encoder.images(x.cuda()))).cpu()
    theirs = straight(encoder_of()(encoder_of().images(x)))
    assert structural_similarity(ours, theirs).mean() > 0.9
