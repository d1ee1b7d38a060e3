import io
import json
import multiprocessing
import sqlite3
import sys
import time
import types
import warnings
from contextlib import closing

import numpy as np
import pytest
import torch
from captum.attr import (
    Attribution,
    GradientShap,
    IntegratedGradients,
    LayerGradCam,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from PIL import Image
from torchvision.datasets import ImageFolder

from captum_ext import evaluation
from captum_ext._data.pixels import IMAGENET_MEAN_STD
from captum_ext.attr import FCAM, FIDO, UpsampleWrapper
from captum_ext.datasets import FineGrainedParts, PastedScenes, TexturedEllipses
from captum_ext.evaluation import Estimate, PreparedExample, Summary, evaluate, summary
from captum_ext.evaluation.examples import ExampleBatches
from captum_ext.evaluation.methods import ConfiguredMethod, move_to_device
from captum_ext.evaluation.store import ResultStore
from captum_ext.fcam import FCAMDecoder
from captum_ext.fcam.views import BoxedPictures
from captum_ext.imaging import min_max
from captum_ext.metrics import (
    MaxBoxAcc,
    PxAP,
    PxIoU,
    box_ious,
    boxes_to_masks,
    deletion,
    energy_pointing_game,
    in_top_k,
    insertion,
    total_variation,
)
from tests.evaluation.subjects import (
    Boxes,
    FixedMap,
    VersionedFunction,
    exported,
    forget,
    rows,
    three_methods,
)
from tests.networks import WeightedSum, linear_net, tiny_net

QUIET = {"show_progress": False, "normalize": None, "batch_size": 3}
CHEAP = ["pointing_game", "energy", "pxap"]


# --- values --------------------------------------------------------------------------------------


def test_figures_equal_the_metrics(tmp_path):
    data, model = Boxes(), tiny_net()
    metrics = {"localization": {}, "insertion": {"step": 0.25}}
    result = evaluate(
        {"first": FixedMap(model)}, data, metrics, output=tmp_path / "new" / "run", **QUIET
    )
    figures = {name: estimate.value for name, estimate in result.figures["first"].items()}
    assert result.images == {"first": 7}
    assert result.failures == {"first": 0}

    images = torch.stack([e.image for e in data])
    maps, masks = min_max(images[:, :1])[:, 0], torch.stack([e.mask for e in data])
    boxes, ignored = [e.boxes for e in data], torch.stack([e.ignored for e in data])
    assert figures["energy"] == pytest.approx(energy_pointing_game(images[:, 0], masks).mean())
    assert figures["pointing_game"] == 1  # of 15 pixels, in pictures of 8
    v1, v2 = MaxBoxAcc(), MaxBoxAcc(iou_thresholds=(0.3, 0.5, 0.7), contours="all")
    v1.update(maps, boxes)
    v2.update(maps, boxes)
    assert 0 < v2.compute() < 1
    assert figures["max_box_acc"] == pytest.approx(v1.compute().item())
    assert figures["max_box_acc_v2"] == pytest.approx(v2.compute().item())
    pxap = PxAP()
    pxap.update(maps, masks, ignored)
    assert figures["pxap"] == pytest.approx(pxap.compute().item())
    auc = insertion(model, images, maps, [e.target for e in data], step=0.25).auc
    assert figures["insertion"] == pytest.approx(auc.mean().item())
    assert list(figures) == [
        *("pointing_game", "energy", "max_box_acc", "max_box_acc_v2", "pxap", "px_iou"),
        "insertion",
    ]
    px_iou = PxIoU()
    px_iou.update(maps, masks, ignored)
    assert figures["px_iou"] == pytest.approx(px_iou.compute().item())
    # The values of each image are equal to the last bit.
    stored = np.array([row["insertion"] for row in rows(tmp_path / "new/run")], np.float32)
    expected = [
        insertion(
            model, images[i : i + 3], maps[i : i + 3], [j % 3 for j in range(i, i + k)], step=0.25
        ).auc
        for i, k in ((0, 3), (3, 3), (6, 1))
    ]
    assert np.array_equal(stored, torch.cat(expected).numpy())


def first_pixel(x):
    first = (10 * x[:, 0, 0, 0]).long()[:, None]
    return -((torch.arange(10) - first) % 10).float()


first_pixel.version = 1


def test_top_1_and_top_5_count_boxes_where_the_model_is_right(tmp_path):
    """The model's answer is the first pixel: 0 to 9, and then the classes that follow."""
    model = first_pixel
    data = Boxes(12)
    names = ["max_box_acc", "top_1_localization", "top_5_localization"]
    metrics = {name: {"iou_thresholds": [0.1]} for name in names}
    result = evaluate({"a": FixedMap(model)}, data, metrics, output=tmp_path, **QUIET).figures["a"]
    images, target = torch.stack([e.image for e in data]), torch.tensor([e.target for e in data])
    seen = {}
    for k in (1, 5, 10):
        right, metric = in_top_k(model(images), target, k), MaxBoxAcc((0.1,))
        metric.update(min_max(images[:, :1])[:, 0], [e.boxes for e in data], right)
        seen[k] = metric.compute().item()
    assert 0 < seen[1] < seen[5] < seen[10]
    assert [estimate.value for estimate in result.values()] == pytest.approx(
        [seen[10], seen[1], seen[5]]
    )


def test_the_overall_score_is_insertion_minus_deletion(tmp_path):
    model, data = tiny_net(), Boxes()
    options = {"insertion": {"step": 0.5}, "overall_score": {}}
    result = evaluate({"a": FixedMap(model)}, data, options, output=tmp_path / "a", **QUIET)
    images = torch.stack([e.image for e in data])
    target = [e.target for e in data]
    first = insertion(model, images, images[:, 0], target, step=0.5)
    second = deletion(model, images, images[:, 0], target)
    expected = (first.auc - second.auc).mean().item()
    assert result.figures["a"]["overall_score"].value == pytest.approx(expected, abs=1e-6)
    assert "deletion" in rows(tmp_path / "a")[0]
    alone = evaluate({"a": FixedMap(model)}, data, "overall_score", output=tmp_path / "b", **QUIET)
    assert list(alone.figures["a"]) == ["overall_score"]
    assert alone.figures["a"]["overall_score"].value != pytest.approx(expected, abs=1e-6)


def whole_image(images):
    return images, torch.zeros_like(images)


def first_class(example):
    return 0


whole_image.version = first_class.version = "1"


def test_infidelity_and_sensitivity_equal_captums(tmp_path):
    """The weights of a linear model explain noise exactly, and do not change with it."""
    weights = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    linear = WeightedSum(weights, column=True)
    methods = {
        "weights": FixedMap(linear, lambda x: weights.expand_as(x)),
        "twice": FixedMap(linear, lambda x: 2 * weights.expand_as(x)),
        "image": FixedMap(linear, lambda x: x),
    }
    metrics = {
        "infidelity": {"noise": 0.5, "normalize": False},
        "sensitivity_max": {"perturb_radius": 0.1, "n_perturb_samples": 5},
        "total_variation": {"norm": "absolute"},
    }
    result = evaluate(methods, Boxes(), metrics, output=tmp_path, **QUIET, target=first_class)
    figures = result.figures
    assert figures["weights"]["infidelity"].value == pytest.approx(0, abs=1e-9)
    # (2 w d - w d)^2, on average the variance of the noise by |w|^2.
    assert 0.5 < figures["twice"]["infidelity"].value / (0.25 * weights.square().sum()) < 2
    assert figures["twice"]["sensitivity_max"].value == 0
    images = torch.stack([e.image for e in Boxes()])
    bound = 0.1 * (images[0].numel() ** 0.5 / images.flatten(1).norm(dim=1)).mean()
    assert 0.5 * bound < figures["image"]["sensitivity_max"].value < bound
    expected = total_variation(min_max(images.sum(1, keepdim=True)), "absolute").mean().item()
    assert figures["image"]["total_variation"].value == pytest.approx(expected)
    assert not any(result.higher_is_better.values())
    options = {"perturb_func": whole_image, "normalize": False}
    hidden = evaluate(
        methods,
        Boxes(),
        {"infidelity": options},
        output=tmp_path / "h",
        **QUIET,
        target=first_class,
    )
    assert hidden.figures["weights"]["infidelity"].value == pytest.approx(0, abs=1e-9)
    expected = (images * weights).sum((1, 2, 3)).square().mean().item()  # (2 w x - w x)^2
    assert hidden.figures["twice"]["infidelity"].value == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="metrics: infidelity"):
        evaluate(methods, Boxes(), {"infidelity": {"nose": 1}}, output=tmp_path / "b", **QUIET)
    for metrics, named in (
        ({"insertion": {"stepp": 1}}, "metrics: insertion` must be one of .*'step'.*got 'stepp'"),
        ({"energy": {"tolerance": 1}}, r"metrics: energy` must be one of \[\], got 'tolerance'"),
        ({"pointing_game": {"tolerance": "far"}}, "`tolerance` must be .*'far'"),
        ({"total_variation": {"norm": "cubed"}}, "`norm` must be one of"),
    ):
        with pytest.raises(ValueError, match=named):
            evaluate(methods, Boxes(), metrics, output=tmp_path / "b", **QUIET)


