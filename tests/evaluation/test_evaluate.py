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
    GradientShap,
    IntegratedGradients,
    LayerGradCam,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from PIL import Image
from torchvision.datasets import ImageFolder

from captum_ext._data.pixels import IMAGENET_MEAN_STD
from captum_ext.attr import FCAM, FIDO, UpsampleWrapper
from captum_ext.datasets import FineGrainedParts, PastedScenes, TexturedEllipses
from captum_ext.evaluation import Example, evaluate, summary
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
from tests.evaluation.subjects import Boxes, Of, exported, forget, rows, three_methods
from tests.networks import WeightedSum, linear_net, tiny_net

QUIET = {"show_progress": False, "normalize": None, "batch_size": 3}
CHEAP = ["pointing_game", "energy", "pxap"]


# --- values --------------------------------------------------------------------------------------


def test_figures_are_those_of_the_metrics(tmp_path):
    data, model = Boxes(), tiny_net()
    metrics = {"localization": {}, "insertion": {"step": 0.25}}
    found = evaluate({"first": Of(model)}, data, metrics, output=tmp_path / "new" / "run", **QUIET)
    figures = {name: each.value for name, each in found.figures["first"].items()}
    assert found.images == {"first": 7}
    assert found.failures == {"first": 0}

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
    # Of each image to the last bit.
    stored = np.array([row["insertion"] for row in rows(tmp_path / "new/run")], np.float32)
    wanted = [
        insertion(
            model, images[i : i + 3], maps[i : i + 3], [j % 3 for j in range(i, i + k)], step=0.25
        ).auc
        for i, k in ((0, 3), (3, 3), (6, 1))
    ]
    assert np.array_equal(stored, torch.cat(wanted).numpy())


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
    found = evaluate({"a": Of(model)}, data, metrics, output=tmp_path, **QUIET).figures["a"]
    images, target = torch.stack([e.image for e in data]), torch.tensor([e.target for e in data])
    seen = {}
    for k in (1, 5, 10):
        right, metric = in_top_k(model(images), target, k), MaxBoxAcc((0.1,))
        metric.update(min_max(images[:, :1])[:, 0], [e.boxes for e in data], right)
        seen[k] = metric.compute().item()
    assert 0 < seen[1] < seen[5] < seen[10]
    assert [each.value for each in found.values()] == pytest.approx([seen[10], seen[1], seen[5]])


def test_the_overall_score_is_read_out_of_insertion_and_deletion(tmp_path):
    model, data = tiny_net(), Boxes()
    options = {"insertion": {"step": 0.5}, "overall_score": {}}
    found = evaluate({"a": Of(model)}, data, options, output=tmp_path / "a", **QUIET)
    images = torch.stack([e.image for e in data])
    target = [e.target for e in data]
    first = insertion(model, images, images[:, 0], target, step=0.5)
    second = deletion(model, images, images[:, 0], target)
    wanted = (first.auc - second.auc).mean().item()
    assert found.figures["a"]["overall_score"].value == pytest.approx(wanted, abs=1e-6)
    assert "deletion" in rows(tmp_path / "a")[0]
    alone = evaluate({"a": Of(model)}, data, "overall_score", output=tmp_path / "b", **QUIET)
    assert list(alone.figures["a"]) == ["overall_score"]
    assert alone.figures["a"]["overall_score"].value != pytest.approx(wanted, abs=1e-6)


def whole_image(images):
    return images, torch.zeros_like(images)


def first_class(example):
    return 0


whole_image.version = first_class.version = "1"


def test_infidelity_and_sensitivity_are_captums(tmp_path):
    """Of a linear model, weights explain noise exactly, and are the same beside it."""
    weights = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    linear = WeightedSum(weights, column=True)
    methods = {
        "weights": Of(linear, lambda x: weights.expand_as(x)),
        "twice": Of(linear, lambda x: 2 * weights.expand_as(x)),
        "image": Of(linear, lambda x: x),
    }
    metrics = {
        "infidelity": {"noise": 0.5, "normalize": False},
        "sensitivity_max": {"perturb_radius": 0.1, "n_perturb_samples": 5},
        "total_variation": {"norm": "absolute"},
    }
    found = evaluate(methods, Boxes(), metrics, output=tmp_path, **QUIET, target=first_class)
    figures = found.figures
    assert figures["weights"]["infidelity"].value == pytest.approx(0, abs=1e-9)
    # (2 w d - w d)^2, on average the variance of the noise by |w|^2.
    assert 0.5 < figures["twice"]["infidelity"].value / (0.25 * weights.square().sum()) < 2
    assert figures["twice"]["sensitivity_max"].value == 0
    images = torch.stack([e.image for e in Boxes()])
    bound = 0.1 * (images[0].numel() ** 0.5 / images.flatten(1).norm(dim=1)).mean()
    assert 0.5 * bound < figures["image"]["sensitivity_max"].value < bound
    wanted = total_variation(min_max(images.sum(1, keepdim=True)), "absolute").mean().item()
    assert figures["image"]["total_variation"].value == pytest.approx(wanted)
    assert not any(found.higher_is_better.values())
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
    wanted = (images * weights).sum((1, 2, 3)).square().mean().item()  # (2 w x - w x)^2
    assert hidden.figures["twice"]["infidelity"].value == pytest.approx(wanted, rel=1e-4)
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


