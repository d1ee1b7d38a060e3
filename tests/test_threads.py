"""Eight threads explain one model at once, and several evaluate and train, as one thread does."""

import random
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import (
    Attribution,
    GuidedGradCam,
    LayerActivation,
    LayerConductance,
    LayerDeepLift,
    LayerGradCam,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    NoiseTunnel,
    Saliency,
)
from torch import Tensor, nn

from captum_ext._engine import sharing, state
from captum_ext._engine.sharing import use_model, use_random_states_alone
from captum_ext._engine.state import preserve_state
from captum_ext.attr import FIDO, RISE, LayerCam, UpsampleWrapper
from captum_ext.evaluation import evaluate
from captum_ext.fcam import SeedSampler, fit_fcam
from captum_ext.features import ActivationMaximization
from captum_ext.perception import LayerEncoder, fit_perception
from tests.attr.wrappers.test_matrix import BASES, augmented, sess
from tests.calls import Subjects
from tests.networks import dropout_net, named_net, small_net, three_stage_net, tiny_net

N_THREADS = 8
Job = Callable[[], Tensor]


def in_threads(work: Callable[[int], Any], n: int) -> list[Any]:
    """The results of `work(i)` in n threads that run at once; errors are results, too."""
    results: list[Any] = [None] * n
    barrier = threading.Barrier(n)

    def run(i: int) -> None:
        torch.set_num_threads(1)
        barrier.wait()
        try:
            results[i] = work(i)
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive(), "the threads wait for each other"
    return results


# --- methods and wrappers ------------------------------------------------------------------------

CAPTUM: dict[str, tuple[Callable[[nn.Module], Attribution], dict[str, Any]]] = {
    "LayerActivation": (lambda net: LayerActivation(net, net.relu2), {}),
    "LayerGradientXActivation": (lambda net: LayerGradientXActivation(net, net.relu2), {}),
    "LayerIG": (lambda net: LayerIntegratedGradients(net, net.relu2), {"n_steps": 3}),
    "LayerConductance": (lambda net: LayerConductance(net, net.relu2), {"n_steps": 3}),
    "LayerDeepLift": (lambda net: LayerDeepLift(net, net.conv2), {}),
    "GuidedGradCam": (lambda net: GuidedGradCam(net, net.relu2), {}),
    "Noise(LayerGradCam)": (
        lambda net: NoiseTunnel(LayerGradCam(net, net.relu2)),
        {"nt_samples": 2, "stdevs": 0.0},
    ),
}
WRAPPERS: dict[str, Callable[[Attribution], Attribution]] = {
    "": lambda base: base,
    "Upsample": UpsampleWrapper,
    "SESS": sess,
    "SR": augmented,
    "SESS(Upsample)": lambda base: sess(UpsampleWrapper(base)),
    "SESS(SR)": lambda base: sess(augmented(base)),
}


def all_jobs(net: nn.Module, x: Tensor) -> dict[str, Job]:
    """Every method in every wrapper; Captum's methods of layers alone are not thread-safe."""
    bases = {name: (base.build, base.arguments(x)) for name, base in BASES.items()}
    for name in ("Lime", "KernelShap", "GradientShap"):
        del bases[name]  # they draw from the global random states
    bases["RISE"] = (RISE, {"n_masks": 20, "grid": 4})
    bases |= CAPTUM
    jobs: dict[str, Job] = {}
    for name, (build, arguments) in bases.items():
        for wrapper, wrap in WRAPPERS.items():
            is_ours = type(build(net)).__module__.startswith("captum_ext")
            if (not wrapper and not is_ours) or (name == "LayerActivation" and "SESS" in wrapper):
                continue

            def job(build: Any = build, wrap: Any = wrap, arguments: Any = arguments) -> Tensor:
                own = dict(arguments)
                if build in (RISE, FIDO):
                    own["generator"] = torch.Generator().manual_seed(0)
                if build is not CAPTUM["LayerActivation"][0]:
                    own["target"] = [1, 2]
                result = wrap(build(net)).attribute(x, **own)
                assert isinstance(result, Tensor)
                return result.detach()

            jobs[f"{wrapper}({name})"] = job
    return jobs