def test_maps_without_a_channel_equal_maps_with_one_channel(tmp_path):
    """The batch has as many images as an image has channels, which must not be confused."""
    model, result = tiny_net(), []
    for name, function in (("a", lambda x: x[:, 0]), ("b", lambda x: x[:, :1])):
        evaluate(
            {"m": FixedMap(model, function)},
            Boxes(6),
            "infidelity",
            output=tmp_path / name,
            **QUIET,
        )
        result.append([row["infidelity"] for row in rows(tmp_path / name)])
    assert result[0] == result[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_may_have_any_precision_and_channels_last(dtype, tmp_path):
    model = tiny_net().to(dtype, memory_format=torch.channels_last)
    methods = {"s": Saliency(model), "first": FixedMap(model, lambda x: x[:, :1].expand_as(x))}
    metrics = ["localization", "insertion", "road", "infidelity", "sensitivity_max"]
    result = evaluate(methods, Boxes(), metrics, output=tmp_path / "a", **QUIET)
    assert result.failures == {"s": 0, "first": 0}, result.reasons
    singles = {"s": Saliency(tiny_net()), "first": FixedMap(tiny_net())}
    expected = evaluate(singles, Boxes(), metrics[:3], output=tmp_path / "b", **QUIET)
    for name, figures in expected.figures.items():
        for metric in ("energy", "insertion", "pxap"):
            value = result.figures[name][metric].value
            assert value == pytest.approx(figures[metric].value, abs=0.02), (name, metric)
    bound = 0.02 * (192**0.5 / torch.stack([e.image for e in Boxes()]).flatten(1).norm(dim=1))
    assert 0 < result.figures["first"]["sensitivity_max"].value < 1.5 * bound.mean()


def test_curves_equal_those_of_the_metrics(tmp_path):
    model, data = tiny_net(), Boxes()
    metrics = {"insertion": {"step": 0.25}, "deletion": {"step": 5}}
    metrics |= {"max_box_acc": {"iou_thresholds": [0.1]}, "max_box_acc_v2": {}}
    metrics |= {"pxap": {}, "px_iou": {}, "energy": {}}
    result = evaluate({"a": FixedMap(model)}, data, metrics, output=tmp_path, **QUIET)
    curves = result.curves["a"]
    assert list(curves) == list(metrics)[:-1]
    images, boxes = torch.stack([e.image for e in data]), [e.boxes for e in data]
    masks, ignored = (torch.stack([getattr(e, n) for e in data]) for n in ("mask", "ignored"))
    maps, target = min_max(images[:, :1])[:, 0], [e.target for e in data]
    for name, function in (("insertion", insertion), ("deletion", deletion)):
        curve = function(model, images, maps, target, **metrics[name])
        expected = [
            np.interp(np.arange(101) / 100, curve.shares, scores) for scores in curve.scores
        ]
        np.testing.assert_allclose(curves[name].value, np.mean(expected, axis=0), atol=1e-6)
    for name, contours in (("max_box_acc", "largest"), ("max_box_acc_v2", "all")):
        deltas = (0.3, 0.5, 0.7) if contours == "all" else (0.1,)
        ious = box_ious(maps, boxes, contours)
        expected = torch.stack([(ious >= delta).double().mean(0) for delta in deltas]).mean(0)
        np.testing.assert_allclose(curves[name].value, expected)
        assert curves[name].value.max() > 0
    metric = PxIoU()
    metric.update(maps, masks, ignored)
    np.testing.assert_allclose(curves["px_iou"].value, metric.curve(), atol=1e-6)
    total = (masks & ~ignored).sum()
    for i in range(101):
        for cut in reversed(range(1001)):
            above = (maps >= cut / 1000) & ~ignored
            right = (above & masks).sum()
            if right > 0 and right / total >= i / 100 - 1e-9:
                break
        assert curves["pxap"].value[i] == pytest.approx((right / above.sum()).item()), i
    for band in curves.values():
        assert (band.low <= band.high).all()
        assert (band.low <= band.value + 1e-9).mean() > 0.95
    titles = [axis.get_title() for axis in result.curves_figure().axes]
    assert titles == list(metrics)[:-1]
    other = evaluate({"a": FixedMap(model)}, data, "energy", output=tmp_path / "other", **QUIET)
    with pytest.raises(ValueError, match="none has a curve"):
        other.curves_figure()


def test_intervals_equal_those_of_resampled_data_sets(tmp_path):
    """Each resample is a data set of its own: MaxBoxAcc chooses another threshold."""
    data = Boxes(9)
    evaluate(
        {"a": FixedMap(tiny_net()), "b": FixedMap(tiny_net(), lambda x: x[:, 1:2].expand_as(x))},
        data,
        {"energy": {}, "max_box_acc": {"iou_thresholds": [0.35, 0.45]}, "pxap": {}},
        output=tmp_path,
        **QUIET,
    )
    result = summary(tmp_path, resamples=10, seed=3)
    images = torch.stack([e.image for e in data])
    masks = torch.stack([e.mask for e in data])
    ignored = torch.stack([e.ignored for e in data])
    random_ = np.random.default_rng(3)
    slow = {"energy": [], "max_box_acc": [], "pxap": []}
    less = {name: [] for name in slow}
    for _ in range(10):
        drawn = random_.integers(0, 9, 9)
        of_channels = []
        for channel in (0, 1):
            maps = min_max(images[drawn, channel : channel + 1])[:, 0]
            box, pixels = MaxBoxAcc((0.35, 0.45)), PxAP()
            box.update(maps, [data[i].boxes for i in drawn.tolist()])
            pixels.update(maps, masks[drawn], ignored[drawn])
            energy = energy_pointing_game(images[drawn, channel], masks[drawn]).mean()
            of_channels.append([energy.item(), box.compute().item(), pixels.compute().item()])
        for name, first, second in zip(slow, *of_channels, strict=True):
            slow[name].append(first)
            less[name].append(second - first)
    for expected, got in ((slow, result.figures["a"]), (less, result.differences["b"])):
        for name, values in expected.items():
            ends = np.percentile(values, [2.5, 97.5])
            assert [got[name].low, got[name].high] == pytest.approx(ends, abs=1e-6), name
            assert ends[0] < ends[1]
    for name in slow:  # the other way round is the negative
        other = summary(tmp_path, resamples=10, seed=3, against="b").differences["a"][name]
        second = result.differences["b"][name]
        assert (other.value, other.low) == pytest.approx((-second.value, -second.high))


def test_differences_use_the_images_that_both_methods_have(tmp_path):
    def fails_on_three(x):
        x = x.clone()
        if len(x) == 3 and torch.equal(x[0], Boxes()[3].image):
            x[0] = torch.nan
        return x[:, :1].expand_as(x)

    model = tiny_net()
    methods = {"half": FixedMap(model, fails_on_three), "whole": FixedMap(model)}
    with pytest.warns(UserWarning, match="failed: {'half': 1, 'whole': 0}"):
        result = evaluate(methods, Boxes(), "energy", output=tmp_path, **QUIET)
    assert result.figures["half"]["energy"].images == 6
    assert result.figures["whole"]["energy"].images == 7
    assert result.figures["half"]["energy"].value != result.figures["whole"]["energy"].value
    assert result.differences["whole"]["energy"] == (0, 0, 0, 6)
    other = summary(tmp_path, against="whole")
    assert other.differences == {"half": {"energy": (0, 0, 0, 6)}}
    assert result.reasons == {"half": "the map has values that are not finite"}
    assert "half: 1 failed, the first for: the map has" in result.markdown()


def test_the_table_shows_numbers_of_images_and_asterisks(tmp_path):
    data = [Boxes(12)[i] for i in range(12)]
    data[3].boxes = None
    methods = {
        "a": FixedMap(tiny_net()),
        "b": FixedMap(tiny_net(), lambda x: x[:, 1:2].expand_as(x)),
    }
    methods |= {"worse": FixedMap(tiny_net(), lambda x: -x[:, :1].expand_as(x))}
    metrics = {"max_box_acc": {"iou_thresholds": [0.1]}, "pxap": {}, "energy": {}}
    result = evaluate(methods, data, metrics, output=tmp_path, **QUIET)
    text = str(result).splitlines()
    first = result.figures["a"]
    assert text[2] == (
        f"| a | {first['max_box_acc']} (11) | {first['pxap']} | {first['energy']} | 12 |"
    )
    less = result.differences["worse"]
    assert less["energy"].high < 0
    assert text[9].count("*") == sum(not d.low <= 0 <= d.high for d in less.values()) > 0


def test_the_summary_has_tables_and_a_figure(tmp_path):
    model = tiny_net()
    methods = {
        "a|b": FixedMap(model),
        "worse": FixedMap(model, lambda x: 1 - x[:, :1].expand_as(x)),
    }
    result = evaluate(
        methods, Boxes(), ["energy", "deletion"], output=tmp_path, **QUIET, target="predicted"
    )
    text = result.markdown().splitlines()
    assert text[0] == "| method | energy ↑ | deletion ↓ | images |"
    assert text[2].startswith(f"| a\\|b | {result.figures['a|b']['energy'].value:.3f} [")
    assert text[2].endswith(" | 7 |")
    assert text[5].startswith("| less a\\|b |")
    difference = result.differences["worse"]["energy"]
    assert not text[7].endswith("*")  # of seven images nothing is sure
    assert text[9].endswith("An asterisk: the interval is without 0, of at least 10 images.")
    assert difference.value == pytest.approx(
        result.figures["worse"]["energy"].value - result.figures["a|b"]["energy"].value
    )
    axes = result.figure().axes
    assert [a.get_title() for a in axes] == [
        "energy (higher is better)",
        "deletion (lower is better)",
    ]
    drawn = {float(line.get_xdata()[0]) for line in axes[0].lines if line.get_marker() == "o"}
    assert drawn == {figures["energy"].value for figures in result.figures.values()}
    assert all(a > 0 and m > 0 for a, m in result.seconds.values())
    deletion_only = result.only("deletion")
    assert deletion_only.markdown().startswith("| method | deletion ↓ | images |")
    assert [axis.get_title() for axis in deletion_only.curves_figure().axes] == ["deletion"]
    with pytest.raises(ValueError, match="`metrics` must be one of"):
        result.only("deletions")
    targets = tiny_net()(torch.stack([e.image for e in Boxes()])).argmax(1)
    assert [int(row["target"]) for row in rows(tmp_path)] == targets.repeat(2).tolist()
    assert [row["label"] for row in rows(tmp_path)] == list("0120120") * 2


def test_objects_have_a_short_repr(tmp_path):
    batches = []

    def mean(batch):
        batches.append(batch)
        return batch.maps.mean((1, 2))

    metrics = {"pxap": {}, "mean": VersionedFunction(mean)}
    result = evaluate({"a": FixedMap(tiny_net())}, Boxes(2), metrics, output=tmp_path, **QUIET)
    assert repr(result) == "Summary(images={'a': 2}, metrics=['pxap', 'mean'])"
    assert repr(result.curves["a"]["pxap"]) == "Band(101 points over 'recall')"
    assert repr(batches[0].examples[1]) == (
        "PreparedExample(index=1, name='picture, 1', image=Tensor((3, 8, 8), float32), label=1, "
        "boxes=Tensor((1, 4), float64), mask=Tensor((8, 8), bool), ignored=Tensor((8, 8), bool))"
    )
    assert repr(batches[0]).startswith(
        "ExplainedBatch(forward_func=Sequential, images=Tensor((2, 3, 8, 8), float32), "
        "maps=Tensor((2, 8, 8), float32), target=Tensor((2,), int64), examples=["
    )


def test_old_names_of_classes_give_a_warning():
    for old, new in (
        ("Prepared", evaluation.PreparedExample),
        ("Explained", evaluation.ExplainedBatch),
    ):
        with pytest.warns(DeprecationWarning, match=f"evaluation.{old} is now"):
            assert getattr(evaluation, old) is new


@pytest.mark.parametrize(("n", "mark"), [(9, ""), (10, " *")])
def test_differences_have_an_asterisk_from_ten_images_on(n, mark):
    difference = {"energy": Estimate(0.5, 0.25, 0.75, n)}
    both = {"a": n, "b": n}
    none, nothing = dict.fromkeys("ab", 0), {"a": {}, "b": {}}
    result = Summary(nothing, {"b": difference}, "a", both, none, {}, {}, {"energy": True}, nothing)
    assert f"| b | 0.500 [0.250, 0.750]{mark} |" in result.markdown()


def test_a_figure_without_a_value_has_no_asterisk(tmp_path):
    """Without a pixel in a mask there is no PxAP, and no interval."""
    data = [Boxes()[i] for i in range(3)]
    for entry in data:
        entry.mask = torch.zeros_like(entry.mask)
    methods = {"a": FixedMap(tiny_net()), "b": FixedMap(tiny_net(), lambda x: -x)}
    text = evaluate(methods, data, "pxap", output=tmp_path, **QUIET).markdown()
    assert text.count("nan [nan, nan]") == 3
    assert "*" not in text


def test_boxes_of_resized_pictures_are_rounded_down(tmp_path):
    def block(x):
        maps = torch.zeros_like(x[:, :1])
        maps[..., 1:4, 1:4] = 1
        return maps

    # Resized, the box is (1.5, 1.5, 4.5, 4.5).
    data = [(torch.rand(3, 4, 4), 0, torch.tensor([[1, 1, 3, 3]]))] * 2
    metrics = {"max_box_acc": {"iou_thresholds": [0.9]}}
    methods = {"a": FixedMap(tiny_net(), block)}
    result = evaluate(methods, data, metrics, output=tmp_path, size=6, **QUIET)
    assert result.figures["a"]["max_box_acc"].value == 1


class Slope(Attribution):
    """A method that leaves switching gradients on to its caller."""

    def attribute(self, inputs, target=None):
        x = inputs.requires_grad_()
        return torch.autograd.grad(self.forward_func(x).sum(), x)[0]


def test_methods_have_gradients_also_inside_no_grad(tmp_path):
    with torch.no_grad():
        result = evaluate({"a": Slope(tiny_net())}, Boxes(), "energy", output=tmp_path, **QUIET)
    assert result.failures == {"a": 0}


# --- settings -------------------------------------------------------------------------------------


def test_settings_may_change_while_nothing_is_finished(tmp_path):
    """The first batch may have needed too much memory, for example."""

    def out_of_memory(x):
        raise MemoryError

    methods = {"a": FixedMap(tiny_net(), out_of_memory)}
    with pytest.raises(MemoryError):
        evaluate(methods, Boxes(), "energy", output=tmp_path, **QUIET)
    methods = {"a": FixedMap(tiny_net())}
    result = evaluate(
        methods, Boxes(), ["energy", "pxap"], output=tmp_path, **QUIET | {"batch_size": 1}
    )
    alone = evaluate(methods, Boxes(), ["energy", "pxap"], output=tmp_path / "b", **QUIET)
    assert result.figures == alone.figures
    with pytest.raises(ValueError, match="batch_size was 1 and is 3"):
        evaluate(methods, Boxes(), ["energy", "pxap"], output=tmp_path, **QUIET)


def largest(result):
    return result.maps.amax((1, 2))


def smallest(result):
    return result.maps.amin((1, 2))


largest.version = smallest.version = "1"


def test_another_function_with_the_same_name_is_another_run(tmp_path):
    evaluate({"a": FixedMap(tiny_net())}, Boxes(), {"mine": largest}, output=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="rows of another run: metrics: mine"):
        evaluate({"a": FixedMap(tiny_net())}, Boxes(), {"mine": smallest}, output=tmp_path, **QUIET)


def test_an_empty_list_of_boxes_is_no_box(tmp_path):
    data = [Boxes()[i] for i in range(3)]
    data[1].boxes = torch.zeros(0, 4)
    result = evaluate({"a": FixedMap(tiny_net())}, data, output=tmp_path, **QUIET)
    assert result.failures == {"a": 0}
    assert result.figures["a"]["max_box_acc"].images == 2
    assert result.figures["a"]["energy"].images == 3  # by its mask


def test_images_have_the_device_and_dtype_of_a_functions_layer():
    model = tiny_net().double()
    cam = LayerGradCam(lambda x: model(x), model[0])
    assert ConfiguredMethod("a", UpsampleWrapper(cam), {}).device_and_dtype == (
        torch.device("cpu"),
        torch.float64,
    )
    assert (
        ConfiguredMethod("b", FixedMap(lambda x: model(x)), {}).device_and_dtype[1] == torch.float32
    )


def sum_of(x):
    return x.sum((1, 2, 3))


sum_of.version = "1"


def test_a_model_with_one_output_has_no_predicted_class(tmp_path):
    methods = {"a": FixedMap(sum_of)}
    with pytest.raises(RuntimeError, match=r"needs a model with scores \(B, K\), got \(1,\)"):
        evaluate(methods, Boxes(), "energy", output=tmp_path, **QUIET, target="predicted")


def test_rows_of_another_run_are_an_error(tmp_path):
    model, data = tiny_net(), Boxes()
    options = {"methods": {"a": FixedMap(model)}, "data": data, "metrics": ["energy"], **QUIET}

    def run(**changed):
        others = options | changed
        return evaluate(others.pop("methods"), others.pop("data"), output=tmp_path, **others)

    run()
    before = exported(tmp_path)
    other, trained = tiny_net(), tiny_net().train()
    with torch.no_grad():
        other[4].bias += 1
    for changed, message in (
        ({"batch_size": 2}, "batch_size was 3 and is 2"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"data": Boxes(8)}, "examples was 7 and is 8"),
        ({"data": Boxes(size=(8, 9))}, "data was"),
        ({"metrics": ["energy", "pxap"]}, "metrics: pxap was None"),
        ({"metrics": {"energy": {}, "pointing_game": {"tolerance": 1}}}, "metrics: pointing_game"),
        ({"methods": {"b": FixedMap(model)}}, "methods: b was None.*methods: a was"),
        ({"methods": {"a": FixedMap(other)}}, "methods: a was"),
        ({"methods": {"a": FixedMap(trained)}}, "methods: a was .* and is .* in train mode"),
        ({"methods": {"a": (FixedMap(model), {"gain": 2})}}, "methods: a was .*gain=2"),
        ({"size": 9}, r"size was None and is \[9, 9\]"),
        ({"target": "predicted"}, "target was 'label' and is 'predicted'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**changed)
    assert exported(tmp_path) == before
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"no settings\.json"):
        run()
    assert exported(tmp_path) == before
    with pytest.raises(FileNotFoundError):
        summary(tmp_path / "nothing")


def test_a_method_stays_the_same_when_it_is_called(tmp_path):
    """Captum's Occlusion notes in itself that it has been called."""
    method = Occlusion(tiny_net())
    options = {"sliding_window_shapes": (3, 4, 4), "strides": (3, 2, 2)}
    methods = {"occlusion": (method, options)}
    first = evaluate(methods, Boxes(), "energy", output=tmp_path, **QUIET)
    assert evaluate(methods, Boxes(), "energy", output=tmp_path, **QUIET).figures == first.figures
    options["strides"] = (3, 1, 1)
    with pytest.raises(ValueError, match="rows of another run: methods: occlusion"):
        evaluate(methods, Boxes(), "energy", output=tmp_path, **QUIET)


def test_a_decoder_that_was_trained_again_is_another_method(tmp_path):
    model = tiny_net()
    decoder = FCAMDecoder.reading(model, torch.rand(1, 3, 8, 8), ["0"], widths=(4,)).eval()
    methods = {"F-CAM": NoiseTunnel(FCAM(model, decoder)), "mask": FixedMap(model)}
    methods["mask"].of = [torch.ones(3)]
    evaluate(methods, Boxes(), "energy", output=tmp_path, **QUIET)
    evaluate(methods, Boxes(), "energy", output=tmp_path, **QUIET)
    for parameter, name in ((decoder.head.weight.data, "F-CAM"), (methods["mask"].of[0], "mask")):
        parameter *= 2
        with pytest.raises(ValueError, match=f"another run: methods: {name} was"):
            evaluate(methods, Boxes(), "energy", output=tmp_path, **QUIET)
        parameter /= 2


def test_the_order_of_metrics_and_methods_does_not_matter(tmp_path):
    model, calls = tiny_net(), []
    methods = {"a": FixedMap(model, lambda x: calls.append(0) or x), "b": FixedMap(model)}
    evaluate(methods, Boxes(), ["energy", "pxap"], output=tmp_path, **QUIET)
    expected = exported(tmp_path)
    again = dict(reversed(methods.items()))
    for lost, n_calls in (("0", 0), ("number = 4", 1), ("number = 5", 0), ("1", 3)):
        forget(tmp_path, lost)
        calls.clear()
        evaluate(again, Boxes(), ["pxap", "energy"], output=tmp_path, **QUIET)
        assert exported(tmp_path) == expected
        assert len(calls) == n_calls


def test_random_numbers_of_a_metric_do_not_depend_on_the_others(tmp_path):
    generator = torch.Generator().manual_seed(5)
    fido = {"n_steps": 1, "n_masks": 2, "generator": generator}
    model = tiny_net()
    methods = {"FIDO": (FIDO(model), fido), "noisy": three_methods()["noisy"]}
    names = ["infidelity", "sensitivity_max"]
    cells = {}
    for metrics in (names, names[::-1], names[:1], names[1:]):
        folder = tmp_path / "-".join(metrics)
        evaluate(methods, Boxes(), metrics, output=folder, **QUIET)
        for name in metrics:
            cells.setdefault(name, set()).add(tuple(row[name] for row in rows(folder)))
    assert {name: len(values) for name, values in cells.items()} == dict.fromkeys(names, 1)


# --- random numbers ------------------------------------------------------------------------------


def test_random_numbers_depend_on_the_seed_the_images_and_the_name_alone(tmp_path, trace_free):
    model = tiny_net()
    methods = three_methods()
    methods |= {"again": methods["noisy"]}
    generator = torch.Generator().manual_seed(5)
    methods["FIDO"] = (FIDO(model), {"n_steps": 2, "n_masks": 2, "generator": generator})
    state = generator.get_state()
    options = {"metrics": ["energy"], **QUIET}
    with trace_free(model):
        evaluate(methods, Boxes(), output=tmp_path / "all", **options)
    assert torch.equal(generator.get_state(), state)
    for name in ("noisy", "FIDO"):
        torch.rand(9, generator=generator)
        torch.manual_seed(99)
        evaluate({name: methods[name]}, Boxes(), output=tmp_path / name, **options)
        assert rows(tmp_path / name) == [
            row for row in rows(tmp_path / "all") if row["method"] == name
        ]
    energy = {name: [] for name in methods}
    for row in rows(tmp_path / "all"):
        energy[row["method"]].append(row["energy"])
    assert energy["noisy"] != energy["again"]  # streams of their own
    evaluate({"noisy": methods["noisy"]}, Boxes(), output=tmp_path / "s", seed=1, **options)
    assert [row["energy"] for row in rows(tmp_path / "s")] != energy["noisy"]


def test_methods_that_use_numpys_generator_give_the_same_rows_again(tmp_path):
    methods = {"shap": (GradientShap(tiny_net()), {"baselines": torch.zeros(2, 3, 8, 8)})}
    state = np.random.get_state()[1].copy()
    evaluate(methods, Boxes(), "energy", output=tmp_path, **QUIET)
    assert np.array_equal(np.random.get_state()[1], state)
    expected = exported(tmp_path)
    assert forget(tmp_path, "number > 0") == 2
    np.random.random()
    evaluate(methods, Boxes(), "energy", output=tmp_path, **QUIET)
    assert exported(tmp_path) == expected


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_two_processes_give_the_rows_of_one_process(strategy, tmp_path):
    """Five batches for two processes on the CPU: nothing is padded."""
    options = {"metrics": CHEAP, **QUIET, "batch_size": 2}
    evaluate(three_methods(), Boxes(9), output=tmp_path / "one", **options)
    result = evaluate(
        three_methods(), Boxes(9), output=tmp_path / "two", devices=2, strategy=strategy, **options
    )
    assert exported(tmp_path / "two") == exported(tmp_path / "one")
    assert result.images == {"Grad-CAM": 9, "IG": 9, "noisy": 9}
    batches = [batches_of(tmp_path / "two" / f"results.{rank}.sqlite") for rank in (0, 1)]
    assert batches == [{0, 2, 4}, {1, 3}]
    # Two processes begin, and one ends the run.
    assert forget(tmp_path / "two", "number >= 10") == 5
    file = tmp_path / "two" / "results.1.sqlite"
    before = file.read_bytes()
    again = evaluate(three_methods(), Boxes(9), output=tmp_path / "two", **options)
    assert file.read_bytes() == before  # of the other process
    assert exported(tmp_path / "two") == exported(tmp_path / "one")
    assert again.figures == result.figures


def _alone(rank, folder):
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    if rank == 0:
        evaluate({"a": FixedMap(tiny_net())}, Boxes(), "energy", output=folder / "run", **QUIET)
        (folder / "done").touch()
    while not (folder / "done").exists():
        time.sleep(0.05)


def test_one_of_several_processes_can_evaluate_alone(tmp_path):
    """A training may evaluate in its first process."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_alone, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    try:
        processes[0].join(60)
        assert processes[0].exitcode == 0
    finally:
        for process in processes:
            process.kill()
    assert summary(tmp_path / "run").images == {"a": 7}


def batches_of(file):
    with closing(sqlite3.connect(file)) as connection:
        numbers = connection.execute("SELECT number FROM results").fetchall()
    return {number // 3 for (number,) in numbers}


def test_a_method_moves_to_a_device_with_all_its_tensors():
    """On a device without values, because a test machine may have no other."""
    model, device = tiny_net(), torch.device("meta")
    cam = LayerGradCam(model, model[0])
    decoder, mask = torch.nn.Linear(2, 2), torch.ones(3)
    cam.decoder, cam.mask = decoder, mask
    kwargs = {"baselines": mask, "additional_forward_args": (mask, 2), "n_steps": 3}
    moved = move_to_device(device, ConfiguredMethod("a", UpsampleWrapper(cam), kwargs))
    assert moved.device_and_dtype[0] == device
    assert cam.forward_func is model
    assert cam.layer is model[0]
    assert cam.layer.weight.device == device
    assert cam.decoder is decoder
    assert decoder.weight.device == cam.mask.device == moved.kwargs["baselines"].device == device
    assert moved.kwargs["additional_forward_args"][0].device == device
    assert moved.kwargs["n_steps"] == 3


def test_several_devices_need_lightning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.fabric", None)
    with pytest.raises(ImportError, match=r"captum_ext\[train\]"):
        evaluate(
            {"a": FixedMap(tiny_net())}, Boxes(), "energy", output=tmp_path, devices=2, **QUIET
        )


# --- what goes wrong -----------------------------------------------------------------------------


def test_an_invalid_image_becomes_a_failed_row(tmp_path):
    entries = [vars(Boxes(12)[i]) for i in range(12)]

    class Cut:
        def __getattr__(self, name):
            stream = io.BytesIO(b"no picture")
            return Image.open(stream) if name == "image" else None

    data = [type("E", (), entry)() for entry in entries]
    data[1] = Cut()
    data[2].boxes = torch.tensor([[8, 0, 9, 4]])
    data[3].boxes = torch.tensor([[4, 4, 2, 6]])
    data[4].boxes = torch.zeros(2, 3)
    data[5].mask = torch.zeros(8, 9, dtype=torch.bool)
    data[6].image = data[6].image * 2 - 1
    data[7].image = data[7].image * torch.inf
    data[8].target = 3  # there are three classes
    data[9].target = None
    data[10].boxes = torch.tensor([[-2.0, 1.0, 4.0, 99.0]])  # cut off at the border
    options = QUIET | {"batch_size": 12, "normalize": ((0.0,), (1.0,))}
    methods = {"IG": IntegratedGradients(tiny_net()), "channel": FixedMap(tiny_net())}
    for entry in data[:1] + data[2:]:
        entry.image = entry.image[:1]
    methods = {"channel": FixedMap(linear_net()), "IG": IntegratedGradients(linear_net())}
    with pytest.warns(UserWarning, match="Some rows failed"):
        result = evaluate(methods, data, "energy", output=tmp_path, **options)
    failures = {(r["method"], int(r["index"])): r["failure"] for r in rows(tmp_path)}
    assert len(failures) == 24
    for name in methods:
        for index, message in {
            1: "UnidentifiedImageError: cannot identify image file <_io.BytesIO object>",
            2: "not outside of an image of 8 x 8, got [[8.0, 0.0, 9.0, 4.0]]",
            3: "x1 < x2",
            4: "(n, 4), n at least 1",
            5: "`mask` must be bool and of the picture's size, (8, 8)",
            6: "floats must be in [0, 1]",
            7: "floats must be in [0, 1]",
            9: "must have `image` and `target`",
        }.items():
            assert message in failures[name, index]
        for index in (0, 10, 11):
            assert failures[name, index] == ""
    assert failures["channel", 8] == ""  # it takes no target
    assert failures["IG", 8].startswith(("IndexError", "RuntimeError"))
    assert result.failures == {"channel": 8, "IG": 9}
    assert result.figures["channel"]["energy"].images == 4
    before = rows(tmp_path)
    with pytest.warns(UserWarning, match="Some rows failed"):  # nothing is left
        evaluate(methods, data, "energy", output=tmp_path, **options)
    assert rows(tmp_path) == before
    region = torch.zeros(1, 8, 8, dtype=torch.bool)
    region[0, 1:, :4] = True
    stored = [r for r in rows(tmp_path) if r["method"] == "channel" and r["index"] == "10"]
    assert float(stored[0]["energy"]) == pytest.approx(
        energy_pointing_game(data[10].image, region).item()
    )


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x[:, :, :4], "the map is of 4 x 8 pixels and the image of 8 x 8"),
        (lambda x: x * torch.nan, "not finite"),
        (lambda x: x.sum(), "there is no map"),
        (lambda x: x[:0], "there is no map"),
        (lambda x: [0], "there is no map"),
        (lambda x: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_failing_method_does_not_affect_another(function, message, tmp_path):
    methods = {"bad": FixedMap(tiny_net(), function), "good": FixedMap(tiny_net())}
    with pytest.warns(UserWarning, match="Some rows failed"):
        result = evaluate(methods, Boxes(), CHEAP, output=tmp_path, **QUIET)
    assert result.failures == {"bad": 7, "good": 0}
    assert message in result.reasons["bad"]
    assert not result.figures["bad"]
    assert not result.differences["good"]
    assert result.figure().axes
    assert "| bad |" in result.markdown()
    with pytest.raises(RuntimeError, match=r"All 7 rows failed.*first reason"):
        evaluate({"bad": methods["bad"]}, Boxes(), CHEAP, output=tmp_path / "x", **QUIET)


def out_of_memory():
    try:
        torch.empty(2**60)
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("size", [3, 1])
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        out_of_memory(),
        torch.cuda.OutOfMemoryError(),
        RuntimeError("CUDA error: assert"),
    ],
)
def test_errors_of_the_machine_are_raised(error, size, tmp_path):
    def fail(x):
        if len(x) == size:
            raise error
        return x

    def fail_alone(x):  # of a batch that fails for another reason
        return 1 / 0 if len(x) > 1 else fail(x)

    with pytest.raises(type(error)):
        evaluate({"a": FixedMap(tiny_net(), fail)}, Boxes(), "energy", output=tmp_path, **QUIET)
    assert len(list(ResultStore.read(tmp_path).rows())) == (0 if size == 3 else 6)
    if size == 1:
        folder = tmp_path / "alone"
        with pytest.raises(type(error)):
            evaluate(
                {"a": FixedMap(tiny_net(), fail_alone)}, Boxes(), "energy", output=folder, **QUIET
            )
        assert not list(ResultStore.read(folder).rows())
    result = evaluate(
        {"a": FixedMap(tiny_net(), torch.relu)}, Boxes(), "energy", output=tmp_path, **QUIET
    )
    assert result.images == {"a": 7}


def test_a_truncated_picture_becomes_a_failed_row(tmp_path):
    for name in ("a/1", "a/2", "b/1"):
        file = tmp_path / f"data/{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.RandomState(0).randint(0, 255, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
    content = (tmp_path / "data/a/2.png").read_bytes()
    (tmp_path / "data/a/2.png").write_bytes(content[: len(content) // 2])
    folder = ImageFolder(tmp_path / "data")
    model = tiny_net()
    methods = {"a": LayerGradCam(model, model[0])}
    with pytest.warns(UserWarning, match="failed"):
        result = evaluate(
            methods, folder, ["average_drop", "road"], output=tmp_path / "run", show_progress=False
        )
    assert [(r["name"], bool(r["failure"])) for r in rows(tmp_path / "run")] == [
        *(("a/1.png", False), ("a/2.png", True), ("b/1.png", False))
    ]
    assert result.images == {"a": 2}
    with pytest.raises(ValueError, match="neither boxes nor masks"):
        evaluate(methods, folder, output=tmp_path / "other", show_progress=False)


def test_the_name_of_a_file_need_not_be_text(tmp_path):
    entry = Boxes()[0]
    entry.name = "caf\udce9.png"  # what Python makes of a byte that is no UTF-8
    options = QUIET | {"output": tmp_path}
    assert evaluate({"a": FixedMap(tiny_net())}, [entry], "energy", **options).images == {"a": 1}
    assert rows(tmp_path)[0]["name"] == r"caf\udce9.png"


def test_metrics_without_ground_truth_are_left_out_with_a_warning(tmp_path):
    data = [(entry.image, entry.target) for entry in (Boxes()[i] for i in range(3))]
    with pytest.warns(UserWarning, match=r"`metrics` \['pxap'\].* lack the boxes or masks"):
        result = evaluate(
            {"a": FixedMap(tiny_net())}, data, ["pxap", "deletion"], output=tmp_path / "a", **QUIET
        )
    assert list(result.figures["a"]) == ["deletion"]
    options = QUIET | {"normalize": IMAGENET_MEAN_STD, "output": tmp_path / "b"}
    normalised = [(image - 0.5, target, [0, 0, 4, 4]) for image, target in data]
    with pytest.raises(RuntimeError, match=r"All 3 rows failed.*floats must be in \[0, 1\]"):
        evaluate({"a": FixedMap(tiny_net())}, normalised, **options)


# --- data and arguments --------------------------------------------------------------------------


def test_ground_truth_is_resized_with_the_picture(tmp_path):
    """Pictures of several sizes, as PIL images in tuples and as objects."""
    mask = torch.zeros(10, 20, dtype=torch.bool)
    mask[:5, :10] = True
    left = Image.new("RGB", (20, 10))
    left.paste((255, 0, 0), (0, 0, 10, 5))
    box = [0, 0, 10, 5]
    with_mask = type("E", (), {"image": left, "target": 0, "part": mask})
    data = [
        (left, 0, box),
        (left, 0),
        with_mask,
        (left.resize((40, 20), Image.Resampling.NEAREST), 0, [[0, 0, 20, 10]]),
    ]
    model = tiny_net()
    for size, name in ((None, "own"), (8, "small"), ((40, 60), "large")):
        evaluate(
            {"red": FixedMap(model)},
            data,
            output=tmp_path / name,
            size=size,
            show_progress=False,
            normalize=((0.0,) * 3, (1.0,) * 3),
        )
        result = rows(tmp_path / name)
        assert [row["failure"] for row in result] == [""] * 4
        assert [row["ious_largest_components"] != "" for row in result] == [
            True,
            False,
            False,
            True,
        ]
        assert [row["pixel_counts"] != "" for row in result] == [False, False, True, False]
        assert result[1]["energy"] == ""
        energies = [float(result[i]["energy"]) for i in (0, 2, 3)]
        assert min(energies) > (0.999 if name == "own" else 0.8)
        figures = summary(tmp_path / name).figures["red"]
        assert figures["max_box_acc"].images == 2
        assert figures["pxap"].value > 0.9
        assert figures["max_box_acc"].value == 1


def test_corners_of_resized_boxes_at_whole_pixels_are_exact():
    """49 x (7 / 49) is less than 7, and 29 x (100 / 29) more than 100."""
    for side, new in ((49, 7), (93, 31), (500, 224), (375, 224), (333, 224)):
        image = Image.new("RGB", (side, side))
        ends = [x for x in range(1, side + 1) if x * new % side == 0]
        boxes = [[0, 0, x, x] for x in ends]
        expected = [x * new // side for x in ends]
        result = (
            ExampleBatches([(image, 0, boxes)], 1, (new, new), IMAGENET_MEAN_STD).example(0).boxes
        )
        assert result[:, 2].tolist() == result[:, 3].tolist() == expected
        assert BoxedPictures([(image, 0, boxes)], (new, new))[0][1][:, 2].tolist() == expected


def test_an_image_without_an_object_counts_for_pixels_only(tmp_path):
    """An empty mask, one that vanishes when it is resized, and a box between two pixels."""
    data = [Boxes()[i] for i in range(4)]
    for i in (1, 2, 3):
        data[i].boxes = None
    data[1].mask = torch.zeros(8, 8, dtype=torch.bool)
    data[2].mask = torch.zeros(8, 8, dtype=torch.bool)
    data[2].mask[0, 0] = True
    data[3].boxes = [0.5, 0.5, 1.5, 1.5]
    options = QUIET | {"size": 4}
    result = evaluate({"a": FixedMap(tiny_net())}, data, output=tmp_path, **options)
    assert result.failures == {"a": 0}
    cells = [[bool(row[name]) for row in rows(tmp_path)] for name in ("energy", "pixel_counts")]
    assert cells == [[True, False, False, False], [True] * 4]
    examples = [ExampleBatches(data, 4, (4, 4), None).example(i) for i in range(4)]
    pxap = PxAP()
    for example in examples:
        maps = min_max(example.image[None, :1])[:, 0]
        pxap.update(maps, example.mask[None], example.ignored[None])
    assert result.figures["a"]["pxap"].value == pytest.approx(pxap.compute().item())


def test_grey_and_colour_models_take_grey_and_colour_pictures():
    grey = Image.new("L", (4, 3), 51)
    colour = Image.new("RGB", (4, 3), (255, 0, 0))
    floats = torch.full((1, 3, 4), 0.25)
    one_channel = ((0.0,), (0.5,))
    for picture, mean in ((grey, 0.2), (colour, 0.299), (floats, 0.25)):
        result = ExampleBatches([(picture, 1)], 2, None, one_channel).example(0)
        assert result.image.shape == (1, 3, 4)
        assert result.image.flatten().tolist() == pytest.approx([2 * mean] * 12)
        result = ExampleBatches([(picture, 1)], 2, (6, 8), IMAGENET_MEAN_STD).example(0)
        assert result.image.shape == (3, 6, 8)
        expected = torch.tensor([1.0, 0, 0] if picture is colour else [mean] * 3)
        expected = (expected - torch.tensor(IMAGENET_MEAN_STD[0])) / torch.tensor(
            IMAGENET_MEAN_STD[1]
        )
        assert result.image[:, 2, 3].tolist() == pytest.approx(expected.tolist())
        result = ExampleBatches([(picture, 1)], 2, None, None).example(0)
        assert result.image.amax().item() == pytest.approx(1 if picture is colour else mean)


def test_means_and_deviations_may_be_arrays(tmp_path):
    options = QUIET | {"output": tmp_path, "normalize": ([0.0] * 3, [0.5] * 3)}
    first = evaluate({"a": FixedMap(tiny_net())}, Boxes(), "energy", **options)
    options["normalize"] = np.zeros(3), np.full(3, 0.5)
    assert (
        evaluate({"a": FixedMap(tiny_net())}, Boxes(), "energy", **options).figures == first.figures
    )


def tenth_of_labels(result):
    assert result.maps.shape == result.images.shape[:1] + result.images.shape[2:]
    return result.target * 0.1


def reversed_label(example):
    return 2 - example.label


tenth_of_labels.version = reversed_label.version = "1"


def test_users_can_add_metrics(tmp_path):
    result = evaluate(
        {"a": FixedMap(tiny_net())},
        Boxes(),
        {"tenth": tenth_of_labels, "energy": {}},
        output=tmp_path,
        **QUIET,
        target=reversed_label,
    )
    assert result.figures["a"]["tenth"].value == pytest.approx(np.mean([0.2, 0.1, 0] * 2 + [0.2]))
    assert summary(tmp_path).figures == result.figures
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["target"] == f"{__name__}.reversed_label version 1"


def test_workers_and_the_progress_bar_change_nothing(tmp_path, capsys):
    methods = {"noisy": three_methods()["noisy"]}
    options = {"metrics": ["energy"], **QUIET}
    evaluate(methods, Boxes(), output=tmp_path / "a", **options)
    assert capsys.readouterr().err == ""
    before = torch.get_rng_state()
    options |= {"show_progress": True, "num_workers": 2}
    evaluate(methods, Boxes(), output=tmp_path / "b", **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert exported(tmp_path / "a") == exported(tmp_path / "b")
    assert "7/7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"data": []}, ValueError, "`data` must have a length"),
        ({"data": iter([1])}, ValueError, "`data` must have a length"),
        ({"methods": {}}, TypeError, "`methods`"),
        ({"methods": FixedMap(tiny_net())}, TypeError, "`methods` must be a mapping"),
        ({"methods": {"a": tiny_net()}}, TypeError, "`methods`: a must be a Captum Attribution"),
        ({"methods": {"a\nb": FixedMap(tiny_net())}}, TypeError, "names of one line"),
        ({"methods": {"a": (FixedMap(tiny_net()), {"target": 1})}}, ValueError, "'target'"),
        ({"metrics": "insertions"}, ValueError, "`metrics` must be names of"),
        ({"metrics": {"energy": 3}}, ValueError, "`metrics`"),
        ({"metrics": []}, ValueError, "`metrics`"),
        ({"metrics": {"localization": {"tolerance": 0}}}, ValueError, "not of 'localization'"),
        ({"metrics": "insertoin"}, ValueError, "Closest: insertion"),
        ({"data": "pictures"}, ValueError, "`data` must be a data set"),
        (
            {"methods": {"a": (FixedMap(tiny_net()), {"gian": 1})}},
            ValueError,
            "a has no arguments .'gian'",
        ),
        ({"size": 64.0}, ValueError, "`size` must be an integer of at least 1, got 64.0"),
        ({"metrics": {"method": len}}, ValueError, r"`metrics`.*\['method'\] already"),
        (
            {"metrics": {"insertion": {}, "insertion_curve": len}},
            ValueError,
            r"\['insertion_curve'\] already",
        ),
        ({"batch_size": 0}, ValueError, "`batch_size`"),
        ({"target": "labels"}, ValueError, "`target`"),
        ({"size": (3,)}, ValueError, "`size`"),
        ({"size": 0}, ValueError, "`size`"),
        ({"seed": 0.5}, TypeError, "`seed`"),
        ({"normalize": (0.5, 0.5)}, ValueError, "`normalize`"),
        ({"num_nodes": 0}, ValueError, "`num_nodes`"),
    ],
)
def test_invalid_arguments_are_errors(changed, error, message, tmp_path):
    options = {
        "methods": {"a": FixedMap(tiny_net())},
        "data": Boxes(),
        "metrics": "energy",
        **QUIET,
    }
    options |= changed
    with pytest.raises(error, match=message):
        evaluate(options.pop("methods"), options.pop("data"), output=tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def test_another_number_of_classes_gives_a_warning(tmp_path):
    data = Boxes()
    data.classes = ["cat", "dog"]
    with pytest.warns(UserWarning, match="has 2 classes and the model of a has 3"):
        evaluate({"a": Saliency(tiny_net())}, data, "energy", output=tmp_path / "a", **QUIET)
    data.classes = ["cat", "dog", "cow"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Input Tensor 0")
        evaluate({"a": Saliency(tiny_net())}, data, "energy", output=tmp_path / "b", **QUIET)


@pytest.mark.parametrize(
    ("label", "message"), [(-1, "at least 0"), (1.7, "labels"), ("1", "labels")]
)
def test_labels_must_be_indices_of_classes(label, message, tmp_path):
    data = [(torch.rand(3, 8, 8), label)]
    with pytest.raises(RuntimeError, match=f"The first reason: .*{message}"):
        evaluate({"a": Saliency(tiny_net())}, data, "deletion", output=tmp_path, **QUIET)


def test_normalize_may_be_a_preprocess(tmp_path):
    preprocess = types.SimpleNamespace(mean=(0.5,) * 3, std=(0.25,) * 3)
    options = QUIET | {"normalize": preprocess}
    result = evaluate(
        {"a": FixedMap(tiny_net())}, Boxes(), "energy", output=tmp_path / "a", **options
    )
    options = QUIET | {"normalize": ((0.5,) * 3, (0.25,) * 3)}
    again = evaluate(
        {"a": FixedMap(tiny_net())}, Boxes(), "energy", output=tmp_path / "a", **options
    )
    assert again.figures == result.figures
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="`output` must be a folder"):
        evaluate({"a": FixedMap(tiny_net())}, Boxes(), "energy", output=file, **options)
    with pytest.raises(FileNotFoundError, match="there is no run in"):
        summary(tmp_path)


def test_the_model_is_left_as_it_was(tmp_path, trace_free):
    model = tiny_net()
    methods = {"cam": LayerGradCam(model, model[0]), "s": NoiseTunnel(Saliency(model))}
    with trace_free(model), torch.no_grad():
        evaluate(methods, Boxes(), ["energy", "deletion"], output=tmp_path, **QUIET)
    model[1] = torch.nn.BatchNorm2d(4)  # in train mode
    with trace_free(model), pytest.warns(UserWarning, match="train mode"):
        evaluate(
            {"s": Saliency(model)},
            Boxes(),
            ["energy"],
            output=tmp_path / "train",
            **QUIET,
            target="predicted",
        )
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        evaluate(methods, Boxes(), ["energy"], output=tmp_path, **QUIET)


@pytest.mark.parametrize(
    ("data", "known"),
    [
        (FineGrainedParts(2, 0), (True, True)),
        (TexturedEllipses(2, 0), (True, True)),
        (PastedScenes(2, 0, size=(160, 200)), (True, True)),
    ],
)
def test_the_data_sets_of_this_package_are_valid_data(data, known):
    example = ExampleBatches(data, 2, (96, 128), IMAGENET_MEAN_STD).example(1)
    assert isinstance(example, PreparedExample), example
    assert example.image.shape == (3, 96, 128)
    assert (example.boxes is not None, example.mask is not None) == known
    assert example.mask.shape == (96, 128)
    inside = boxes_to_masks([example.boxes], (96, 128))[0]
    assert 0.9 < (example.mask & inside).sum() / example.mask.sum() <= 1
    assert example.label == data[1].target


@pytest.mark.gpu
def test_a_gpu_gives_the_figures_of_the_cpu(tmp_path):
    metrics = {"localization": {}, "top_1_localization": {}, "overall_score": {}, "road": {}}
    metrics |= {"average_drop": {}, "infidelity": {"perturb_func": whole_image}}
    metrics |= {"total_variation": {}, "sensitivity_max": {"n_perturb_samples": 2}}
    result = {}
    for device in ("cpu", "cuda"):
        model = tiny_net().to(device)
        methods = {"Grad-CAM": LayerGradCam(model, model[0]), "IG": IntegratedGradients(model)}
        result[device] = evaluate(methods, Boxes(), metrics, output=tmp_path / device, **QUIET)
    assert all(
        "cuda" in line for line in (tmp_path / "cuda/timings.csv").read_text().splitlines()[1:]
    )
    for name, figures in result["cpu"].figures.items():
        for metric, figure in figures.items():
            if metric != "sensitivity_max":  # whose noise is another on a GPU
                other = result["cuda"].figures[name][metric]
                assert other.value == pytest.approx(figure.value, rel=1e-3, abs=1e-4), metric