def test_maps_without_a_channel_are_those_of_one(tmp_path):
    """As many as the images have channels, which the batch could be taken for."""
    model, found = tiny_net(), []
    for name, function in (("a", lambda x: x[:, 0]), ("b", lambda x: x[:, :1])):
        evaluate(
            {"m": Of(model, function)}, Boxes(6), "infidelity", output=tmp_path / name, **QUIET
        )
        found.append([row["infidelity"] for row in rows(tmp_path / name)])
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_any_precision_and_of_channels_last(kind, tmp_path):
    model = tiny_net().to(kind, memory_format=torch.channels_last)
    methods = {"s": Saliency(model), "first": Of(model, lambda x: x[:, :1].expand_as(x))}
    metrics = ["localization", "insertion", "road", "infidelity", "sensitivity_max"]
    found = evaluate(methods, Boxes(), metrics, output=tmp_path / "a", **QUIET)
    assert found.failures == {"s": 0, "first": 0}, found.reasons
    singles = {"s": Saliency(tiny_net()), "first": Of(tiny_net())}
    wanted = evaluate(singles, Boxes(), metrics[:3], output=tmp_path / "b", **QUIET)
    for name, figures in wanted.figures.items():
        for metric in ("energy", "insertion", "pxap"):
            value = found.figures[name][metric].value
            assert value == pytest.approx(figures[metric].value, abs=0.02), (name, metric)
    bound = 0.02 * (192**0.5 / torch.stack([e.image for e in Boxes()]).flatten(1).norm(dim=1))
    assert 0 < found.figures["first"]["sensitivity_max"].value < 1.5 * bound.mean()


def test_curves_are_those_of_the_metrics(tmp_path):
    model, data = tiny_net(), Boxes()
    metrics = {"insertion": {"step": 0.25}, "deletion": {"step": 5}}
    metrics |= {"max_box_acc": {"iou_thresholds": [0.1]}, "max_box_acc_v2": {}}
    metrics |= {"pxap": {}, "px_iou": {}, "energy": {}}
    found = evaluate({"a": Of(model)}, data, metrics, output=tmp_path, **QUIET)
    curves = found.curves["a"]
    assert list(curves) == list(metrics)[:-1]
    images, boxes = torch.stack([e.image for e in data]), [e.boxes for e in data]
    masks, ignored = (torch.stack([getattr(e, n) for e in data]) for n in ("mask", "ignored"))
    maps, target = min_max(images[:, :1])[:, 0], [e.target for e in data]
    for name, function in (("insertion", insertion), ("deletion", deletion)):
        curve = function(model, images, maps, target, **metrics[name])
        wanted = [np.interp(np.arange(101) / 100, curve.shares, each) for each in curve.scores]
        np.testing.assert_allclose(curves[name].value, np.mean(wanted, axis=0), atol=1e-6)
    for name, contours in (("max_box_acc", "largest"), ("max_box_acc_v2", "all")):
        deltas = (0.3, 0.5, 0.7) if contours == "all" else (0.1,)
        ious = box_ious(maps, boxes, contours)
        wanted = torch.stack([(ious >= delta).double().mean(0) for delta in deltas]).mean(0)
        np.testing.assert_allclose(curves[name].value, wanted)
        assert curves[name].value.max() > 0
    metric = PxIoU()
    metric.update(maps, masks, ignored)
    np.testing.assert_allclose(curves["px_iou"].value, metric.curve(), atol=1e-6)
    total = (masks & ~ignored).sum()
    for place in range(101):
        for cut in reversed(range(1001)):
            shown = (maps >= cut / 1000) & ~ignored
            right = (shown & masks).sum()
            if right > 0 and right / total >= place / 100 - 1e-9:
                break
        assert curves["pxap"].value[place] == pytest.approx((right / shown.sum()).item()), place
    for band in curves.values():
        assert (band.low <= band.high).all()
        assert (band.low <= band.value + 1e-9).mean() > 0.95
    titles = [axis.get_title() for axis in found.curves_figure().axes]
    assert titles == list(metrics)[:-1]
    other = evaluate({"a": Of(model)}, data, "energy", output=tmp_path / "other", **QUIET)
    with pytest.raises(ValueError, match="none has a curve"):
        other.curves_figure()


def test_intervals_are_those_of_resampled_data_sets(tmp_path):
    """Each resample is a data set of its own: MaxBoxAcc chooses its threshold anew."""
    data = Boxes(9)
    evaluate(
        {"a": Of(tiny_net()), "b": Of(tiny_net(), lambda x: x[:, 1:2].expand_as(x))},
        data,
        {"energy": {}, "max_box_acc": {"iou_thresholds": [0.35, 0.45]}, "pxap": {}},
        output=tmp_path,
        **QUIET,
    )
    found = summary(tmp_path, resamples=10, seed=3)
    images = torch.stack([e.image for e in data])
    masks = torch.stack([e.mask for e in data])
    ignored = torch.stack([e.ignored for e in data])
    random_ = np.random.default_rng(3)
    slow = {"energy": [], "max_box_acc": [], "pxap": []}
    less = {name: [] for name in slow}
    for _ in range(10):
        drawn = random_.integers(0, 9, 9)
        each = []
        for channel in (0, 1):
            maps = min_max(images[drawn, channel : channel + 1])[:, 0]
            box, pixels = MaxBoxAcc((0.35, 0.45)), PxAP()
            box.update(maps, [data[i].boxes for i in drawn.tolist()])
            pixels.update(maps, masks[drawn], ignored[drawn])
            energy = energy_pointing_game(images[drawn, channel], masks[drawn]).mean()
            each.append([energy.item(), box.compute().item(), pixels.compute().item()])
        for name, first, second in zip(slow, *each, strict=True):
            slow[name].append(first)
            less[name].append(second - first)
    for wanted, got in ((slow, found.figures["a"]), (less, found.differences["b"])):
        for name, values in wanted.items():
            ends = np.percentile(values, [2.5, 97.5])
            assert [got[name].low, got[name].high] == pytest.approx(ends, abs=1e-6), name
            assert ends[0] < ends[1]
    for name in slow:  # the other way round is the negative
        other = summary(tmp_path, resamples=10, seed=3, against="b").differences["a"][name]
        one = found.differences["b"][name]
        assert (other.value, other.low) == pytest.approx((-one.value, -one.high))