def count_differences(jobs: dict[str, Job], shares: Sequence[Sequence[str]]) -> dict[str, int]:
    """How many results of each job differ from its result in one thread; errors count, too."""
    expected = {name: jobs[name]() for name in jobs}
    differences = dict.fromkeys(jobs, 0)

    def work(i: int) -> None:
        for name in shares[i]:
            try:
                is_equal = torch.equal(jobs[name](), expected[name])
            except Exception:
                is_equal = False
            differences[name] += not is_equal

    assert in_threads(work, len(shares)) == [None] * len(shares)
    return {name: n for name, n in differences.items() if n}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("share", [0.08, pytest.param(1.0, marks=pytest.mark.slow)])
def test_eight_threads_with_every_method_in_every_wrapper(share: float, trace_free: Any) -> None:
    net = named_net()
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    jobs = all_jobs(net, x)
    # Captum's LayerDeepLift itself leaves `input` and `output` at modules in front of its layer.
    names = sorted(name for name in jobs if "LayerDeepLift" not in name)
    shares = []
    for i in range(N_THREADS):
        order = random.Random(i).sample(names, len(names))
        shares.append(order[: round(share * len(order))])
    needed = {name: jobs[name] for names in shares for name in names}
    with trace_free(net, x, keeps_rng=False):
        assert count_differences(needed, shares) == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("wrapper", "name"),
    [
        ("SESS", "LayerIG"),
        ("SR", "DeepLift"),
        ("Upsample", "LayerGradCam"),
        ("Upsample", "Saliency"),
    ],
)
def test_eight_threads_with_one_method_of_captum(wrapper: str, name: str) -> None:
    """On the same images: Captum's Saliency switches `requires_grad` of the caller's on and off."""
    net = named_net()
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    job = f"{wrapper}({name})"
    assert count_differences({job: all_jobs(net, x)[job]}, [[job] * 4] * N_THREADS) == {}


def test_our_methods_do_not_wait_for_each_other() -> None:
    """Both threads are in the model at the same time, or the barrier breaks."""
    net, x = small_net(), torch.randn(1, 3, 9, 9)
    inside = threading.Barrier(2, timeout=60)

    def wait(*args: Any) -> None:
        inside.wait()

    layer_hook = net.fc.register_forward_pre_hook(wait)
    results = in_threads(lambda i: LayerCam(net, "relu2").attribute(x, target=1), 2)
    layer_hook.remove()
    assert torch.equal(*results)


def test_a_method_of_captum_has_the_model_alone() -> None:
    net, other = small_net(), small_net()
    order: list[str] = []

    def work(i: int) -> None:
        if i == 0:
            with use_model((net,), alone=True):
                order.append("alone")
                time.sleep(0.3)
                order.append("done")
            return
        while not order:
            time.sleep(0.01)
        if i == 1:
            with preserve_state(other):
                order.append("other model")
        else:  # a part of the model, and a function that may run any model
            with preserve_state(net.conv1 if i == 2 else lambda x: x):
                order.append("shared")

    assert in_threads(work, 4) == [None] * 4
    assert order == ["alone", "other model", "done", "shared", "shared"]
    assert sharing._uses == []


def test_threads_that_ask_in_any_order_do_not_wait_for_each_other() -> None:
    nets = [small_net(), small_net()]

    def work(i: int) -> None:
        for step in range(20):
            first, second = nets if (i + step) % 2 else reversed(nets)
            with preserve_state(first), preserve_state(second), use_model((first,), alone=True):
                pass
            with (
                preserve_state(second),
                use_random_states_alone(),
                preserve_state(first),
                use_model((second,), alone=True),
                use_model((second,), alone=True),
            ):
                pass

    assert in_threads(work, N_THREADS) == [None] * N_THREADS
    assert sharing._uses == []


