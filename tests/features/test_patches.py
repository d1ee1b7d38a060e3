"""Maximally activating patches: values, resuming, exact boxes and errors."""

import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
import torchvision.models as zoo
from PIL import Image
from torch import Tensor, nn

from captum_ext.attr import channels_last_to_first, tokens_to_grid
from captum_ext.datasets import Example
from captum_ext.features import ActivatingPatches, TopActivations
from captum_ext.features import maximally_activating_patches as top_patches
from captum_ext.features._streaming import PassCheckpoint
from tests.captures import layer_activations
from tests.features.test_patches_top import everything_sorted
from tests.networks import net_with_ties, small_net, small_swin, small_vit

TraceFree = Callable[..., AbstractContextManager[None]]
PLAIN = ((0.0,) * 3, (1.0,) * 3)


def noise(n: int, height: int = 8, width: int = 8) -> list[tuple[Tensor, int]]:
    pictures = torch.randint(256, (n, 3, height, width), dtype=torch.uint8)
    return [(picture, 0) for picture in pictures]


def same(result: ActivatingPatches, other: ActivatingPatches) -> bool:
    pairs = zip(vars(result).values(), vars(other).values(), strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def seen(result: ActivatingPatches) -> tuple[Any, Any, Any]:
    return result.values.tolist(), result.indices.tolist(), result.positions.tolist()


# --- the largest activations ---------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "per_image"), [(1, 1), (7, 2), (64, 1)])
def test_patches_equal_a_sort_of_all_activations(batch_size: int, per_image: int) -> None:
    net, data = net_with_ties(), noise(5000 if batch_size > 1 else 500)
    pixels = torch.stack([picture for picture, _ in data]) / 255
    with torch.no_grad():
        maps = net[:2](pixels.double())
    result = top_patches(
        net, "1", data, n=12, per_image=per_image, size=8, normalize=PLAIN, batch_size=batch_size
    )
    expected = everything_sorted(maps, 12, per_image)
    assert seen(result) == expected
    assert any(len(set(row)) < 12 for row in expected[0]), "there are ties"
    assert result.units == tuple(range(5))
    assert (result.layer, result.size, result.unread, result.reason) == ("1", (8, 8), (), None)


def test_chosen_units_are_rows_of_the_result_for_all() -> None:
    net, data = small_net(), noise(40)
    all_units = top_patches(net, net.relu2, data, n=5, size=8)
    two_units = top_patches(net, net.relu2, data, n=5, size=8, units=[3, 0])
    assert two_units.units == (3, 0)
    for name in ("values", "indices", "positions", "boxes"):
        assert torch.equal(getattr(two_units, name), getattr(all_units, name)[[3, 0]])
    assert two_units.row(0) == 1


def test_pictures_are_resized_and_normalised() -> None:
    """The unit is the mean of a picture of one colour, for any size of the picture."""
    net = nn.Sequential(nn.Conv2d(3, 1, 1, bias=False), nn.Flatten(2)).double()
    nn.init.constant_(net[0].weight, 1.0)
    colours = [(10, 20, 30), (90, 20, 7), (50, 50, 50)]
    data = [
        Example(Image.new("RGB", (11 + 5 * i, 30), colour), i, str(i))
        for i, colour in enumerate(colours)
    ]
    normalize = ((0.1, 0.2, 0.3), (0.5, 0.25, 1.0))
    result = top_patches(net, "0", data, n=3, size=(6, 4), normalize=normalize)
    expected = [
        sum((c / 255 - m) / s for c, m, s in zip(colour, *normalize, strict=True))
        for colour in colours
    ]
    order = sorted(range(3), key=lambda i: -expected[i])
    assert result.indices.tolist() == [order]
    torch.testing.assert_close(
        result.values[0], torch.tensor(expected).double()[order], rtol=1e-6, atol=1e-7
    )
    grey = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(grey.weight, 1.0)
    shades = [(Image.new("L", (5, 5), 200), 0), (Image.new("RGB", (5, 5), (100, 0, 0)), 0)]
    result = top_patches(grey, grey, shades, size=6, normalize=((0.5,), (0.5,)))
    expected = torch.tensor([[400 / 255 - 1, 2 * 29.9 / 255 - 1]])  # red counts for 0.299
    torch.testing.assert_close(result.values, expected)


def test_labels_are_not_needed() -> None:
    net, data = small_net(), noise(20)
    expected = top_patches(net, "relu2", data, size=8)
    alone = torch.stack([picture for picture, _ in data])
    for same_pictures in (alone, list(alone), [(picture, "no number") for picture in alone]):
        result = top_patches(net, "relu2", same_pictures, size=8)
        assert same(result, expected)
        assert torch.equal(result.crops(same_pictures, 2)[0], expected.crops(data, 2)[0])


def test_units_of_a_linear_layer_see_whole_images() -> None:
    net, data = small_net(), noise(20, 9, 9)
    result = top_patches(net, "fc", data, n=4, size=9, normalize=PLAIN)
    logits = net(torch.stack([picture for picture, _ in data]) / 255).detach()
    expected = logits.sort(0, descending=True)
    torch.testing.assert_close(result.values, expected.values[:4].T)
    assert torch.equal(result.indices, expected.indices[:4].T)
    assert (result.boxes == torch.tensor([0, 0, 9, 9])).all()
    assert (result.positions == 0).all()


def test_models_may_have_half_precision() -> None:
    net, data = small_net().bfloat16(), noise(30)
    result = top_patches(net, "relu2", data, size=8, normalize=PLAIN)
    images = (torch.stack([picture for picture, _ in data]) / 255).bfloat16()
    (maps,), _ = layer_activations(net, [net.relu2], (images,))
    assert result.values.dtype == torch.float32
    assert torch.equal(result.values, maps[0].float().amax((2, 3)).topk(9, 0).values.T)


# --- pictures that cannot be read, and runs that are killed --------------------------------------


class Watched:
    """Records the pictures that are read. Some cannot be read, and one may end the run."""

    def __init__(self, n: int, unread: tuple[int, ...] = (), deadly: int | None = None) -> None:
        self.pictures, self.reads = noise(n), list[int]()
        self.unread, self.deadly = unread, deadly

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Any:
        self.reads.append(index)
        if index == self.deadly:
            raise KeyboardInterrupt
        if index in self.unread:
            raise OSError("broken data stream")
        return self.pictures[index]


def test_pictures_that_cannot_be_read_are_left_out() -> None:
    data = Watched(30, unread=(0, 3, 4, 5, 17))
    kept = [i for i in range(30) if i not in data.unread]
    with pytest.warns(UserWarning, match="left out") as caught:
        result = top_patches(small_net(), "relu2", data, n=26, size=8, batch_size=3)
    assert "5 of 30 pictures cannot be read and are left out: picture 0, picture 3" in str(
        caught[-1].message
    )
    assert result.unread == tuple(f"picture {i}" for i in data.unread)
    assert result.values.shape == (6, 25)
    pixels = [data.pictures[i] for i in kept]
    expected = top_patches(small_net(), "relu2", pixels, n=26, size=8, batch_size=3)
    assert torch.equal(result.indices, torch.tensor(kept)[expected.indices])
    torch.testing.assert_close(result.values, expected.values)
    data.unread = tuple(range(30))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="none of its pictures can be read"):
            top_patches(small_net(), "relu2", data, size=8)