def test_differences_are_of_the_images_that_both_have(tmp_path):
    def fails_on_three(x):
        x = x.clone()
        if len(x) == 3 and torch.equal(x[0], Boxes()[3].image):
            x[0] = torch.nan
        return x[:, :1].expand_as(x)

    model = tiny_net()
    methods = {"half": Of(model, fails_on_three), "whole": Of(model)}
    with pytest.warns(UserWarning, match="failed: {'half': 1, 'whole': 0}"):
        found = evaluate(methods, Boxes(), "energy", output=tmp_path, **QUIET)
    assert found.figures["half"]["energy"].images == 6
    assert found.figures["whole"]["energy"].images == 7
    assert found.figures["half"]["energy"].value != found.figures["whole"]["energy"].value
    assert found.differences["whole"]["energy"] == (0, 0, 0, 6)
    other = summary(tmp_path, against="whole")
    assert other.differences == {"half": {"energy": (0, 0, 0, 6)}}
    assert found.reasons == {"half": "the map has values that are not finite"}
    assert "half: 1 failed, the first for: the map has" in found.markdown()


def test_the_table_says_of_how_many_images_and_what_is_sure(tmp_path):
    data = [Boxes(12)[i] for i in range(12)]
    data[3].boxes = None
    methods = {"a": Of(tiny_net()), "b": Of(tiny_net(), lambda x: x[:, 1:2].expand_as(x))}
    methods |= {"worse": Of(tiny_net(), lambda x: -x[:, :1].expand_as(x))}
    metrics = {"max_box_acc": {"iou_thresholds": [0.1]}, "pxap": {}, "energy": {}}
    found = evaluate(methods, data, metrics, output=tmp_path, **QUIET)
    text = str(found).splitlines()
    one = found.figures["a"]
    assert text[2] == (f"| a | {one['max_box_acc']} (11) | {one['pxap']} | {one['energy']} | 12 |")
    less = found.differences["worse"]
    assert less["energy"].high < 0
    assert text[9].count("*") == sum(not d.low <= 0 <= d.high for d in less.values()) > 0


def test_the_tables_and_the_picture(tmp_path):
    model = tiny_net()
    methods = {"a|b": Of(model), "worse": Of(model, lambda x: 1 - x[:, :1].expand_as(x))}
    found = evaluate(
        methods, Boxes(), ["energy", "deletion"], output=tmp_path, **QUIET, target="predicted"
    )
    text = found.markdown().splitlines()
    assert text[0] == "| method | energy ↑ | deletion ↓ | images |"
    assert text[2].startswith(f"| a\\|b | {found.figures['a|b']['energy'].value:.3f} [")
    assert text[2].endswith(" | 7 |")
    assert text[5].startswith("| less a\\|b |")
    one = found.differences["worse"]["energy"]
    assert not text[7].endswith("*")  # of seven images nothing is sure
    assert text[9].endswith("An asterisk: the interval is without 0, of at least 10 images.")
    assert one.value == pytest.approx(
        found.figures["worse"]["energy"].value - found.figures["a|b"]["energy"].value
    )
    axes = found.figure().axes
    assert [a.get_title() for a in axes] == [
        "energy (higher is better)",
        "deletion (lower is better)",
    ]
    drawn = {float(line.get_xdata()[0]) for line in axes[0].lines if line.get_marker() == "o"}
    assert drawn == {each["energy"].value for each in found.figures.values()}
    assert all(a > 0 and m > 0 for a, m in found.seconds.values())
    one = found.only("deletion")
    assert one.markdown().startswith("| method | deletion ↓ | images |")
    assert [axis.get_title() for axis in one.curves_figure().axes] == ["deletion"]
    with pytest.raises(ValueError, match="`metrics` must be one of"):
        found.only("deletions")
    targets = tiny_net()(torch.stack([e.image for e in Boxes()])).argmax(1)
    assert [int(row["target"]) for row in rows(tmp_path)] == targets.repeat(2).tolist()
    assert [row["label"] for row in rows(tmp_path)] == list("0120120") * 2


def test_no_asterisk_where_nothing_is_known(tmp_path):
    """Without a pixel in a mask there is no PxAP, and no interval."""
    data = [Boxes()[i] for i in range(3)]
    for entry in data:
        entry.mask = torch.zeros_like(entry.mask)
    methods = {"a": Of(tiny_net()), "b": Of(tiny_net(), lambda x: -x)}
    text = evaluate(methods, data, "pxap", output=tmp_path, **QUIET).markdown()
    assert text.count("nan [nan, nan]") == 3
    assert "*" not in text


# --- settings -------------------------------------------------------------------------------------


def test_settings_may_change_while_nothing_is_finished(tmp_path):
    """As after too little memory for the first batch."""

    def out_of_memory(x):
        raise MemoryError

    methods = {"a": Of(tiny_net(), out_of_memory)}
    with pytest.raises(MemoryError):
        evaluate(methods, Boxes(), "energy", output=tmp_path, **QUIET)
    methods = {"a": Of(tiny_net())}
    found = evaluate(
        methods, Boxes(), ["energy", "pxap"], output=tmp_path, **QUIET | {"batch_size": 1}
    )
    alone = evaluate(methods, Boxes(), ["energy", "pxap"], output=tmp_path / "b", **QUIET)
    assert found.figures == alone.figures
    with pytest.raises(ValueError, match="batch_size was 1 and is 3"):
        evaluate(methods, Boxes(), ["energy", "pxap"], output=tmp_path, **QUIET)


