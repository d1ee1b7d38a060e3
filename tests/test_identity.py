"""Fingerprints of functions, models and methods, by which stored work is recognised."""

import json
import math
import operator
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import (
    FeaturePermutation,
    IntegratedGradients,
    KernelShap,
    LayerGradCam,
    Lime,
    NeuronGradient,
    NoiseTunnel,
    Saliency,
    ShapleyValueSampling,
)
from captum.attr._core.lime import get_exp_kernel_similarity_function
from torch import nn

from captum_ext import _identity
from captum_ext._identity import atomic_write, json_value, model_digest, versioned_name
from captum_ext.attr import (
    RISE,
    AugmentedSR,
    LayerCam,
    LayerGroupCam,
    SESSWrapper,
    UpsampleWrapper,
    tokens_to_grid,
)
from captum_ext.evaluation import evaluate
from captum_ext.evaluation.methods import ConfiguredMethod, method_fingerprint
from captum_ext.infill import gaussian
from tests.evaluation.subjects import Boxes, FixedMap
from tests.networks import tiny_net


def sharpness(results, gain=1):
    return gain * results.maps.amax((1, 2))


def unversioned(results):
    return results.maps.amax((1, 2))


class Sharpness:
    version = 3

    def __call__(self, results):
        return results.maps.amax((1, 2))

    def method(self, results):
        return results.maps.amax((1, 2))


sharpness.version = "1"
SHARPNESS = f"{__name__}.sharpness version 1"


@pytest.mark.parametrize(
    ("function", "fingerprint"),
    [
        (sharpness, SHARPNESS),
        (partial(sharpness, gain=2), f"{SHARPNESS}, (), [('gain', 2)]"),
        (
            partial(partial(sharpness, gain=2), 3),
            f"{SHARPNESS}, (3,), [('gain', 2)]",
        ),
        (
            partial(sharpness, gain=(1, len)),
            f"{SHARPNESS}, (), [('gain', (1, 'len'))]",
        ),
        (Sharpness(), f"{__name__}.Sharpness version 3"),
        (math.sqrt, "sqrt"),
        (torch.sigmoid, "_VariableFunctionsClass.sigmoid"),
        (torch.Tensor.sum, "TensorBase.sum"),
        (F.relu, "relu"),
        (operator.itemgetter(1), "operator.itemgetter(1)"),
        (tokens_to_grid, "tokens_to_grid"),
        (partial(gaussian, sigma=5.0), "gaussian, (), [('sigma', 5.0)]"),
    ],
)
def test_functions_are_identified_by_name_and_version(function, fingerprint):
    assert versioned_name("`f`", function) == fingerprint
    assert json.loads(json.dumps(json_value("`f`", {"f": [function]}))) == {"f": [fingerprint]}


