import pickle
import sys
import zlib
from dataclasses import replace

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import normalize, to_tensor

from captum_ext.datasets import KINDS, PastedScenes, Scene, pasted_scenes
from captum_ext.zoo import LoadedModel, load_model


def checksum(scene: Scene) -> int:
    parts = (scene.image.tobytes(), scene.mask.numpy().tobytes(), repr(scene.boxes.tolist()))
    return zlib.crc32(repr((scene.target, scene.distractor_targets, parts)).encode())


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(PastedScenes(36, seed=3))


@pytest.fixture(scope="module")
def network() -> LoadedModel:
    return load_model()


def probabilities(network: LoadedModel, image: Image.Image) -> torch.Tensor:
    x = normalize(to_tensor(image), network.preprocess.mean, network.preprocess.std)
    with torch.no_grad():
        return network.module(x[None])[0].softmax(0)


# --- seeds and kinds -----------------------------------------------------------------------------


def test_a_scene_depends_on_the_seed_and_its_index_alone() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = checksum(PastedScenes(60, seed=5)[7])
    torch.manual_seed(2)
    np.random.seed(2)
    scenes = PastedScenes(8, seed=5)
    state = np.random.get_state()[1].tolist()
    assert checksum(scenes[3]) != first
    assert checksum(scenes[7]) == checksum(scenes[-1]) == first
    assert checksum(pickle.loads(pickle.dumps(scenes))[7]) == first
    assert np.random.get_state()[1].tolist() == state
    assert checksum(PastedScenes(60, seed=6)[7]) != first


def test_the_mixture_has_the_scenes_of_the_single_kinds() -> None:
    mixture = PastedScenes(12)
    for offset, kind in enumerate(KINDS):
        single = PastedScenes(4, kind=kind)
        assert [s.kind for s in single] == [kind] * 4
        assert [checksum(s) for s in single] == [
            checksum(mixture[3 * i + offset]) for i in range(4)
        ]


def test_scenes_are_the_same_on_every_machine() -> None:
    assert PastedScenes()[11].boxes.tolist() == [[89, 324, 134, 418]]
    before_13 = int(PIL.__version__.partition(".")[0]) < 13
    digest = 577975424 if before_13 else 3623119856
    assert zlib.crc32(PastedScenes()[11].image.tobytes()) == digest
    other = PastedScenes(30, 7, "several", (300, 200))[4]
    assert zlib.crc32(other.image.tobytes()) == 2403974802
    assert zlib.crc32(other.mask.numpy().tobytes()) == 60925124


def test_changing_a_scene_does_not_change_the_set() -> None:
    before = checksum(PastedScenes()[0])
    scene = PastedScenes()[0]
    scene.image.paste((0, 0, 0), (0, 0, 640, 480))
    scene.mask[:] = True
    assert checksum(PastedScenes()[0]) == before


# --- contents ------------------------------------------------------------------------------------