def largest(found):
    return found.maps.amax((1, 2))


def smallest(found):
    return found.maps.amin((1, 2))


largest.version = smallest.version = "1"


def test_another_function_under_one_name_is_another_run(tmp_path):
    evaluate({"a": Of(tiny_net())}, Boxes(), {"mine": largest}, output=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="rows of another run: metrics: mine"):
        evaluate({"a": Of(tiny_net())}, Boxes(), {"mine": smallest}, output=tmp_path, **QUIET)


def test_boxes_known_to_be_none_are_no_boxes(tmp_path):
    data = [Boxes()[i] for i in range(3)]
    data[1].boxes = torch.zeros(0, 4)
    found = evaluate({"a": Of(tiny_net())}, data, output=tmp_path, **QUIET)
    assert found.failures == {"a": 0}
    assert found.figures["a"]["max_box_acc"].images == 2
    assert found.figures["a"]["energy"].images == 3  # by its mask


def test_images_go_where_a_functions_layer_is():
    model = tiny_net().double()
    cam = LayerGradCam(lambda x: model(x), model[0])
    assert ConfiguredMethod("a", UpsampleWrapper(cam), {}).device_and_dtype == (
        torch.device("cpu"),
        torch.float64,
    )
    assert ConfiguredMethod("b", Of(lambda x: model(x)), {}).device_and_dtype[1] == torch.float32


def sum_of(x):
    return x.sum((1, 2, 3))


sum_of.version = "1"


def test_one_output_has_no_predicted_class(tmp_path):
    methods = {"a": Of(sum_of)}
    with pytest.raises(RuntimeError, match=r"needs a model with scores \(B, K\), got \(1,\)"):
        evaluate(methods, Boxes(), "energy", output=tmp_path, **QUIET, target="predicted")


def test_rows_of_another_run_are_an_error(tmp_path):
    model, data = tiny_net(), Boxes()
    good = {"methods": {"a": Of(model)}, "data": data, "metrics": ["energy"], **QUIET}

    def run(**changed):
        options = good | changed
        return evaluate(options.pop("methods"), options.pop("data"), output=tmp_path, **options)

    run()
    whole = (tmp_path / "rows.csv").read_bytes()
    other, trained = tiny_net(), tiny_net().train()
    with torch.no_grad():
        other[4].bias += 1
    for changed, said in (
        ({"batch_size": 2}, "batch_size was 3 and is 2"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"data": Boxes(8)}, "examples was 7 and is 8"),
        ({"data": Boxes(size=(8, 9))}, "data was"),
        ({"metrics": ["energy", "pxap"]}, "metrics: pxap was None"),
        ({"metrics": {"energy": {}, "pointing_game": {"tolerance": 1}}}, "metrics: pointing_game"),
        ({"methods": {"b": Of(model)}}, "methods: b was None.*methods: a was"),
        ({"methods": {"a": Of(other)}}, "methods: a was"),
        ({"methods": {"a": Of(trained)}}, "methods: a was .* and is .* in train mode"),
        ({"methods": {"a": (Of(model), {"gain": 2})}}, "methods: a was .*gain=2"),
        ({"size": 9}, r"size was None and is \[9, 9\]"),
        ({"target": "predicted"}, "target was 'label' and is 'predicted'"),
    ):
        with pytest.raises(ValueError, match=said):
            run(**changed)
    assert (tmp_path / "rows.csv").read_bytes() == whole
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"no settings\.json"):
        run()
    assert (tmp_path / "rows.csv").read_bytes() == whole
    with pytest.raises(FileNotFoundError):
        summary(tmp_path / "nothing")


def test_a_method_that_was_called_before_is_the_same_method(tmp_path):
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
    methods = {"F-CAM": NoiseTunnel(FCAM(model, decoder)), "mask": Of(model)}
    methods["mask"].of = [torch.ones(3)]
    evaluate(methods, Boxes(), "energy", output=tmp_path, **QUIET)
    evaluate(methods, Boxes(), "energy", output=tmp_path, **QUIET)
    for parameter, name in ((decoder.head.weight.data, "F-CAM"), (methods["mask"].of[0], "mask")):
        parameter *= 2
        with pytest.raises(ValueError, match=f"another run: methods: {name} was"):
            evaluate(methods, Boxes(), "energy", output=tmp_path, **QUIET)
        parameter /= 2


def test_the_order_of_metrics_and_methods_is_no_other_run(tmp_path):
    model, calls = tiny_net(), []
    methods = {"a": Of(model, lambda x: calls.append(0) or x), "b": Of(model)}
    evaluate(methods, Boxes(), ["energy", "pxap"], output=tmp_path, **QUIET)
    wanted = exported(tmp_path)
    again = dict(reversed(methods.items()))
    for lost, n_calls in (("0", 0), ("number = 4", 1), ("number = 5", 0), ("1", 3)):
        forget(tmp_path, lost)
        calls.clear()
        evaluate(again, Boxes(), ["pxap", "energy"], output=tmp_path, **QUIET)
        assert exported(tmp_path) == wanted
        assert len(calls) == n_calls


def test_random_numbers_of_a_metric_do_not_depend_on_the_others(tmp_path):
    own = torch.Generator().manual_seed(5)
    fido = {"n_steps": 1, "n_masks": 2, "generator": own}
    model = tiny_net()
    methods = {"FIDO": (FIDO(model), fido), "noisy": three_methods()["noisy"]}
    names = ["infidelity", "sensitivity_max"]
    cells = {}
    for metrics in (names, names[::-1], names[:1], names[1:]):
        folder = tmp_path / "-".join(metrics)
        evaluate(methods, Boxes(), metrics, output=folder, **QUIET)
        for name in metrics:
            cells.setdefault(name, set()).add(tuple(row[name] for row in rows(folder)))
    assert {name: len(each) for name, each in cells.items()} == dict.fromkeys(names, 1)