def test_pictures_lost_before_their_gradients_are_an_error() -> None:
    class Lost(Watched):
        def __getitem__(self, index: int) -> Any:
            if len(self.reads) >= 10:
                self.unread = (7,)
            return super().__getitem__(index)

    options: dict[str, Any] = {"n": 10, "size": 8, "receptive_field": "effective"}
    message = "picture 7 cannot be read"
    with (
        pytest.warns(UserWarning, match=message),
        pytest.raises(ValueError, match=f"{message} any more"),
    ):
        top_patches(small_net(), "relu2", Lost(10), **options)


@pytest.mark.parametrize("deadly", [5, 35, 61])
def test_a_run_that_was_killed_goes_on_to_the_same_result(tmp_path: Path, deadly: int) -> None:
    net, data, file = net_with_ties(), Watched(62, unread=(2, 40)), tmp_path / "runs" / "top.pt"
    options: dict[str, Any] = {
        "n": 7, "per_image": 2, "size": 8, "batch_size": 4, "checkpoint_every": 8,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = top_patches(net, "1", data, **options)
        probes = set(range(0, 62, 62 // 16))
        assert deadly not in probes, "these are read in front"
        data.deadly = deadly
        with pytest.raises(KeyboardInterrupt):
            top_patches(net, "1", data, checkpoint=file, **options)
        data.deadly, data.reads = None, []
        result = top_patches(net, "1", data, checkpoint=file, **options)
        assert same(result, expected)
        # written after every 8 pictures, in batches of 4
        assert min(set(data.reads) - probes) >= deadly // 8 * 8
        data.reads = []
        assert same(top_patches(net, "1", data, checkpoint=file, **options), expected)
        assert set(data.reads) <= probes, "a finished run is only read"
    assert [path.name for path in file.parent.iterdir()] == ["top.pt"]


def test_a_checkpoint_is_written_once_in_each_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    monkeypatch.setattr(PassCheckpoint, "write", lambda store, top, n, unread: counts.append(n))
    options: dict[str, Any] = {"size": 8, "batch_size": 2, "checkpoint_every": 6}
    top_patches(net_with_ties(), "1", Watched(20), checkpoint=tmp_path / "top.pt", **options)
    assert counts == [6, 12, 18, 20]


def test_a_checkpoint_is_complete_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PassCheckpoint(tmp_path / "top.pt", {"n": 3}, 1)
    store.write(TopActivations(3), 10, [])

    def full_disk(content: Any, file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        store.write(TopActivations(3), 20, [])
    again = PassCheckpoint(tmp_path / "top.pt", {"n": 3}, 1)
    assert again.saved is not None
    assert again.saved["n_done"] == 10


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    net, data, file = small_net(), noise(20), tmp_path / "top.pt"
    options: dict[str, Any] = {"n": 3, "size": 8, "checkpoint": file}
    top_patches(net, "relu2", data, **options)
    others: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
        "layer was 'relu2' and is 'conv2'": (net, "conv2", data, {}),
        "n was 3 and is 4": (net, "relu2", data, {"n": 4}),
        "size was [8, 8] and is [8, 9]": (net, "relu2", data, {"size": (8, 9)}),
        "units was None and is [1]": (net, "relu2", data, {"units": [1]}),
        "per_image was 1 and is 2": (net, "relu2", data, {"per_image": 2}),
        "shard was [0, 1] and is [1, 2]": (net, "relu2", data, {"shard": (1, 2)}),
        "normalize was": (net, "relu2", data, {"normalize": PLAIN}),
        "reshape_transform was": (net, "relu2", data, {"reshape_transform": torch.relu}),
        "data was '20 pictures": (net, "relu2", data[:19], {}),
    }
    for message, (model, layer, pictures, changed) in others.items():
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            top_patches(model, layer, pictures, **options | changed)
        assert f"`checkpoint` {file} is of another run" in str(caught.value)
        assert ";" not in str(caught.value), "nothing else differs"
    with pytest.raises(ValueError, match="of another run: data was '20 pictures"):
        top_patches(net, "relu2", noise(20), **options)
    with torch.no_grad():
        net.conv1.bias += 1e-6
    with pytest.raises(ValueError, match="of another run: model was"):
        top_patches(net, "relu2", data, **options)
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is no checkpoint of patches"):
        top_patches(net, "relu2", data, **options)
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module"):
        top_patches(lambda x: net(x), net.relu2, data, **options)


def test_a_checkpoint_with_another_transform_is_refused(tmp_path: Path) -> None:
    net, data = small_vit(), noise(5, 24, 24)
    layer, file = "encoder.layers.encoder_layer_1.ln_1", tmp_path / "top.pt"
    options: dict[str, Any] = {"size": 24, "checkpoint": file}
    first = partial(tokens_to_grid, grid=(3, 3))
    result = top_patches(net, layer, data, reshape_transform=first, **options)
    other = partial(tokens_to_grid, grid=(3, 3))
    assert same(top_patches(net, layer, data, reshape_transform=other, **options), result)
    wide = partial(tokens_to_grid, grid=(1, 9))
    with pytest.raises(ValueError, match="another run: reshape_transform was"):
        top_patches(net, layer, data, reshape_transform=wide, **options)
    with pytest.raises(ValueError, match=r"^`reshape_transform` is .*`function\.version = "):
        top_patches(net, layer, data, reshape_transform=lambda x: tokens_to_grid(x), **options)


@pytest.mark.parametrize(("count", "per_image"), [(2, 1), (3, 2)])
def test_merged_shards_equal_a_single_process(count: int, per_image: int) -> None:
    net, data = net_with_ties(), noise(50)
    options: dict[str, Any] = {"n": 8, "per_image": per_image, "size": 8, "normalize": PLAIN}
    shards = [top_patches(net, "1", data, shard=(i, count), **options) for i in range(count)]
    assert [set((s.indices % count).flatten().tolist()) for s in shards] == [
        {i} for i in range(count)
    ]
    expected = top_patches(net, "1", data, **options)
    assert same(shards[0].merge(*shards[1:]), expected)
    assert same(shards[-1].merge(*shards[:-1]), expected)
    assert same(expected.merge(), expected)
    assert shards[0].values.shape == (5, 8)
    with pytest.raises(ValueError, match="have pictures in common"):
        shards[0].merge(expected)
    other = top_patches(net, "1", data, shard=(1, 2), **options | {"n": 3})
    with pytest.raises(ValueError, match="`others` are of another run: n was 8 and is 3"):
        shards[0].merge(other)


def test_shards_with_few_pictures_merge_to_all() -> None:
    net, data = net_with_ties(), Watched(7, unread=(4, 5))
    options: dict[str, Any] = {"n": 9, "size": 8, "receptive_field": "effective"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shards = [top_patches(net, "0", data, shard=(i, 3), **options) for i in range(3)]
        result, expected = shards[0].merge(*shards[1:]), top_patches(net, "0", data, **options)
    assert result.values.shape == (5, 5)
    assert same(result, expected)


# --- boxes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer", "side"),
    [
        ("resnet18", "layer1", 80),
        ("resnet18", "layer2", 128),
        ("vgg11", "features.10", 80),
        ("mobilenet_v2", "features.6", 96),
        ("densenet121", "features.denseblock1", 96),
        ("shufflenet_v2_x0_5", "stage2.0", 80),
        ("convnext_tiny", "features.1", 80),
    ],
)
def test_pixels_outside_of_a_box_have_no_effect(name: str, layer: str, side: int) -> None:
    options = {"init_weights": False} if name == "vgg11" else {}
    net = getattr(zoo, name)(weights=None, **options).double().eval()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):  # otherwise nearly all units at a position are equal
            nn.init.normal_(part.bias)
            nn.init.uniform_(part.running_mean)
    data, module = noise(4, side, side), net.get_submodule(layer)
    result = top_patches(net, layer, data, n=2, size=side, normalize=PLAIN)
    assert result.field is not None
    assert result.field.rows.size < side
    for row in result.values[:, 1].topk(3).indices.tolist():
        for i, index in enumerate(result.indices[row].tolist()):
            x1, y1, x2, y2 = result.boxes[row, i].tolist()
            image = (data[index][0] / 255).double()
            inside = torch.zeros_like(image)
            inside[..., y1:y2, x1:x2] = 1
            views = [image, image * inside, image + 5 * (1 - inside), image * (1 - inside)]
            (maps,), _ = layer_activations(net, [module], (torch.stack(views),))
            y, x = result.positions[row, i].tolist()
            value, kept, lit, emptied = maps[0][:, result.units[row], y, x].tolist()
            assert result.values[row, i].item() == pytest.approx(value, rel=1e-5)
            assert kept == pytest.approx(value, rel=1e-12)
            assert lit == pytest.approx(value, rel=1e-12)
            assert abs(emptied - value) > 1e-6 * value


def test_boxes_equal_those_made_by_hand() -> None:
    """Each picture has one bright pixel; the layer is a box filter of 3 with stride 2."""
    net = nn.Conv2d(3, 1, 3, stride=2, padding=1, bias=False)
    nn.init.constant_(net.weight, 1.0)
    lights = [(0, 0), (4, 4), (7, 10)]  # row, column
    data = []
    for i, (y, x) in enumerate(lights):
        picture = torch.zeros(3, 9, 12, dtype=torch.uint8)
        picture[:, y, x] = 50 + i
        data.append((picture, 0))
    result = top_patches(net, net, data, n=3, size=(9, 12), normalize=PLAIN)
    assert result.indices.tolist() == [[2, 1, 0]]
    # unit i sees the pixels 2 i - 1 to 2 i + 1: of the two that see pixel 7, the first
    assert result.positions.tolist() == [[[3, 5], [2, 2], [0, 0]]]
    assert result.unclipped_boxes.tolist() == [[[9, 5, 12, 8], [3, 3, 6, 6], [-1, -1, 2, 2]]]
    assert result.boxes.tolist() == [[[9, 5, 12, 8], [3, 3, 6, 6], [0, 0, 2, 2]]]
    crops = result.crops(data, 0)
    assert [tuple(crop.shape) for crop in crops] == [(3, 3, 3), (3, 3, 3), (3, 2, 2)]
    assert [crop.max().item() for crop in crops] == [52, 51, 50]
    assert crops[0][0].tolist() == [[0, 0, 0], [0, 0, 0], [0, 52, 0]]


def test_a_unit_that_sees_padding_only_has_a_box() -> None:
    net = nn.Conv2d(3, 1, 1, padding=2)
    nn.init.constant_(net.weight, -1.0)
    result = top_patches(net, net, noise(1, 6, 6), n=1, size=6, normalize=PLAIN)
    assert result.unclipped_boxes.tolist() == [[[-2, -2, -1, -1]]]
    assert result.boxes.tolist() == [[[0, 0, 1, 1]]]


def test_picture_boxes_are_in_the_pictures_own_pixels() -> None:
    net = nn.Conv2d(3, 1, (4, 6), stride=(4, 6), bias=False)
    nn.init.constant_(net.weight, 1.0)
    pictures = []
    for width, height in ((36, 16), (54, 32), (20, 11)):
        pixels = np.zeros((height, width, 3), np.uint8)
        # the cell in row 1 and column 2 of 4 x 3
        pixels[height // 4 : height // 2, -(-width * 2 // 3) :] = 100 + width
        pictures.append((Image.fromarray(pixels), 0))
    result = top_patches(net, net, pictures, n=3, size=(16, 18), normalize=PLAIN)
    assert result.indices.tolist() == [[1, 0, 2]]
    assert result.positions.tolist() == [[[1, 2]] * 3]
    assert result.boxes.tolist() == [[[12, 4, 18, 8]] * 3]
    # 11 rows of 16 and 20 columns of 18: 2.75 to 5.5, and 13.3 to 20, outwards
    assert result.picture_boxes(pictures, 0).tolist() == [
        [36, 8, 54, 16],
        [24, 4, 36, 8],
        [13, 2, 20, 6],
    ]
    crops = result.crops(pictures, 0)
    assert [tuple(crop.shape) for crop in crops] == [(3, 8, 18), (3, 4, 12), (3, 4, 7)]
    assert (crops[0] == 154).all()
    assert (crops[1] == 136).all()


@pytest.mark.parametrize("case", ["vit", "swin", "se", "norm", "asked"])
def test_boxes_are_whole_images_where_units_see_all(case: str) -> None:
    net, options, side = small_net(), {}, 24
    if case == "vit":
        net, layer = small_vit(), "encoder.layers.encoder_layer_1.ln_1"
        options = {"reshape_transform": tokens_to_grid}
    elif case == "swin":
        net, layer, side = small_swin(), "norm", 32
        options = {"reshape_transform": channels_last_to_first}
    elif case == "se":
        net, layer, side = zoo.mobilenet_v3_small(weights=None).eval(), "features.4", 64
    elif case == "norm":
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3))
        layer = "2"
    else:
        layer, options = "conv1", {"receptive_field": "image"}
    data = noise(6, side, side + 8)
    result = top_patches(net, layer, data, n=2, size=side, **options)
    assert (result.boxes == torch.tensor([0, 0, side, side])).all()
    assert torch.equal(result.unclipped_boxes, result.boxes)
    assert result.field is None
    message = {
        "vit": "more than convolution and pooling",
        "swin": "more than convolution and pooling",
        "se": "`adaptive_avg_pool2d` is on the way",
        "norm": "`group_norm` is on the way",
    }
    assert message[case] in result.reason if case in message else result.reason is None
    assert [tuple(crop.shape) for crop in result.crops(data, 1)] == [(3, side, side + 8)] * 2


def test_tokens_of_patches_have_their_patches_as_boxes() -> None:
    """A reshaped layer without attention before it has boxes, such as Swin's first embedding."""
    net, data = small_swin(), noise(5, 32, 32)
    result = top_patches(
        net, "features.0", data, n=2, size=32, reshape_transform=channels_last_to_first
    )
    assert result.reason is None
    rows, columns = result.positions.unbind(-1)
    expected = torch.stack([4 * columns, 4 * rows, 4 * columns + 4, 4 * rows + 4], -1)
    assert torch.equal(result.boxes, expected)


# --- pictures ------------------------------------------------------------------------------------


def test_the_figure_shows_the_patches() -> None:
    net, data = small_net(), noise(12, 30, 20)
    result = top_patches(net, "relu2", data, n=4, size=15)
    figure = result.figure(data, [5, 2])
    axes = figure.axes
    assert len(axes) == 8
    assert [axes[0].get_ylabel(), axes[4].get_ylabel()] == ["unit 5", "unit 2"]
    for axis, crop, value in zip(axes[4:], result.crops(data, 2), result.values[2], strict=True):
        assert axis.get_title() == f"{value:.3g}"
        assert np.array_equal(axis.images[0].get_array(), crop.permute(1, 2, 0).numpy())
    figure_of_pictures = result.figure(data, [2], context=True)
    boxes = result.picture_boxes(data, 2).tolist()
    for axis, index, (x1, y1, x2, y2) in zip(
        figure_of_pictures.axes, result.indices[2], boxes, strict=True
    ):
        assert np.array_equal(axis.images[0].get_array(), data[index][0].permute(1, 2, 0).numpy())
        (patch,) = axis.patches
        assert patch.get_xy() == (x1 - 0.5, y1 - 0.5)
        assert (patch.get_width(), patch.get_height()) == (x2 - x1, y2 - y1)
    assert len(result.figure(data).axes) == 6 * 4


def test_crops_are_copies() -> None:
    net, data = small_net(), noise(5)
    before = [picture.clone() for picture, _ in data]
    for crop in top_patches(net, "relu2", data, n=3, size=8).crops(data, 1):
        crop.zero_()
    assert all(torch.equal(picture, old) for (picture, _), old in zip(data, before, strict=True))


def test_unknown_units_and_lost_pictures_are_refused() -> None:
    net, data = small_net(), noise(12)
    result = top_patches(net, "relu2", data, n=12, size=8, units=[4, 1])
    for call in (result.crops, result.picture_boxes):
        with pytest.raises(ValueError, match="`unit` must be one of 4, 1, got 0"):
            call(data, 0)
    with pytest.raises(ValueError, match="`unit` must be one of 4, 1, got 2"):
        result.figure(data, [4, 2])
    with pytest.raises(ValueError, match=r"picture \d+ cannot be read any more"):
        result.crops(data[:5], 1)
    broken = Watched(12, unread=(7,))
    message = "picture 7 cannot be read"
    with (
        pytest.warns(UserWarning, match=message),
        pytest.raises(ValueError, match=f"{message} any more"),
    ):
        result.figure(broken)


# --- contracts -----------------------------------------------------------------------------------


class Breaking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 3:  # the last batch
            raise RuntimeError("in the middle")
        return x


@pytest.mark.parametrize("field", ["analytic", "effective"])
def test_it_leaves_no_trace(trace_free: TraceFree, field: str) -> None:
    net, data = small_net(), noise(23)
    with trace_free(net, *(picture for picture, _ in data)):
        top_patches(net, "relu2", data, size=8, batch_size=10, receptive_field=field)
    net.relu2 = Breaking()
    with trace_free(net), pytest.raises(RuntimeError, match="in the middle"):
        top_patches(net, "relu2", data, size=8, batch_size=10, receptive_field=field)


@pytest.mark.parametrize("field", ["analytic", "effective"])
def test_frozen_parameters_and_grad_modes_change_nothing(field: str) -> None:
    net, data = small_net(), noise(11)
    run = partial(top_patches, net, "relu2", data, size=8, receptive_field=field)
    expected = run()
    net.requires_grad_(False)
    with torch.no_grad():
        assert same(run(), expected)
    with torch.inference_mode():
        if field == "analytic":
            assert same(run(), expected)
        else:
            with pytest.raises(RuntimeError, match="inference_mode"):
                run()
    parallel = nn.DataParallel(net)
    assert same(top_patches(parallel, net.relu2, data, size=8, receptive_field=field), expected)
    assert same(
        top_patches(lambda x: net(x), net.relu2, data, size=8, receptive_field=field),
        ActivatingPatches(**vars(expected) | {"layer": "ReLU"}),
    )


def test_a_part_of_the_model_may_be_a_script(trace_free: TraceFree) -> None:
    net, data = small_net(), noise(11)
    expected = top_patches(net, "relu2", data, size=8)
    net.norm = torch.jit.script(net.norm)
    with trace_free(net):
        result = top_patches(net, "relu2", data, size=8)
    torch.testing.assert_close(result.values, expected.values)
    assert result.reason is not None


def test_train_mode_warns_once_and_moves_no_statistics(trace_free: TraceFree) -> None:
    net, data = small_net().train(), noise(11)
    with trace_free(net), pytest.warns(UserWarning, match="train mode") as caught:
        result = top_patches(net, "relu2", data, size=8)
    assert len(caught) == 1
    assert "`batch_norm` is on the way" in result.reason, "it sees the whole batch"


def test_threads_share_a_model(trace_free: TraceFree) -> None:
    net, sets = small_net(), [noise(20) for _ in range(4)]
    fields = ["analytic", "effective"] * 2

    def run(data: Any, field: str) -> ActivatingPatches:
        return top_patches(net, "norm", data, size=8, batch_size=3, receptive_field=field)

    expected = [run(*run_arguments) for run_arguments in zip(sets, fields, strict=True)]
    with trace_free(net), ThreadPoolExecutor(4) as pool:
        result = list(pool.map(run, sets, fields))
    assert all(same(patches, other) for patches, other in zip(result, expected, strict=True))


def test_workers_change_nothing() -> None:
    net, data = small_net(), noise(23)
    options: dict[str, Any] = {"size": 8, "batch_size": 4}
    result = top_patches(net, "relu2", data, num_workers=1, **options)
    assert same(result, top_patches(net, "relu2", data, show_progress=True, **options))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layer": "relu9"}, ValueError, "`layer` 'relu9' is not in the model"),
        ({"layer": 3}, TypeError, "`layer` must be a torch.nn.Module"),
        ({"data": []}, ValueError, "`data` must have a length, and at least one picture"),
        ({"data": iter(())}, ValueError, "`data` must have a length"),
        ({"data": [{"image": 3}]}, TypeError, "entries must be (picture, label, ...)"),
        ({"data": [(torch.rand(3, 8, 8) * 9, 0)]}, ValueError, "floats must be in [0, 1]"),
        ({"n": 0}, ValueError, "`n` must be an integer of at least 1, got 0"),
        ({"per_image": 1.5}, ValueError, "`per_image` must be an integer of at least 1"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be an integer of at least 1"),
        ({"checkpoint_every": 0}, ValueError, "`checkpoint_every` must be an integer"),
        ({"size": 0}, ValueError, "`size` must be an integer of at least 1, got 0"),
        ({"size": (8, 8, 8)}, ValueError, "`size` must be one or two numbers of pixels"),
        ({"units": []}, ValueError, "`units` must be channels, 0 or more and without repetition"),
        (
            {"units": [1, 1]},
            ValueError,
            "`units` must be channels, 0 or more and without repetition",
        ),
        ({"units": [-1]}, ValueError, "`units` must be channels, 0 or more and without repetition"),
        (
            {"units": [True]},
            ValueError,
            "`units` must be channels, 0 or more and without repetition",
        ),
        ({"units": 3}, ValueError, "`units` must be channels, 0 or more and without repetition"),
        ({"units": [6]}, ValueError, "`units` must be below 6, the channels of `layer` `relu2`"),
        ({"normalize": ((0.5,), (0.0,))}, ValueError, "`normalize` must be means and standard"),
        ({"shard": 1}, ValueError, "`shard` must be (i, k) with 0 <= i < k"),
        ({"shard": (2, 2)}, ValueError, "`shard` must be (i, k) with 0 <= i < k"),
        ({"shard": (-1, 2)}, ValueError, "`shard` must be (i, k) with 0 <= i < k"),
        ({"shard": (3, 9)}, ValueError, "and i below the 3 pictures of `data`, got (3, 9)"),
        ({"receptive_field": "all"}, ValueError, "`receptive_field` must be one of"),
        ({"energy": 1.5}, ValueError, "`energy` must be a number, at least 0 and at most 1"),
        ({"reshape_transform": 3}, TypeError, "`reshape_transform` must be callable"),
        (
            {"reshape_transform": lambda x: x.flatten(2)},
            ValueError,
            "must give (B, C, h, w) or (B, C), after `reshape_transform`, got (1, 6, 64)",
        ),
    ],
)
def test_invalid_arguments_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    net = small_net()
    complete = {"layer": "relu2", "data": noise(3), "size": 8} | arguments
    with pytest.raises(error, match=re.escape(message)):
        top_patches(net, **complete)