def test_boxes_are_tight_apart_and_of_the_stated_size(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.image.mode == "RGB"
        assert (*scene.image.size[::-1],) == tuple(scene.mask.shape) == (480, 640)
        left = scene.mask.clone()
        for x1, y1, x2, y2 in scene.boxes.tolist():
            inside = scene.mask[y1:y2, x1:x2]
            assert inside.any(0)[[0, -1]].all()
            assert inside.any(1)[[0, -1]].all()
            assert 40 <= max(x2 - x1, y2 - y1) <= 110
            left[y1:y2, x1:x2] = False
        assert not left.any()
        boxes = torch.cat((scene.boxes, scene.distractor_boxes))
        apart = torch.maximum(
            boxes[:, None, :2] - boxes[None, :, 2:], boxes[None, :, :2] - boxes[:, None, 2:]
        )
        nearest = apart.amax(2).fill_diagonal_(640).amin().item()
        assert nearest >= 30
        assert boxes.amin() >= 0
        assert (boxes[:, 2:] <= torch.tensor([640, 480])).all()


def test_kinds_have_their_numbers_of_objects(scenes: list[Scene]) -> None:
    assert [s.kind for s in scenes] == list(KINDS) * 12
    counts = {kind: {len(s.boxes) for s in scenes if s.kind == kind} for kind in KINDS}
    assert counts == {"small": {1}, "several": {2, 3, 4}, "distractors": {1}}
    for scene in scenes:
        others = scene.distractor_targets
        assert len(others) == len(scene.distractor_boxes) == len(set(others))
        assert scene.target not in others
        assert bool(others) == (scene.kind == "distractors") == scene.difficult
    assert {len(s.distractor_targets) for s in scenes} == {0, 1, 2, 3}
    for kind in KINDS:
        targets = [s.target for s in scenes if s.kind == kind]
        assert sorted(targets) == sorted([285, 967, 812, 872] * 3)


def test_difficult_scenes_have_small_objects_and_another_class() -> None:
    scene = PastedScenes(kind="distractors")[0]
    assert scene.difficult
    half = torch.tensor([[0, 0, 640, 240]])
    assert not replace(scene, boxes=half).difficult
    quarters = torch.tensor([[0, 0, 320, 120], [0, 240, 320, 360]])
    assert not replace(scene, boxes=quarters).difficult
    quarters[0, 2] -= 1
    assert replace(scene, boxes=quarters).difficult
    assert not replace(scene, distractor_targets=()).difficult


def test_objects_scale_with_the_scene() -> None:
    for scene in PastedScenes(6, size=(200, 300)):
        assert scene.image.size == (300, 200)
        sides = scene.boxes[:, 2:] - scene.boxes[:, :2]
        assert sides.amax(1).amin() >= 16
        assert sides.amax() <= 46


def test_only_the_objects_differ_from_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = PastedScenes(kind="distractors")[2]
    monkeypatch.setattr(Image.Image, "paste", lambda *_: None)
    monkeypatch.setattr(Image.Image, "getbbox", lambda _: (0, 0, 1, 1))
    bare = np.asarray(PastedScenes(kind="distractors")[2].image).astype(int)
    change = torch.from_numpy(np.abs(np.asarray(scene.image).astype(int) - bare).sum(2))
    assert (change[scene.mask] > 30).float().mean() > 0.9
    for x1, y1, x2, y2 in torch.cat((scene.boxes, scene.distractor_boxes)).tolist():
        change[max(y1 - 2, 0) : y2 + 2, max(x1 - 2, 0) : x2 + 2] = 0  # the soft edge
    assert not change.any()


# --- the network's classes -----------------------------------------------------------------------


def test_the_network_recognises_each_object_alone(network: LoadedModel) -> None:
    shares: dict[int, list[float]] = {}
    named: dict[int, list[bool]] = {}
    for scene in PastedScenes(36, seed=1, kind="small"):
        x1, y1, x2, y2 = scene.boxes[0].tolist()
        half = round(0.625 * max(x2 - x1, y2 - y1))
        x, y = (x1 + x2) // 2, (y1 + y2) // 2
        x, y = min(max(x, half), 640 - half), min(max(y, half), 480 - half)
        crop = scene.image.crop((x - half, y - half, x + half, y + half))
        p = probabilities(network, crop.resize((224, 224), Image.Resampling.BICUBIC))
        shares.setdefault(scene.target, []).append(p[scene.target].item())
        named.setdefault(scene.target, []).append(bool(p.argmax() == scene.target))
    for target in (285, 967, 812, 872):
        assert len(named[target]) == 9
        assert sum(named[target]) >= 7
        assert np.median(shares[target]) > 0.15


def test_the_classes_are_not_in_the_backgrounds(network: LoadedModel) -> None:
    random = np.random.RandomState(0)
    for background in pasted_scenes._BACKGROUNDS:
        for _ in range(3):
            image = pasted_scenes._background(random, background, (480, 640))
            small = image.resize((224, 224), Image.Resampling.BICUBIC)
            for view in (image, small):
                assert probabilities(network, view)[[285, 967, 812, 872]].max() < 0.03


# --- wrong arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"n": 0}, "n"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"kind": "large"}, "kind"),
        ({"size": (100, 640)}, "size"),
        ({"size": (480,)}, "size"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        PastedScenes(**options)


@pytest.mark.parametrize("index", [4, -5])
def test_a_set_has_n_scenes(index: int) -> None:
    scenes = PastedScenes(4)
    assert len(scenes) == len(list(scenes)) == 4
    with pytest.raises(IndexError):
        scenes[index]


def test_an_error_without_scikit_image_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    pasted_scenes._photograph.cache_clear()
    pasted_scenes._cut_out.cache_clear()
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(ImportError, match=r"captum_ext\[demo\]"):
        PastedScenes()[0]