# --- random numbers ------------------------------------------------------------------------------


def test_random_numbers_depend_on_the_seed_the_images_and_the_name_alone(tmp_path, trace_free):
    model = tiny_net()
    methods = three_methods()
    methods |= {"again": methods["noisy"]}
    own = torch.Generator().manual_seed(5)
    methods["FIDO"] = (FIDO(model), {"n_steps": 2, "n_masks": 2, "generator": own})
    state = own.get_state()
    options = {"metrics": ["energy"], **QUIET}
    with trace_free(model):
        evaluate(methods, Boxes(), output=tmp_path / "all", **options)
    assert torch.equal(own.get_state(), state)
    for name in ("noisy", "FIDO"):
        torch.rand(9, generator=own)
        torch.manual_seed(99)
        evaluate({name: methods[name]}, Boxes(), output=tmp_path / name, **options)
        one = rows(tmp_path / name)
        assert one == [row for row in rows(tmp_path / "all") if row["method"] == name]
    energy = {name: [] for name in methods}
    for row in rows(tmp_path / "all"):
        energy[row["method"]].append(row["energy"])
    assert energy["noisy"] != energy["again"]  # streams of their own
    evaluate({"noisy": methods["noisy"]}, Boxes(), output=tmp_path / "s", seed=1, **options)
    assert [row["energy"] for row in rows(tmp_path / "s")] != energy["noisy"]


def test_methods_that_draw_numpys_numbers_give_the_same_rows_again(tmp_path):
    methods = {"shap": (GradientShap(tiny_net()), {"baselines": torch.zeros(2, 3, 8, 8)})}
    state = np.random.get_state()[1].copy()
    evaluate(methods, Boxes(), "energy", output=tmp_path, **QUIET)
    assert np.array_equal(np.random.get_state()[1], state)
    wanted = exported(tmp_path)
    assert forget(tmp_path, "number > 0") == 2
    np.random.random()
    evaluate(methods, Boxes(), "energy", output=tmp_path, **QUIET)
    assert exported(tmp_path) == wanted


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_two_processes_give_the_rows_of_one(strategy, tmp_path):
    """By gloo, on the CPU; five batches of two to two processes: nothing is padded."""
    options = {"metrics": CHEAP, **QUIET, "batch_size": 2}
    evaluate(three_methods(), Boxes(9), output=tmp_path / "one", **options)
    found = evaluate(
        three_methods(), Boxes(9), output=tmp_path / "two", devices=2, strategy=strategy, **options
    )
    assert exported(tmp_path / "two") == exported(tmp_path / "one")
    assert found.images == {"Grad-CAM": 9, "IG": 9, "noisy": 9}
    batches = [batches_of(tmp_path / "two" / f"results.{rank}.sqlite") for rank in (0, 1)]
    assert batches == [{0, 2, 4}, {1, 3}]
    # Begun by two, finished by one.
    assert forget(tmp_path / "two", "number >= 10") == 5
    file = tmp_path / "two" / "results.1.sqlite"
    before = file.read_bytes()
    again = evaluate(three_methods(), Boxes(9), output=tmp_path / "two", **options)
    assert file.read_bytes() == before  # the other's file
    assert exported(tmp_path / "two") == exported(tmp_path / "one")
    assert again.figures == found.figures


def _alone(rank, folder):
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    if rank == 0:
        evaluate({"a": Of(tiny_net())}, Boxes(), "energy", output=folder / "run", **QUIET)
        (folder / "done").touch()
    while not (folder / "done").exists():
        time.sleep(0.05)


def test_one_of_several_processes_evaluates_by_itself(tmp_path):
    """As a training does in its first process."""
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=_alone, args=(rank, tmp_path)) for rank in (0, 1)]
    for one in both:
        one.start()
    try:
        both[0].join(60)
        assert both[0].exitcode == 0
    finally:
        for one in both:
            one.kill()
    assert summary(tmp_path / "run").images == {"a": 7}