def test_a_new_call_lets_one_go_first_that_waits_for_the_model() -> None:
    net = small_net()
    stop = time.monotonic() + 60
    was_alone = threading.Event()

    def work(i: int) -> bool:
        if i == 0:
            time.sleep(0.1)
            with use_model((net,), alone=True):
                was_alone.set()
        while i and not was_alone.is_set() and time.monotonic() < stop:
            with use_model((net,), alone=False):
                time.sleep(0.03)  # some thread is always in the model
        return was_alone.is_set()

    assert in_threads(work, 4) == [True] * 4


@pytest.mark.parametrize("lock", ["uses", "buffers"])
def test_a_block_may_be_closed_while_its_thread_holds_the_lock(lock: str) -> None:
    """The garbage collector closes blocks that interrupts cut short, at any time."""
    net = dropout_net().train()

    def close() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            block = preserve_state(net)
            block.__enter__()
        with sharing._lock if lock == "uses" else state._buffers_lock:
            del block

    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()
    assert sharing._uses == []


# --- random numbers ------------------------------------------------------------------------------


def global_states() -> tuple[bytes, str]:
    return torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state())


def test_evaluations_in_threads_equal_those_of_one(tmp_path: Path) -> None:
    pictures, net = Subjects().pictures * 3, tiny_net()
    methods = {
        "RISE": (RISE(net), {"n_masks": 20, "grid": 4}),
        "noisy": (NoiseTunnel(Saliency(net)), {"nt_samples": 2, "stdevs": 0.1}),
        "Grad-CAM": LayerGradCam(net, net[0]),
    }
    for i, picture in enumerate(pictures):
        pictures[i] = type(picture)(**{**vars(picture), "target": i % 3, "name": str(i)})

    def rows(folder: Path) -> str:
        evaluate(
            methods, pictures, ["pointing_game", "infidelity", "insertion"], output=folder,
            show_progress=False, batch_size=2,
        )  # fmt: skip
        return (folder / "rows.csv").read_text()

    expected, states = rows(tmp_path / "alone"), global_states()
    assert in_threads(lambda i: rows(tmp_path / str(i)), 4) == [expected] * 4
    assert global_states() == states


def test_ascents_with_random_transforms_in_threads_equal_those_of_one() -> None:
    net = tiny_net()

    def ascend(i: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        result = ActivationMaximization(net).maximize(
            (3, 16, 16), 1, n_steps=8, generator=generator, noise=0.1, jitter=0,
            transform=lambda images: images + 0.1 * torch.randn_like(images),
        )  # fmt: skip
        return result.images

    expected, states = ascend(0), global_states()
    assert all(torch.equal(images, expected) for images in in_threads(ascend, 4))
    assert global_states() == states


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["fit_fcam", "fit_perception"])
def test_trainings_in_threads_equal_those_of_one(name: str) -> None:
    """On a model in train mode, whose flags and buffers come back."""
    model = three_stage_net() if name == "fit_fcam" else dropout_net().train()
    pictures = [(picture.image, 1) for picture in Subjects().pictures] * 4
    small: dict[str, Any] = {"size": 32, "batch_size": 2, "n_epochs": 1, "show_progress": False}

    def train(i: int) -> list[Tensor]:
        if name == "fit_fcam":
            guide = LayerGradCam(model, model[1])
            seeds = SeedSampler(4, 4)
            fcam = fit_fcam(model, pictures, guide, widths=(4, 4, 4), seeds=seeds, **small)
            return [weight.detach() for weight in fcam.decoder.parameters()]
        encoder = LayerEncoder(model, "1")
        images = [image for image, _ in pictures]
        decoder = fit_perception(encoder, images, widths=(4, 4), convolutions=(1, 1), **small)
        return [weight.detach() for weight in decoder.parameters()]

    buffers = [buffer.clone() for buffer in model.buffers()]
    expected, states = train(0), global_states()
    for weights in in_threads(train, 3):
        assert all(map(torch.equal, weights, expected))
    assert global_states() == states
    assert model.training
    assert all(map(torch.equal, model.buffers(), buffers))
