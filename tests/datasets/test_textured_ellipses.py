"""Textured ellipses: seeds, classes, masks, cues and batches."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from captum_ext.datasets import TEXTURES, TexturedEllipses


def pixels(scene):
    return np.asarray(scene.image).astype(int)


def test_scenes_depend_on_seed_and_index_alone():
    few, many = TexturedEllipses(8, seed=3), TexturedEllipses(40, seed=3)
    for i in (7, 0, 3):
        assert (pixels(few[i]) == pixels(many[i])).all()
        assert torch.equal(few[i].mask, many[i].mask)
    assert (pixels(few[0]) != pixels(TexturedEllipses(8, seed=4)[0])).any()
    state = np.random.get_state()[1].copy()
    few[1]
    assert (np.random.get_state()[1] == state).all()


def test_classes_are_balanced():
    scenes = TexturedEllipses(40, seed=1)
    targets = [scenes.target(i) for i in range(40)]
    for first in range(0, 40, 4):
        assert sorted(targets[first : first + 4]) == [0, 1, 2, 3]
    assert targets == [scene.target for scene in scenes]
    assert len(set(targets[::4])) > 1


def test_masks_are_one_region_inside_the_picture_of_the_stated_size():
    shares = []
    for scene in TexturedEllipses(60, seed=2):
        assert ndimage.label(scene.mask)[1] == 1
        x1, y1, x2, y2 = scene.box.tolist()
        assert scene.mask[y1:y2, x1:x2].sum() == scene.mask.sum()
        assert scene.mask[y1].any()
        assert scene.mask[:, x2 - 1].any()
        shares.append(scene.mask.float().mean().item())
    assert 0.045 < min(shares) < 0.07
    assert 0.13 < max(shares) < 0.2


def test_has_distractors_changes_nothing_but_distractors():
    with_them = TexturedEllipses(12, seed=5)
    without = TexturedEllipses(12, seed=5, has_distractors=False)
    changed = 0
    for a, b in zip(with_them, without, strict=True):
        assert torch.equal(a.mask, b.mask)
        apart = np.abs(pixels(a) - pixels(b)).sum(2) > 0
        near = ndimage.binary_dilation(a.mask.numpy(), np.ones((3, 3)))
        assert not (apart & a.mask.numpy()).any()
        changed += apart.any()
        assert ndimage.label(apart, np.ones((3, 3)))[1] <= 2
        assert not (apart & near).any()
    assert changed >= 11


@pytest.mark.parametrize(("cue", "most"), [("half", 0.7), ("head", 0.35)])
def test_cues_change_a_part_of_the_object_only(cue, most):
    """The scene of another class differs in a part of the object only."""
    for target in range(4):
        shares = []
        for i in range(16):
            scenes = TexturedEllipses(16, seed=6, cue=cue)
            if scenes.target(i) != target:
                continue
            other = TexturedEllipses(16, seed=6, cue=cue)
            other.target = lambda index, t=target: (t + 1) % 4
            apart = np.abs(pixels(scenes[i]) - pixels(other[i])).sum(2) > 0
            mask = scenes[i].mask.numpy()
            assert not (apart & ~ndimage.binary_dilation(mask, np.ones((3, 3)))).any()
            shares.append((apart & mask).sum() / mask.sum())
        assert 0.02 < np.mean(shares) < most


def test_a_batch_has_the_pixels_masks_and_boxes_of_its_scenes():
    scenes = TexturedEllipses(6, seed=0, size=(48, 80))
    batch = scenes.batch(range(4))
    assert batch.pixels.shape == (4, 3, 48, 80)
    assert batch.pixels.dtype == torch.uint8
    assert batch.masks.shape == (4, 48, 80)
    assert torch.equal(batch.boxes[1], scenes[1].box)
    assert torch.equal(batch.pixels[2].permute(1, 2, 0), torch.tensor(np.asarray(scenes[2].image)))
    assert scenes[-1].target == scenes[5].target
    with pytest.raises(IndexError):
        scenes[6]
    assert len(TEXTURES) == 4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n": 0}, "n"),
        ({"seed": -1}, "seed"),
        ({"size": (8, 64)}, "size"),
        ({"size": 64}, "size"),
        ({"cue": "tail"}, "cue"),
    ],
)
def test_wrong_options_are_named(options, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        TexturedEllipses(**options)