def batches_of(file):
    with closing(sqlite3.connect(file)) as connection:
        numbers = connection.execute("SELECT number FROM results").fetchall()
    return {number // 3 for (number,) in numbers}


def test_each_process_has_everything_on_its_device():
    """On a device without values, as there may be no other."""
    model, there = tiny_net(), torch.device("meta")
    cam = LayerGradCam(model, model[0])
    decoder, mask = torch.nn.Linear(2, 2), torch.ones(3)
    cam.decoder, cam.mask = decoder, mask
    kwargs = {"baselines": mask, "additional_forward_args": (mask, 2), "n_steps": 3}
    moved = move_to_device(there, ConfiguredMethod("a", UpsampleWrapper(cam), kwargs))
    assert moved.device_and_dtype[0] == there
    assert cam.forward_func is model
    assert cam.layer is model[0]
    assert cam.layer.weight.device == there
    assert cam.decoder is decoder
    assert decoder.weight.device == cam.mask.device == moved.kwargs["baselines"].device == there
    assert moved.kwargs["additional_forward_args"][0].device == there
    assert moved.kwargs["n_steps"] == 3


def test_several_devices_need_lightning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.fabric", None)
    with pytest.raises(ImportError, match=r"captum_ext\[train\]"):
        evaluate({"a": Of(tiny_net())}, Boxes(), "energy", output=tmp_path, devices=2, **QUIET)


# --- what goes wrong -----------------------------------------------------------------------------


def test_what_is_wrong_with_one_image_becomes_a_row(tmp_path):
    good = [vars(Boxes(12)[i]) for i in range(12)]

    class Cut:
        def __getattr__(self, name):
            stream = io.BytesIO(b"no picture")
            return Image.open(stream) if name == "image" else None

    data = [type("E", (), entry)() for entry in good]
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
    methods = {"IG": IntegratedGradients(tiny_net()), "channel": Of(tiny_net())}
    for entry in data[:1] + data[2:]:
        entry.image = entry.image[:1]
    methods = {"channel": Of(linear_net()), "IG": IntegratedGradients(linear_net())}
    with pytest.warns(UserWarning, match="Some rows failed"):
        found = evaluate(methods, data, "energy", output=tmp_path, **options)
    failures = {(r["method"], int(r["index"])): r["failure"] for r in rows(tmp_path)}
    assert len(failures) == 24
    for name in methods:
        for index, said in {
            1: "UnidentifiedImageError: cannot identify image file <_io.BytesIO object>",
            2: "not outside of an image of 8 x 8, got [[8.0, 0.0, 9.0, 4.0]]",
            3: "x1 < x2",
            4: "(n, 4), n at least 1",
            5: "`mask` must be bool and of the picture's size, (8, 8)",
            6: "floats must be in [0, 1]",
            7: "floats must be in [0, 1]",
            9: "must have `image` and `target`",
        }.items():
            assert said in failures[name, index]
        for index in (0, 10, 11):
            assert failures[name, index] == ""
    assert failures["channel", 8] == ""  # it takes no target
    assert failures["IG", 8].startswith(("IndexError", "RuntimeError"))
    assert found.failures == {"channel": 8, "IG": 9}
    assert found.figures["channel"]["energy"].images == 4
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
    ("function", "said"),
    [
        (lambda x: x[:, :, :4], "the map is of 4 x 8 pixels and the image of 8 x 8"),
        (lambda x: x * torch.nan, "not finite"),
        (lambda x: x.sum(), "there is no map"),
        (lambda x: x[:0], "there is no map"),
        (lambda x: [0], "there is no map"),
        (lambda x: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_method_that_fails_beside_one_that_does_not(function, said, tmp_path):
    methods = {"bad": Of(tiny_net(), function), "good": Of(tiny_net())}
    with pytest.warns(UserWarning, match="Some rows failed"):
        found = evaluate(methods, Boxes(), CHEAP, output=tmp_path, **QUIET)
    assert found.failures == {"bad": 7, "good": 0}
    assert said in found.reasons["bad"]
    assert not found.figures["bad"]
    assert not found.differences["good"]
    assert found.figure().axes
    assert "| bad |" in found.markdown()
    with pytest.raises(RuntimeError, match=r"Not one of 7 rows.*first reason"):
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
def test_the_machines_fault_is_no_row(error, size, tmp_path):
    def fail(x):
        if len(x) == size:
            raise error
        return x

    def fail_alone(x):  # of a batch that fails for another reason
        return 1 / 0 if len(x) > 1 else fail(x)

    with pytest.raises(type(error)):
        evaluate({"a": Of(tiny_net(), fail)}, Boxes(), "energy", output=tmp_path, **QUIET)
    assert len(list(ResultStore.read(tmp_path).rows())) == (0 if size == 3 else 6)
    if size == 1:
        folder = tmp_path / "alone"
        with pytest.raises(type(error)):
            evaluate({"a": Of(tiny_net(), fail_alone)}, Boxes(), "energy", output=folder, **QUIET)
        assert not list(ResultStore.read(folder).rows())
    found = evaluate({"a": Of(tiny_net(), torch.relu)}, Boxes(), "energy", output=tmp_path, **QUIET)
    assert found.images == {"a": 7}


def test_a_cut_file_in_a_folder_of_pictures(tmp_path):
    for name in ("a/1", "a/2", "b/1"):
        file = tmp_path / f"data/{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.RandomState(0).randint(0, 255, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
    whole = (tmp_path / "data/a/2.png").read_bytes()
    (tmp_path / "data/a/2.png").write_bytes(whole[: len(whole) // 2])
    folder = ImageFolder(tmp_path / "data")
    model = tiny_net()
    methods = {"a": LayerGradCam(model, model[0])}
    with pytest.warns(UserWarning, match="failed"):
        found = evaluate(
            methods, folder, ["average_drop", "road"], output=tmp_path / "run", show_progress=False
        )
    assert [(r["name"], bool(r["failure"])) for r in rows(tmp_path / "run")] == [
        *(("a/1.png", False), ("a/2.png", True), ("b/1.png", False))
    ]
    assert found.images == {"a": 2}
    with pytest.raises(ValueError, match="neither boxes nor masks"):
        evaluate(methods, folder, output=tmp_path / "other", show_progress=False)


def test_a_file_whose_name_is_no_text(tmp_path):
    entry = Boxes()[0]
    entry.name = "caf\udce9.png"  # what Python makes of a byte that is no UTF-8
    options = QUIET | {"output": tmp_path}
    assert evaluate({"a": Of(tiny_net())}, [entry], "energy", **options).images == {"a": 1}
    assert rows(tmp_path)[0]["name"] == r"caf\udce9.png"


def test_metrics_for_which_no_example_has_the_truth(tmp_path):
    data = [(entry.image, entry.target) for entry in (Boxes()[i] for i in range(3))]
    with pytest.warns(UserWarning, match=r"`metrics` \['pxap'\].* lack the boxes or masks"):
        found = evaluate(
            {"a": Of(tiny_net())}, data, ["pxap", "deletion"], output=tmp_path / "a", **QUIET
        )
    assert list(found.figures["a"]) == ["deletion"]
    options = QUIET | {"normalize": IMAGENET_MEAN_STD, "output": tmp_path / "b"}
    normalised = [(image - 0.5, target, [0, 0, 4, 4]) for image, target in data]
    with pytest.raises(RuntimeError, match=r"Not one of 3 rows.*floats must be in \[0, 1\]"):
        evaluate({"a": Of(tiny_net())}, normalised, **options)


# --- data and arguments --------------------------------------------------------------------------


def test_ground_truth_follows_the_picture_to_its_size(tmp_path):
    """Pictures of several sizes, as PIL images in tuples and as objects."""
    mask = torch.zeros(10, 20, dtype=torch.bool)
    mask[:5, :10] = True
    left = Image.new("RGB", (20, 10))
    left.paste((255, 0, 0), (0, 0, 10, 5))
    box = [0, 0, 10, 5]
    one = type("E", (), {"image": left, "target": 0, "part": mask})
    data = [
        (left, 0, box),
        (left, 0),
        one,
        (left.resize((40, 20), Image.Resampling.NEAREST), 0, [[0, 0, 20, 10]]),
    ]
    model = tiny_net()
    for size, name in ((None, "own"), (8, "small"), ((40, 60), "large")):
        evaluate(
            {"red": Of(model)},
            data,
            output=tmp_path / name,
            size=size,
            show_progress=False,
            normalize=((0.0,) * 3, (1.0,) * 3),
        )
        found = rows(tmp_path / name)
        assert [row["failure"] for row in found] == [""] * 4
        assert [row["ious_largest_components"] != "" for row in found] == [True, False, False, True]
        assert [row["pixel_counts"] != "" for row in found] == [False, False, True, False]
        assert found[1]["energy"] == ""
        energies = [float(found[i]["energy"]) for i in (0, 2, 3)]
        assert min(energies) > (0.999 if name == "own" else 0.8)
        figures = summary(tmp_path / name).figures["red"]
        assert figures["max_box_acc"].images == 2
        assert figures["pxap"].value > 0.9
        assert figures["max_box_acc"].value == 1


def test_corners_of_boxes_that_come_to_whole_pixels_are_whole():
    """49 x (7 / 49) is less than 7, and 29 x (100 / 29) more than 100."""
    for side, new in ((49, 7), (93, 31), (500, 224), (375, 224), (333, 224)):
        image = Image.new("RGB", (side, side))
        ends = [x for x in range(1, side + 1) if x * new % side == 0]
        boxes = [[0, 0, x, x] for x in ends]
        wanted = [x * new // side for x in ends]
        found = (
            ExampleBatches([(image, 0, boxes)], 1, (new, new), IMAGENET_MEAN_STD).example(0).boxes
        )
        assert found[:, 2].tolist() == found[:, 3].tolist() == wanted
        assert BoxedPictures([(image, 0, boxes)], (new, new))[0][1][:, 2].tolist() == wanted


def test_an_image_without_an_object_is_not_pointed_at_and_counts_for_pixels(tmp_path):
    """An empty mask, one that is gone at the size of the run, and a box between two pixels."""
    data = [Boxes()[i] for i in range(4)]
    for i in (1, 2, 3):
        data[i].boxes = None
    data[1].mask = torch.zeros(8, 8, dtype=torch.bool)
    data[2].mask = torch.zeros(8, 8, dtype=torch.bool)
    data[2].mask[0, 0] = True
    data[3].boxes = [0.5, 0.5, 1.5, 1.5]
    options = QUIET | {"size": 4}
    found = evaluate({"a": Of(tiny_net())}, data, output=tmp_path, **options)
    assert found.failures == {"a": 0}
    cells = [[bool(row[name]) for row in rows(tmp_path)] for name in ("energy", "pixel_counts")]
    assert cells == [[True, False, False, False], [True] * 4]
    kept = [ExampleBatches(data, 4, (4, 4), None).example(i) for i in range(4)]
    pxap = PxAP()
    for one in kept:
        pxap.update(min_max(one.image[None, :1])[:, 0], one.mask[None], one.ignored[None])
    assert found.figures["a"]["pxap"].value == pytest.approx(pxap.compute().item())


def test_grey_models_and_colour_models_take_either():
    grey = Image.new("L", (4, 3), 51)
    colour = Image.new("RGB", (4, 3), (255, 0, 0))
    floats = torch.full((1, 3, 4), 0.25)
    one = ((0.0,), (0.5,))
    for picture, mean in ((grey, 0.2), (colour, 0.299), (floats, 0.25)):
        found = ExampleBatches([(picture, 1)], 2, None, one).example(0)
        assert found.image.shape == (1, 3, 4)
        assert found.image.flatten().tolist() == pytest.approx([2 * mean] * 12)
        found = ExampleBatches([(picture, 1)], 2, (6, 8), IMAGENET_MEAN_STD).example(0)
        assert found.image.shape == (3, 6, 8)
        wanted = torch.tensor([1.0, 0, 0] if picture is colour else [mean] * 3)
        wanted = (wanted - torch.tensor(IMAGENET_MEAN_STD[0])) / torch.tensor(IMAGENET_MEAN_STD[1])
        assert found.image[:, 2, 3].tolist() == pytest.approx(wanted.tolist())
        found = ExampleBatches([(picture, 1)], 2, None, None).example(0)
        assert found.image.amax().item() == pytest.approx(1 if picture is colour else mean)


def test_means_and_deviations_may_be_arrays(tmp_path):
    options = QUIET | {"output": tmp_path, "normalize": ([0.0] * 3, [0.5] * 3)}
    first = evaluate({"a": Of(tiny_net())}, Boxes(), "energy", **options)
    options["normalize"] = np.zeros(3), np.full(3, 0.5)
    assert evaluate({"a": Of(tiny_net())}, Boxes(), "energy", **options).figures == first.figures


def tenth_of_labels(found):
    assert found.maps.shape == found.images.shape[:1] + found.images.shape[2:]
    return found.target * 0.1


def reversed_label(example):
    return 2 - example.label


tenth_of_labels.version = reversed_label.version = "1"


def test_metrics_of_the_callers_own(tmp_path):
    found = evaluate(
        {"a": Of(tiny_net())},
        Boxes(),
        {"tenth": tenth_of_labels, "energy": {}},
        output=tmp_path,
        **QUIET,
        target=reversed_label,
    )
    assert found.figures["a"]["tenth"].value == pytest.approx(np.mean([0.2, 0.1, 0] * 2 + [0.2]))
    assert summary(tmp_path).figures == found.figures
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
    ("changed", "error", "said"),
    [
        ({"data": []}, ValueError, "`data` must have a length"),
        ({"data": iter([1])}, ValueError, "`data` must have a length"),
        ({"methods": {}}, TypeError, "`methods`"),
        ({"methods": Of(tiny_net())}, TypeError, "`methods` must be a mapping"),
        ({"methods": {"a": tiny_net()}}, TypeError, "`methods`: a must be a Captum Attribution"),
        ({"methods": {"a\nb": Of(tiny_net())}}, TypeError, "names of one line"),
        ({"methods": {"a": (Of(tiny_net()), {"target": 1})}}, ValueError, "'target'"),
        ({"metrics": "insertions"}, ValueError, "`metrics` must be names of"),
        ({"metrics": {"energy": 3}}, ValueError, "`metrics`"),
        ({"metrics": []}, ValueError, "`metrics`"),
        ({"metrics": {"localization": {"tolerance": 0}}}, ValueError, "not of 'localization'"),
        ({"metrics": "insertoin"}, ValueError, "Closest: insertion"),
        ({"data": "pictures"}, ValueError, "`data` must be a data set"),
        (
            {"methods": {"a": (Of(tiny_net()), {"gian": 1})}},
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
def test_arguments_that_do_not_fit(changed, error, said, tmp_path):
    options = {"methods": {"a": Of(tiny_net())}, "data": Boxes(), "metrics": "energy", **QUIET}
    options |= changed
    with pytest.raises(error, match=said):
        evaluate(options.pop("methods"), options.pop("data"), output=tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def test_labels_of_other_classes_are_warned_of(tmp_path):
    data = Boxes()
    data.classes = ["cat", "dog"]
    with pytest.warns(UserWarning, match="has 2 classes and the model of a has 3"):
        evaluate({"a": Saliency(tiny_net())}, data, "energy", output=tmp_path / "a", **QUIET)
    data.classes = ["cat", "dog", "cow"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Input Tensor 0")
        evaluate({"a": Saliency(tiny_net())}, data, "energy", output=tmp_path / "b", **QUIET)


@pytest.mark.parametrize(("label", "said"), [(-1, "at least 0"), (1.7, "labels"), ("1", "labels")])
def test_labels_must_be_indices_of_classes(label, said, tmp_path):
    data = [(torch.rand(3, 8, 8), label)]
    with pytest.raises(RuntimeError, match=f"The first reason: .*{said}"):
        evaluate({"a": Saliency(tiny_net())}, data, "deletion", output=tmp_path, **QUIET)


def test_normalize_takes_a_preprocess(tmp_path):
    preprocess = types.SimpleNamespace(mean=(0.5,) * 3, std=(0.25,) * 3)
    options = QUIET | {"normalize": preprocess}
    found = evaluate({"a": Of(tiny_net())}, Boxes(), "energy", output=tmp_path / "a", **options)
    options = QUIET | {"normalize": ((0.5,) * 3, (0.25,) * 3)}
    again = evaluate({"a": Of(tiny_net())}, Boxes(), "energy", output=tmp_path / "a", **options)
    assert again.figures == found.figures
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="`output` must be a folder"):
        evaluate({"a": Of(tiny_net())}, Boxes(), "energy", output=file, **options)
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
def test_the_data_sets_of_this_package_are_taken_as_they_are(data, known):
    example = ExampleBatches(data, 2, (96, 128), IMAGENET_MEAN_STD).example(1)
    assert isinstance(example, Example), example
    assert example.image.shape == (3, 96, 128)
    assert (example.boxes is not None, example.mask is not None) == known
    assert example.mask.shape == (96, 128)
    inside = boxes_to_masks([example.boxes], (96, 128))[0]
    assert 0.9 < (example.mask & inside).sum() / example.mask.sum() <= 1
    assert example.label == data[1].target


@pytest.mark.gpu
def test_on_a_gpu_it_finds_what_it_finds_on_the_cpu(tmp_path):
    metrics = {"localization": {}, "top_1_localization": {}, "overall_score": {}, "road": {}}
    metrics |= {"average_drop": {}, "infidelity": {"perturb_func": whole_image}}
    metrics |= {"total_variation": {}, "sensitivity_max": {"n_perturb_samples": 2}}
    found = {}
    for device in ("cpu", "cuda"):
        model = tiny_net().to(device)
        methods = {"Grad-CAM": LayerGradCam(model, model[0]), "IG": IntegratedGradients(model)}
        found[device] = evaluate(methods, Boxes(), metrics, output=tmp_path / device, **QUIET)
    assert all("cuda" in line for line in (tmp_path / "cuda/timings.csv").read_text().split()[1:])
    for name, figures in found["cpu"].figures.items():
        for metric, figure in figures.items():
            if metric != "sensitivity_max":  # whose noise is another on a GPU
                other = found["cuda"].figures[name][metric]
                assert other.value == pytest.approx(figure.value, rel=1e-3, abs=1e-4), metric
