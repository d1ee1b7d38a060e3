"""Quantus beside our metrics: the same where it is right, and where it is not."""

import numpy as np
import pytest
import torch
from captum.attr import Saliency

from captum_ext.metrics import deletion, energy_pointing_game, pointing_game
from tests.networks import flat_net

quantus = pytest.importorskip("quantus")

SIDE, STEP = 16, 32
PLAIN = {"abs": False, "normalise": False, "disable_warnings": True}


@pytest.fixture
def arguments():
    """Arguments of Quantus's metrics; the maps are Captum's."""
    model = flat_net()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(5, 3, SIDE, SIDE, generator=generator)
    masks = torch.zeros(5, 1, SIDE, SIDE, dtype=torch.bool)
    for i in range(5):
        masks[i, 0, :, i : i + 7] = True

    def explain(model, inputs, targets, **kwargs):
        inputs, targets = torch.as_tensor(inputs), torch.as_tensor(targets)
        return Saliency(model).attribute(inputs, targets).sum(1, keepdim=True).numpy()

    return {
        "model": model,
        "x_batch": images.numpy(),
        "y_batch": np.arange(5) % 4,
        "s_batch": masks.numpy(),
        "explain_func": explain,
        "device": "cpu",
    }


def ours(arguments):
    maps = arguments["explain_func"](arguments["model"], arguments["x_batch"], arguments["y_batch"])
    return torch.as_tensor(maps), torch.as_tensor(arguments["s_batch"])


def test_the_pointing_game_is_ours_without_tolerance(arguments):
    maps, masks = ours(arguments)
    hits = pointing_game(maps, masks, tolerance=0)
    assert hits.tolist() == quantus.PointingGame(**PLAIN)(**arguments)
    assert 0 < hits.sum() < 5
    maps[:] = masks
    assert pointing_game(maps, masks, tolerance=0).all()


def test_the_mass_in_the_mask_is_our_energy(arguments):
    scores = quantus.RelevanceMassAccuracy(**PLAIN)(**arguments)
    assert scores == pytest.approx(energy_pointing_game(*ours(arguments)).tolist(), rel=1e-5)
    assert len(set(scores)) == 5


def test_pixel_flipping_is_our_deletion_channel_by_channel(arguments):
    """Quantus hides the channels of a pixel one by one: every third point is one of ours."""
    metric = quantus.PixelFlipping(features_in_step=STEP, perturb_baseline=0.0, **PLAIN)
    theirs = np.array(metric(**arguments))
    maps, _ = ours(arguments)
    images, target = torch.as_tensor(arguments["x_batch"]), arguments["y_batch"].tolist()
    mine = deletion(arguments["model"], images, maps, target, step=STEP)
    assert theirs.shape == (5, 3 * SIDE * SIDE // STEP)
    np.testing.assert_allclose(theirs[:, 2::3], mine.scores[:, 1:], atol=1e-5)
    assert mine.scores.std() > 0.02


def test_without_an_object_quantus_counts_a_hit_and_we_refuse(arguments):
    arguments["s_batch"] = np.zeros_like(arguments["s_batch"])
    assert quantus.PointingGame(**PLAIN)(**arguments) == [True] * 5
    with pytest.raises(ValueError, match="are empty"):
        pointing_game(*ours(arguments))
