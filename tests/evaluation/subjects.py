"""Tiny pictures and attributions whose maps are known; they pickle."""

import csv
import sqlite3
import time
from contextlib import closing
from types import SimpleNamespace

import torch
from captum.attr import Attribution, IntegratedGradients, LayerGradCam, NoiseTunnel, Saliency

from captum_ext.evaluation import evaluate
from tests.networks import tiny_net

QUIET = {"show_progress": False, "normalize": None, "batch_size": 3}
METRICS = {"energy": {}, "pxap": {}, "max_box_acc": {}, "deletion": {"step": 0.25}}


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


class VersionedFunction:
    """A callable with the version that stored runs need, around any function."""

    version = "1"

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)


class FixedMap(Attribution):
    """An attribution whose maps are a function of the images, or their first channel."""

    def __init__(self, model, function=None):
        super().__init__(model)
        self.function = None if function is None else VersionedFunction(function)

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


def exported(folder):
    """The bytes of the export, without its temporary files."""
    assert not list(folder.glob(".*"))
    return (folder / "rows.csv").read_bytes()


def rows(folder):
    """The exported rows, sorted by method and image."""
    with (folder / "rows.csv").open(newline="") as file:
        return sorted(csv.DictReader(file), key=lambda row: (row["method"], int(row["index"])))


def forget(folder, condition):
    """Delete finished tasks from the store and the export; return how many."""
    (folder / "rows.csv").unlink(missing_ok=True)
    count = 0
    for file in folder.glob("results.*.sqlite"):
        with closing(sqlite3.connect(file)) as connection, connection:
            count += connection.execute(f"DELETE FROM results WHERE {condition}").rowcount
    return count


def evaluate_boxes(folder, metrics="energy"):
    """Evaluate a method, called "a", on four pictures."""
    return evaluate({"a": FixedMap(tiny_net())}, Boxes(4), metrics, output=folder, **QUIET)