@pytest.mark.parametrize(
    ("original", "other", "unchanged"),
    [
        (np.float32(1), np.float32(2), 1.0),
        (torch.tensor(1), torch.tensor(2), 1),
        (np.arange(3000), np.arange(3000)[::-1], np.arange(3000)),
        (torch.float32, torch.float16, torch.float32),
        ({"a", "b", "c"}, {"a", "b", "d"}, {"c", "b", "a"}),
        (slice(1), slice(2), slice(1)),
        ({"deep": [np.float32(1)]}, {"deep": [np.float32(2)]}, {"deep": [1.0]}),
        (get_exp_kernel_similarity_function(kernel_width=1.0),
         get_exp_kernel_similarity_function(kernel_width=2.0),
         get_exp_kernel_similarity_function(kernel_width=1.0)),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_arguments_of_a_partial_are_part_of_its_name(original, other, unchanged):
    first, second, third = (
        versioned_name("`f`", partial(sharpness, gain=value))
        for value in (original, other, unchanged)
    )
    assert first == third != second
    assert json_value("`f`", original) == json_value("`f`", unchanged) != json_value("`f`", other)
    assert " at 0x" not in first


def test_a_value_without_a_repr_is_an_error():
    for value in (object(), {object()}, np.array([object()])):
        with pytest.raises(
            ValueError, match=r"^`f` is a object, which stored work cannot recognise"
        ):
            versioned_name("`f`", partial(sharpness, gain=value))


def test_functions_of_two_modules_with_one_name_differ(monkeypatch):
    before = versioned_name("`f`", sharpness)
    monkeypatch.setattr(sharpness, "__module__", "elsewhere")
    assert versioned_name("`f`", sharpness) == "elsewhere.sharpness version 1" != before


def test_tensor_arguments_of_a_partial_are_compared_by_value():
    names = {
        versioned_name("`f`", partial(sharpness, gain=torch.tensor([1.0] * 2000 + [last])))
        for last in (0.0, 0.0, 1.0)
    }
    assert len(names) == 2


def test_modules_and_their_methods_are_identified_by_weights():
    model, unchanged, other = tiny_net(), tiny_net(), tiny_net()
    with torch.no_grad():
        other[4].bias += 1
    for get in (lambda m: m, lambda m: m.forward, lambda m: partial(m.forward, 2)):
        first, again, third = (versioned_name("`f`", get(m)) for m in (model, unchanged, other))
        assert first == again != third
        assert first.startswith("Sequential")


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (torch.zeros(2, 8), torch.zeros(4, 4)),
        (torch.zeros(4, dtype=torch.float32), torch.zeros(4, dtype=torch.int32)),
    ],
)
def test_weights_of_the_same_bytes_differ_by_their_shape_and_dtype(first, other):
    models = [nn.Module(), nn.Module()]
    for model, weight in zip(models, (first, other), strict=True):
        model.register_buffer("weight", weight)
    assert model_digest(models[0]) != model_digest(models[1])


def scaling(gain):
    def scaled(results):
        return gain * results.maps

    scaled.version = "1"
    return scaled


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (lambda results: 0, 'def function(...)`, with the line `function.version = "1"` below'),
        (scaling(2), 'def scaled(...)`, with the line `scaled.version = "1"` below'),
        (partial(scaling(2), 3), '`scaled.version = "1"` below. functools.partial fixes'),
        (unversioned, 'add the line `unversioned.version = "1"`, and change the version whenever'),
        (partial(unversioned), '`unversioned.version = "1"`'),
        (type("Local", (Sharpness,), {"version": None})(), '`Local.version = "1"`'),
        (Sharpness().method, '`Sharpness.method.version = "1"`'),
    ],
)
def test_a_function_without_a_version_is_an_error_with_the_line_to_write(function, line, tmp_path):
    with pytest.raises(ValueError, match=r"^`f` is ") as caught:
        versioned_name("`f`", function)
    assert line in str(caught.value)
    for options, where in (
        ({"metrics": {"mine": function}}, "`metrics`: mine is "),
        ({"metrics": {"infidelity": {"perturb_func": function}}}, "`metrics`: infidelity is "),
        ({"target": function}, "`target` is "),
        ({"methods": {"a": Saliency(function)}}, "`methods`: a: the model is "),
        ({"methods": {"a": (FixedMap(tiny_net()), {"gain": function})}}, "`methods`: a: gain is "),
    ):
        arguments = {
            "methods": {"a": FixedMap(tiny_net())},
            "data": Boxes(),
            "metrics": "energy",
        } | options
        with pytest.raises(ValueError, match=f"^{where}") as caught:
            evaluate(**arguments, output=tmp_path, show_progress=False)
        assert line in str(caught.value)
    assert not list(tmp_path.iterdir())


def scaled_scores(x, gain=1):
    return gain * x


def sums(scores):
    return scores.sum(1)


scaled_scores.version = sums.version = "1"


def unchanged(x):
    return x