def test_layers_without_maps_are_refused() -> None:
    vit, lstm = small_vit(), nn.Sequential(nn.Flatten(2), nn.LSTM(64, 4, batch_first=True))
    with pytest.raises(ValueError, match="reshape_transform=tokens_to_grid"):
        top_patches(vit, "encoder.layers.encoder_layer_1", noise(2), size=24)
    with pytest.raises(ValueError, match="`layer` `1` gives 3 tensors, and not one"):
        top_patches(lstm, "1", noise(2), size=8)
    net = small_net()
    with pytest.raises(ValueError, match="did not run in the forward pass"):
        top_patches(net, nn.ReLU(), noise(2), size=8)


def test_activations_that_are_not_finite_are_refused() -> None:
    net, data = small_net(), noise(20)
    top_patches(net, "relu2", data, size=8)  # the zeros of the first pass are finite
    net.relu2 = Exploding()
    with pytest.raises(ValueError, match="of 1 images are not finite; the first has the index 13"):
        top_patches(net, "relu2", [*data[:13], (torch.ones(3, 8, 8), 0)], size=8, batch_size=5)


class Exploding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        if len(x) == 4:  # of 14 in batches of 5
            x[3, 1, 2, 0] = torch.nan
        return x


@pytest.mark.gpu
@pytest.mark.parametrize("field", ["analytic", "effective"])
def test_patches_are_equal_on_cpu_and_gpu(field: str, tmp_path: Path) -> None:
    data = noise(100)
    options: dict[str, Any] = {"size": 8, "receptive_field": field, "normalize": PLAIN}
    expected = top_patches(net_with_ties(), "1" if field == "analytic" else "0", data, **options)
    net, file = net_with_ties().cuda(), tmp_path / "top.pt"
    for _ in range(2):
        result = top_patches(net, expected.layer, data, checkpoint=file, **options)
        assert torch.equal(result.indices, expected.indices)
        assert torch.equal(result.boxes, expected.boxes)
        torch.testing.assert_close(result.values, expected.values)
