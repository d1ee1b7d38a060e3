"""Everything gives the same under other defaults of torch: a device without the data, a dtype."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from captum.attr import LayerGradCam
from torch.utils._pytree import tree_leaves

from captum_ext.attr import LayerSmoothGradCamPlusPlus
from captum_ext.fcam import fit_fcam
from captum_ext.perception import LayerEncoder, fit_perception
from tests.calls import CALLS, Subjects, are_equal, augmented, cam, explain, fido, rise, run
from tests.networks import three_stage_net


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        context = torch._GLOBAL_DEVICE_CONTEXT
        if getattr(context, "device_context", context) is None:
            del context.device_context  # torch 2.6 fails when it reads this None


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def another_device_and_dtype() -> Iterator[None]:
    with torch.device("meta"), default_dtype(torch.float64):
        yield


# "meta" stands for a GPU: it is another device than the data's.
DEFAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "device and dtype": another_device_and_dtype,
    "with torch.device": lambda: torch.device("meta"),
    "set_default_device": lambda: default_device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}
subjects = cache(Subjects)


@cache
def expected(name: str) -> list[Any]:
    return run(name, subjects())


def skip_optimizers_of_old_torch(name: str) -> None:
    """Adam of torch 2.6 counts its steps on the default device, and "meta" does not count."""
    if torch.__version__ < "2.7" and name.startswith(("FIDO", "maximize")):
        pytest.skip("the optimizers of this torch need a default device that computes")


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "defaults",
    [pytest.param(d, marks=pytest.mark.slow if i else ()) for i, d in enumerate(DEFAULTS)],
)
def test_results_do_not_depend_on_torchs_defaults(name: str, defaults: str) -> None:
    skip_optimizers_of_old_torch(name)
    usual = expected(name)
    with DEFAULTS[defaults]():
        result = run(name, subjects())
    assert result
    assert are_equal(result, usual)


RANDOM: dict[str, Callable[[Subjects], Any]] = {
    "RISE": lambda s: rise(s, generator=None),
    "FIDO": lambda s: fido(s, generator=None, baselines="noise"),
    "AugmentedSR": lambda s: explain(s, augmented(cam(s), generator=None)),
    "Smooth Grad-CAM++": lambda s: explain(s, LayerSmoothGradCamPlusPlus(s.net, "relu2")),
}


@pytest.mark.parametrize("name", RANDOM)
def test_draws_without_a_generator_do_not_depend_on_torchs_defaults(name: str) -> None:
    skip_optimizers_of_old_torch(name)
    s = subjects()

    def draw() -> list[Any]:
        torch.default_generator.manual_seed(0)
        return tree_leaves(RANDOM[name](s))

    usual = draw()
    with another_device_and_dtype():
        assert are_equal(draw(), usual)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["fit_fcam", "fit_perception"])
def test_trainings_run_where_the_classifier_is(name: str) -> None:
    pictures = [(picture.image, 1) for picture in subjects().pictures]
    small: dict[str, Any] = {"size": 32, "batch_size": 2, "n_epochs": 1, "show_progress": False}
    model = three_stage_net().eval()

    def train() -> list[Any]:
        if name == "fit_fcam":
            guide = LayerGradCam(model, model[1])
            fcam = fit_fcam(model, pictures, guide, widths=(4, 4, 4), **small)
            return list(fcam.decoder.parameters())
        encoder, options = LayerEncoder(model, "1"), {"widths": (4, 4), "convolutions": (1, 1)}
        images = [image for image, _ in pictures]
        return list(fit_perception(encoder, images, **options, **small).parameters())

    expected = train()
    with torch.device("meta"):
        weights = train()
    assert all(map(torch.equal, weights, expected))
