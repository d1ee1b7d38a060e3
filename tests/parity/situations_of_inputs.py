"""Situations of inputs, targets and repeated use; as `situations_of_models.py`."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from tests.parity.survival_subjects import Method, TwoInputs, assert_alike, net, pictures

# --- inputs and targets --------------------------------------------------------------------------


def non_square_inputs(method: Method) -> None:
    """Transposed weights and a transposed picture give the transposed map."""
    model = net()
    for conv in (model.stem, model.layer):
        conv.weight.data = conv.weight.data.transpose(2, 3).contiguous()
    maps = method.explain(model, pictures(2, 8, 12).transpose(2, 3).contiguous())
    assert_alike(maps.transpose(-1, -2), method.explain(net(), pictures(2, 8, 12)))


def signals(method: Method) -> None:
    """jacobgil/pytorch-grad-cam#233 and #361."""
    maps = method.explain(net(dims=1), pictures(2, 9))
    assert maps.shape[-1] == 9
    assert maps.max() > maps.min()


def volumes(method: Method) -> None:
    maps = method.explain(net(dims=3), pictures(2, 4, 5, 6))
    assert maps.shape[-3:] == (4, 5, 6)
    assert maps.max() > maps.min()


def list_of_targets(method: Method) -> None:
    maps = method.explain(net(), pictures(), [1, 2])
    alone = [method.explain(net(), pictures(), target)[i] for i, target in enumerate((1, 2))]
    assert_alike(maps, torch.stack(alone))


def batch_equals_its_examples(method: Method) -> None:
    """jacobgil/pytorch-grad-cam#264 and #322."""
    x = pictures(3)
    maps = method.explain(net(), x)
    assert_alike(maps, torch.cat([method.explain(net(), x[i : i + 1]) for i in range(3)]))


def empty_batch(method: Method) -> None:
    """No maps, or an error of arguments: not one from deep inside."""
    try:
        maps = method.explain(net(), pictures(0))
    except (AssertionError, TypeError, ValueError):
        return
    assert len(maps) == 0


def extra_forward_argument(method: Method) -> None:
    """jacobgil/pytorch-grad-cam#501; a scale of 1 for each example changes nothing."""
    maps = method.explain(net(), pictures(), 1, torch.ones(2, 1))
    assert_alike(maps, method.explain(net(), pictures()))


def two_inputs(method: Method) -> None:
    """jacobgil/pytorch-grad-cam#253, frgfm/torch-cam#151."""
    maps = method.explain(net(TwoInputs), (pictures(), torch.zeros(2, 3, 8, 8)))
    assert_alike(maps, method.explain(net(), pictures()))


# --- more than one use ---------------------------------------------------------------------------


def used_twice(method: Method) -> None:
    """The same object explains another batch in between."""
    model = net()
    with method.open(model, model.layer) as explain:
        first = explain(pictures(), 1).clone()
        explain(pictures(3, 12, 12), 2)
        assert_alike(explain(pictures(), 1), first)


def two_objects_at_once(method: Method) -> None:
    """frgfm/torch-cam#195: of one model and one layer."""
    model = net()
    plain = method.explain(net(), pictures()), method.explain(net(), pictures(3), 2)
    with method.open(model, model.layer) as one, method.open(model, model.layer) as other:
        maps = one(pictures(), 1).clone(), other(pictures(3), 2)
    for got, wanted in zip(maps, plain, strict=True):
        assert_alike(got, wanted)


def eight_threads(method: Method) -> None:
    """SeldonIO/alibi#593: one model serves eight threads, each with an object of its own."""
    model, batches = net(), [pictures(i % 3 + 1, 8 + i, 8) for i in range(8)]
    plain = [method.explain(net(), x) for x in batches]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns often
    try:
        with ThreadPoolExecutor(8) as pool:
            maps = list(pool.map(lambda x: method.explain(model, x), batches * 8))
    finally:
        sys.setswitchinterval(interval)
    for got, wanted in zip(maps, plain * 8, strict=True):
        assert_alike(got, wanted)


SITUATIONS: list[Callable[[Method], None]] = [
    non_square_inputs,
    signals,
    volumes,
    list_of_targets,
    batch_equals_its_examples,
    empty_batch,
    extra_forward_argument,
    two_inputs,
    used_twice,
    two_objects_at_once,
    eight_threads,
]
