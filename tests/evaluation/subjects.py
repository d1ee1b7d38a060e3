"""Tiny pictures and attributions whose maps are known; they pickle."""

import time
from types import SimpleNamespace

import torch
from captum.attr import Attribution, IntegratedGradients, LayerGradCam, NoiseTunnel, Saliency

from tests.networks import tiny_net


class Boxes:
    """Random pictures with a box, its mask, and a rim that is ignored."""

    def __init__(self, n=7, size=(8, 8), pause=0.0):
        self.n, self.size, self.pause = n, size, pause

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if not 0 <= index < self.n:
            raise IndexError(index)
        time.sleep(self.pause)
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(3, *self.size, generator=generator)
        x1, y1 = torch.randint(0, 4, (2,), generator=generator).tolist()
        mask = torch.zeros(self.size, dtype=torch.bool)
        mask[y1 : y1 + 3, x1 : x1 + 4] = True
        ignored = torch.zeros(self.size, dtype=torch.bool)
        ignored[-1] = True
        return SimpleNamespace(
            image=image,
            target=index % 3,
            boxes=torch.tensor([[x1, y1, x1 + 4, y1 + 3]]),
            mask=mask,
            ignored=ignored,
            name=f"picture, {index}",
        )


class Known:
    """A test's function, which need not be known apart from other ones."""

    version = "1"

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)


class Of(Attribution):
    """The first channel, or what a function makes of the images."""

    def __init__(self, model, function=None):
        super().__init__(model)
        self.function = None if function is None else Known(function)

    def attribute(self, inputs, target=None, gain=1):
        if isinstance(inputs, tuple):
            return (self.attribute(inputs[0]),)
        if self.function is not None:
            return self.function(inputs)
        return inputs[:, :1].expand_as(inputs).contiguous()


def three_methods():
    model = tiny_net()
    return {
        "Grad-CAM": LayerGradCam(model, model[0]),
        "IG": (IntegratedGradients(model), {"n_steps": 4}),
        "noisy": (NoiseTunnel(Saliency(model)), {"nt_samples": 2, "stdevs": 0.1}),
    }


def lines(folder):
    """Of the rows of all processes, sorted."""
    found = [file.read_bytes().splitlines(keepends=True) for file in folder.glob("rows*.csv")]
    assert len({each[0] for each in found}) == 1  # the same columns
    return sorted(line for each in found for line in each[1:])