HOLDERS = {
    "score": lambda model, f: RISE(model, score=f),
    "function": lambda model, f: FixedMap(model, f),
    "channel_reduction": lambda model, f: SESSWrapper(
        LayerGradCam(model, model[0]), channel_reduction=f, n_scales=2, window=4
    ),
    "downsample": lambda model, f: AugmentedSR(
        LayerGradCam(model, model[0]), n_augmentations=1, downsample=f
    ),
    "reshape_transform": lambda model, f: UpsampleWrapper(
        LayerGradCam(model, model[0]), reshape_transform=f
    ),
    "of a layer": lambda model, f: LayerCam(model, model[0], reshape_transform=f),
    "within": lambda model, f: NoiseTunnel(FixedMap(model, f)),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_the_options_of_a_method_are_part_of_its_fingerprint(name, monkeypatch):
    model, where = tiny_net(), "`methods`: a: " + name.replace("of a layer", "reshape_transform")

    def fingerprint(f):
        return method_fingerprint(ConfiguredMethod("a", HOLDERS[name](model, f), {}), model_digest)

    monkeypatch.setattr("tests.evaluation.subjects.VersionedFunction", lambda f: f)
    where = where.replace("within", "function")
    for f, line in (
        (lambda x: x, 'def function(...)`, with the line `function.version = "1"`'),
        (unchanged, 'add the line `unchanged.version = "1"`'),
    ):
        with pytest.raises(ValueError, match=f"^{where} is ") as caught:
            fingerprint(f)
        assert line in str(caught.value)
    texts = [
        fingerprint(f) for f in (scaled_scores, partial(scaled_scores, gain=2), sums, torch.relu)
    ]
    assert len(set(texts)) == 4
    assert fingerprint(scaled_scores) == texts[0]
    monkeypatch.setattr(scaled_scores, "version", "2")
    assert fingerprint(scaled_scores) != texts[0]


def test_captums_methods_need_no_version_and_have_no_addresses():
    model = tiny_net()
    for method in (
        KernelShap(model), Lime(model), FeaturePermutation(model), ShapleyValueSampling(model),
        NeuronGradient(model, model[0]), IntegratedGradients(model), LayerGradCam(model, model[0]),
    ):  # fmt: skip
        assert " at 0x" not in method_fingerprint(ConfiguredMethod("a", method, {}), model_digest)
    first, other = (
        method_fingerprint(ConfiguredMethod("a", Lime(model, similarity_func=f), {}), model_digest)
        for f in (get_exp_kernel_similarity_function("cosine", w) for w in (1.0, 2.0))
    )
    assert first != other


def test_stored_rows_and_maps_of_another_function_are_errors(tmp_path):
    pytest.importorskip("lightning")
    from captum_ext.fcam import fit_fcam

    model = tiny_net()
    rows = {"output": tmp_path / "rows", "show_progress": False, "batch_size": 3}
    maps = {"cache": tmp_path / "maps", "size": 8, "n_epochs": 1, "layers": ["1"], "widths": (4,)}
    data = [(Boxes()[i].image, i % 3) for i in range(4)]

    def guide(f):
        return SESSWrapper(LayerGradCam(model, model[0]), channel_reduction=f, n_scales=2, window=4)

    def both(f):
        evaluate({"a": guide(f)}, Boxes(), "energy", **rows)

    def fit(f, crf=None, **changed):
        fit_fcam(model, data, guide(f), crf=crf, show_progress=False, **maps | changed)

    both(mean)
    fit(mean)
    for run in (both, fit):
        run(mean)
        with pytest.raises(ValueError, match=r"mean version 1.*\('gain', 2\)"):
            run(partial(mean, gain=2))
        with pytest.raises(ValueError, match=r"channel_reduction is .*<lambda>"):
            run(lambda x: x.mean(1, keepdim=True))
    states = {"cache": None, "checkpoints": tmp_path / "run"}
    with pytest.raises(ValueError, match=r"^`crf` is .*no_colour, without a version"):
        fit(mean, no_colour, **states)
    fit(mean, colour, **states)
    fit(mean, colour, **states)
    with pytest.raises(ValueError, match=r"crf was .*colour version 1.*gain"):
        fit(mean, partial(colour, gain=2), **states)
    fit_fcam(model, data, guide(lambda x: x.mean(1, keepdim=True)), show_progress=False,
             **maps | {"cache": None})  # fmt: skip


def mean(x, gain=1):
    return gain * x.mean(1, keepdim=True)


def no_colour(foreground, pixels):
    return foreground.mean() * 0


def colour(foreground, pixels, gain=1):
    return foreground.mean() * 0


mean.version = colour.version = "1"


def test_another_version_is_another_run_and_another_docstring_is_not(tmp_path, monkeypatch):
    def run(metric):
        run = {"output": tmp_path, "show_progress": False, "batch_size": 3}
        return evaluate({"a": FixedMap(tiny_net())}, Boxes(), {"mine": metric}, **run)

    first = run(sharpness)
    monkeypatch.setattr(sharpness, "__doc__", "Another text.")
    monkeypatch.setattr(sharpness, "__code__", (lambda results, gain=1: 0 * results.maps).__code__)
    assert run(sharpness).figures == first.figures  # the rows of the function as it was
    with pytest.raises(ValueError, match=r"metrics: mine was .*version 1.*gain"):
        run(partial(sharpness, gain=2))
    monkeypatch.setattr(sharpness, "version", "2")
    with pytest.raises(ValueError, match=r"metrics: mine was .*version 1.*version 2"):
        run(sharpness)


def test_a_model_is_hashed_once_in_each_run(tmp_path, monkeypatch):
    hashed = []
    tensor_digests = _identity.tensor_digests
    monkeypatch.setattr(
        _identity, "tensor_digests", lambda model: hashed.append(model) or tensor_digests(model)
    )
    model, other = tiny_net(), tiny_net()
    methods = {
        "IG": IntegratedGradients(model),
        "noisy": NoiseTunnel(Saliency(model)),
        "Grad-CAM": LayerGradCam(model, model[0]),
        "CAM": LayerCam(model, model[0]),
        "SESS": SESSWrapper(LayerGradCam(model, model[0]), n_scales=2, window=4),
        "other": Saliency(other),
        "bound": Saliency(model.forward),
    }
    options = {"output": tmp_path, "show_progress": False, "batch_size": 3}
    evaluate(methods, Boxes(3), "energy", **options)
    assert hashed == [model, other]
    with torch.no_grad():
        model[4].bias += 1
    with pytest.raises(ValueError, match="rows of another run: methods: IG was") as caught:
        evaluate(methods, Boxes(3), "energy", **options)
    assert "methods: other" not in str(caught.value)
    assert hashed == [model, other] * 2


def test_fit_fcam_hashes_the_classifier_once(tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    from captum_ext.fcam import fit_fcam

    hashed = []
    tensor_digests = _identity.tensor_digests
    monkeypatch.setattr(
        _identity, "tensor_digests", lambda model: hashed.append(model) or tensor_digests(model)
    )
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    ).eval()  # fmt: skip
    fit_fcam(
        model,
        [(torch.rand(3, 16, 16), i % 3) for i in range(4)],
        LayerGradCam(model, model[0]),
        size=16,
        n_epochs=1,
        layers=["1"],
        widths=(4,),
        cache=tmp_path / "maps",
        checkpoints=tmp_path / "run",
        show_progress=False,
    )
    assert hashed == [model]


def write_half(file):
    with atomic_write(file) as unfinished:
        unfinished.write_text("sec")
        raise OSError("the disk is full")


def test_atomic_write_writes_a_complete_file_or_none(tmp_path):
    file = tmp_path / "new" / "a.txt"
    with atomic_write(file) as unfinished:
        unfinished.write_text("first")
        assert not file.exists()
    with pytest.raises(OSError, match="full"):
        write_half(file)
    assert file.read_text() == "first"
    assert list(file.parent.iterdir()) == [file]


def test_the_groups_of_a_method_are_part_of_its_fingerprint():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def fingerprint(groups):
        method = ConfiguredMethod("a", LayerGroupCam(model, "0", groups=torch.tensor(groups)), {})
        return method_fingerprint(method, model_digest)

    assert fingerprint([0, 0, 1, 1]) == fingerprint([0, 0, 1, 1]) != fingerprint([0, 1, 0, 1])
