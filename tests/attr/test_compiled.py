"""Compiled models: layer methods refuse them or are right, and all other methods run on them."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from captum.attr import IntegratedGradients, LayerGradCam, Occlusion, Saliency
from torch import Tensor, nn

from captum_ext.attr import FIDO, RISE, AugmentedSR, LayerAblationCam, SESSWrapper, UpsampleWrapper
from captum_ext.fcam import find_feature_layers
from captum_ext.features import ActivationMaximization, maximally_activating_patches
from captum_ext.metrics import average_drop, deletion, increase_in_confidence, insertion, road
from tests.methods import METHODS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*global hooks on:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Dynamo detected a call:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*cannot be run for several edits:UserWarning"),
]

IN_CI_AND_SLOW = [
    pytest.param(method, id=name, marks=() if name in ("HiResCAM", "CAM") else pytest.mark.slow)
    for name, method in METHODS.items()
]


@pytest.fixture(autouse=True)
def _without_earlier_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Two convolutions as `features`, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3), nn.ReLU()
        )
        self.head = nn.Linear(6, 4)
        nn.init.normal_(self.head.weight)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def compile_in_new_module(net: nn.Module) -> Any:
    return torch.compile(net, backend="eager")


def compile_in_place(net: nn.Module) -> Any:
    net.compile(backend="eager")
    return net


COMPILE = {"torch.compile(net)": compile_in_new_module, "net.compile()": compile_in_place}


def warm_up(model: Any) -> None:
    with torch.no_grad():
        model(images())


def images() -> Tensor:
    return torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("compile_net", COMPILE.values(), ids=COMPILE)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_layer_methods_refuse_compiled_models(
    method: Callable[..., Any], compile_net: Callable[..., Any]
) -> None:
    model = compile_net(Net())
    with pytest.raises(ValueError, match="`forward_func` is a compiled module"):
        method(model, "features").attribute(images(), target=0)
    late = Net()
    attribution = method(late, "features")
    compile_in_place(late)
    with pytest.raises(ValueError, match="`forward_func` is a compiled module"):
        attribution.attribute(images(), target=0)


@pytest.mark.parametrize("compile_net", COMPILE.values(), ids=COMPILE)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_layer_methods_refuse_layers_inside_of_compiled_parts(
    method: Callable[..., Any], compile_net: Callable[..., Any]
) -> None:
    net = Net()
    layer = net.features[3]
    net.features = compile_net(net.features)
    with pytest.raises(ValueError, match="`layer` is in `features`, a compiled module"):
        method(net, layer).attribute(images(), target=0)


@pytest.mark.parametrize("method", IN_CI_AND_SLOW)
def test_layer_methods_are_right_where_no_compiled_graph_runs(method: Callable[..., Any]) -> None:
    """Without compiled graphs, beside a compiled part, and at a compiled part's own output."""
    expected = method(Net(), "features").attribute(images(), target=1)
    net = compile_in_place(Net())
    warm_up(net)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(method(net, "features").attribute(images(), target=1), expected)
    for compile_net in COMPILE.values():
        net = Net()
        net.head = compile_net(net.head)
        warm_up(net)
        result = method(net, "features").attribute(images(), target=1)
        torch.testing.assert_close(result, expected)
    net = Net()
    net.features = compile_in_new_module(net.features)
    warm_up(net)
    result = method(net, "features").attribute(images(), target=1)
    torch.testing.assert_close(result, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["HiResCAM", "Score-CAM", "Ablation-CAM"])
@pytest.mark.parametrize("net", [Net, lambda: nn.Sequential(*Net().features, nn.Flatten())])
def test_a_compiled_model_inside_of_a_function_gives_the_map_or_an_error(
    name: str, net: Callable[[], Any]
) -> None:
    """Torch decides by itself whether the compiled graph is of use, or hooks are seen."""
    model, target = net(), 1
    layer = model[4] if isinstance(model, nn.Sequential) else model.features
    expected = METHODS[name](model, layer).attribute(images(), target=target)
    compiled = compile_in_new_module(model)
    warm_up(compiled)
    for _ in range(2):
        try:
            result = METHODS[name](lambda x: compiled(x), layer).attribute(images(), target=target)
        except ValueError as error:
            message = str(error)
        else:
            message = "did not run, and set_stance has no effect"
            torch.testing.assert_close(result, expected)
        assert re.search(r"did not run.*set_stance", message)


@pytest.mark.parametrize("compile_net", COMPILE.values(), ids=COMPILE)
def test_other_users_of_layers_refuse_compiled_models(compile_net: Callable[..., Any]) -> None:
    model, data = compile_net(Net()), [(torch.rand(3, 12, 12), 0)]
    layer = getattr(model, "_orig_mod", model).features
    runs: list[Callable[[], Any]] = [
        lambda: ActivationMaximization(model, layer),
        lambda: maximally_activating_patches(model, layer, data, size=12),
        lambda: find_feature_layers(model, images()),
        lambda: AugmentedSR(LayerGradCam(model, layer), align="rf").attribute(images(), target=0),
    ]
    for run in runs:
        with pytest.raises(ValueError, match=r"`(forward_func|classifier)` is a compiled module"):
            run()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


WITHOUT_LAYERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "RISE": lambda f, x: RISE(f).attribute(x, target=0, n_masks=20, generator=seeded()),
    "FIDO": lambda f, x: FIDO(f).attribute(x, target=0, n_steps=3, generator=seeded()),
    "SESS": lambda f, x: SESSWrapper(Saliency(f), window=8, scales=(12, 16)).attribute(x, target=0),
    "AugmentedSR": lambda f, x: AugmentedSR(
        Saliency(f), n_augmentations=3, generator=seeded()
    ).attribute(x, target=0),
    "UpsampleWrapper": lambda f, x: UpsampleWrapper(IntegratedGradients(f)).attribute(x, target=0),
    "Occlusion": lambda f, x: UpsampleWrapper(Occlusion(f)).attribute(
        x, target=0, sliding_window_shapes=(3, 6, 6), strides=(3, 6, 6)
    ),
    "insertion": lambda f, x: insertion(f, x, x, 0).auc,
    "deletion": lambda f, x: deletion(f, x, x, 0).auc,
    "road": lambda f, x: road(f, x, x, 0).score,
    "average_drop": lambda f, x: average_drop(f, x, x, 0),
    "increase_in_confidence": lambda f, x: increase_in_confidence(f, x, x, 0),
}


@pytest.mark.parametrize("name", WITHOUT_LAYERS)
def test_methods_without_layers_run_on_compiled_models(name: str) -> None:
    run, x = WITHOUT_LAYERS[name], images()
    expected = run(Net(), x)
    compiled = compile_in_new_module(Net())
    for model in (compiled, compile_in_place(Net()), lambda x: compiled(x)):
        for _ in range(2):
            torch.testing.assert_close(run(model, x), expected)


def test_ablation_cam_after_a_call_without_gradients_is_not_zero_in_silence() -> None:
    net = compile_in_place(Net())
    warm_up(net)
    with pytest.raises(ValueError, match="`forward_func` is a compiled module"):
        LayerAblationCam(net, "features")
