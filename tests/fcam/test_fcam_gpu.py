"""F-CAM on a GPU gives the seeds, losses and maps of a CPU, and files go from one to the other."""

import copy
import warnings

import pytest
import torch
from captum.attr import LayerGradCam
from torch import nn

from captum_ext.attr import FCAM
from captum_ext.datasets import TexturedEllipses
from captum_ext.fcam import (
    DenseCRFLoss,
    LocalCRFLoss,
    SeedSampler,
    fit_fcam,
    partial_cross_entropy,
    size_loss,
)
from tests.networks import two_stage_net

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def trained(model):
    scenes = TexturedEllipses(16, 0, (32, 32))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", "The decoder has learned nothing")
        return fit_fcam(
            model,
            [(scene.image, scene.target) for scene in scenes],
            LayerGradCam(model, model[1]),
            size=32,
            widths=(8, 8),
            n_epochs=2,
            batch_size=8,
            rectify=False,
            show_progress=False,
        )


@pytest.mark.parametrize("erosion", [None, 1, 11])
def test_regions_of_seeds_are_equal_on_cpu_and_gpu(erosion):
    """The order of ties is the same on both: a ReLU leaves thousands of zeros."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(6, 1, 56, 64, generator=generator)
    coarse = nn.functional.interpolate(maps[:, :, :7, :8], (56, 64), mode="bilinear")
    maps = torch.cat((maps, coarse, (2 * coarse - 1).clamp(min=0), torch.zeros(1, 1, 56, 64)))
    maps[0, 0, 3, 4] = float("nan")
    size = maps[0].numel()
    ties = torch.stack([torch.randperm(size, generator=generator) for _ in maps]).float() / size
    sampler = SeedSampler(erosion=erosion)
    cpu = sampler.regions(maps, ties)
    gpu = sampler.regions(maps.to(DEVICE), ties.to(DEVICE))
    for on_cpu, on_gpu in zip(cpu, gpu, strict=True):
        assert on_gpu.device.type == DEVICE
        assert on_cpu.any()
        assert torch.equal(on_cpu, on_gpu.cpu())


@pytest.mark.parametrize(
    "loss",
    [
        DenseCRFLoss(),
        DenseCRFLoss(side=None),
        DenseCRFLoss(side=16, n_anchors=10**6),
        LocalCRFLoss(radius=3),
        lambda p, images: size_loss(torch.cat((1 - p, p), 1), 2.0),
        lambda p, images: partial_cross_entropy(
            torch.cat((1 - p, p), 1),
            torch.where(images[:, 1] > 100, -255, (images[:, 0] > 200).long()),
        ),
    ],
    ids=["dense", "whole", "anchors", "local", "size", "seeds"],
)
def test_losses_and_their_gradients_are_equal_on_cpu_and_gpu(loss):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(3, 1, 48, 40, generator=generator)
    images = (255 * torch.rand(3, 3, 48, 40, generator=generator)).round()
    result = []
    for device in ("cpu", DEVICE):
        leaf = p.to(device).requires_grad_()
        value = loss(leaf, images.to(device))
        assert value.device.type == leaf.device.type == torch.device(device).type
        result.append((value.cpu(), torch.autograd.grad(value, leaf)[0].cpu()))
    (value, gradient), (other, other_gradient) = result
    torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-8)
    assert (other_gradient - gradient).norm() < 1e-3 * gradient.norm()


def test_the_decoder_is_trained_on_the_classifiers_device():
    model = two_stage_net().to(DEVICE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fcam = trained(model)
    for name, value in model.state_dict().items():
        assert value.device.type == DEVICE
        assert torch.equal(value, before[name])
    for value in fcam.decoder.state_dict().values():
        assert value.device.type == DEVICE
        assert torch.isfinite(value).all()
    assert all(block[1].num_batches_tracked == 4 for block in fcam.decoder.blocks)
    x = torch.rand(2, 3, 33, 47)
    maps = fcam.attribute(x.to(DEVICE), target=1)
    assert maps.device.type == DEVICE
    assert maps.shape == x.shape
    on_cpu = FCAM(copy.deepcopy(model).cpu(), copy.deepcopy(fcam.decoder).cpu())
    torch.testing.assert_close(maps.cpu(), on_cpu.attribute(x), rtol=1e-2, atol=1e-3)


def test_a_decoder_is_saved_on_the_gpu_and_loaded_on_the_cpu_and_back(tmp_path):
    model, path, x = two_stage_net().to(DEVICE), tmp_path / "decoder.pt", torch.rand(2, 3, 32, 32)
    fcam = trained(model)
    fcam.save(path)
    cpu = FCAM.load(path, copy.deepcopy(model).cpu())
    assert all(value.device.type == "cpu" for value in cpu.decoder.state_dict().values())
    maps = cpu.attribute(x)
    torch.testing.assert_close(fcam.attribute(x.to(DEVICE)).cpu(), maps, rtol=1e-2, atol=1e-3)
    cpu.save(path)
    gpu = FCAM.load(path, model)
    assert torch.equal(gpu.attribute(x.to(DEVICE)), fcam.attribute(x.to(DEVICE)))
