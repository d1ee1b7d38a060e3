import pytest
import torch

from captum_ext.datasets import (
    FineGrainedParts,
    SmallCNN,
    TexturedEllipses,
    TinyCNN,
    train_classifier,
)
from captum_ext.datasets.fine_grained import normalized


@pytest.mark.parametrize(("side", "units"), [(224, 14), (64, 4)])
def test_the_output_depends_on_all_pixels(side: int, units: int) -> None:
    network = SmallCNN(5).eval()
    shapes = []
    handle = network.last.register_forward_hook(lambda *a: shapes.append(tuple(a[2].shape)))
    x = torch.randn(2, 3, side, side, requires_grad=True)
    logits = network(x)
    handle.remove()
    assert logits.shape == (2, 5)
    assert shapes == [(2, 64, units, units)]
    (gradient,) = torch.autograd.grad(logits[0, 3], x)
    assert (gradient[0] != 0).float().mean() > 0.9
    assert not gradient[1].any()


def test_training_learns_is_reproducible_and_keeps_the_random_state() -> None:
    beetles = FineGrainedParts(16, size=(64, 64))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again = (train_classifier(beetles, n_epochs=30, batch_size=8, seed=1) for _ in range(2))
    assert torch.get_rng_state().equal(state)
    assert not first.training
    images, targets, _ = beetles.batch()
    with torch.no_grad():
        logits = first(images)
        assert logits.equal(again(images))
    assert (logits.argmax(1) == targets).float().mean() > 0.7
    other = train_classifier(beetles, n_epochs=1, batch_size=8, seed=2)
    assert not other.head.weight.equal(first.head.weight)


def test_training_on_ellipses_gives_a_tiny_cnn() -> None:
    network = TinyCNN(4).eval()
    assert sum(p.numel() for p in network.parameters()) == 88_852
    scenes = TexturedEllipses(32, size=(32, 32))
    trained = train_classifier(scenes, n_epochs=20, batch_size=8)
    assert isinstance(trained, TinyCNN)
    batch = scenes.batch()
    with torch.no_grad():
        accuracy = (trained(normalized(batch.pixels)).argmax(1) == batch.targets).float().mean()
    assert accuracy > 0.6


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"n_epochs": 0}, "n_epochs"),
        ({"batch_size": 1}, "batch_size"),
        ({"batch_size": 9}, "batch_size"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        train_classifier(FineGrainedParts(8, size=(64, 64)), **options)
