"""Our layer methods survive every situation; how many the peers do, is printed.

`python -m tests.parity.survival` prints the table of all.
"""

import pytest

from tests.parity.survival import SITUATIONS, failures, our_methods, peers, survived
from tests.parity.survival_subjects import Method

LIBRARIES = {"captum": "captum", "torchcam": "torchcam", "grad-cam": "pytorch_grad_cam"}


def test_situations_are_many_and_listed_once() -> None:
    assert len(SITUATIONS) == len(set(SITUATIONS)) >= 24


@pytest.mark.parametrize("method", our_methods(), ids=str)
def test_our_methods_survive_every_situation(method: Method) -> None:
    assert failures(method) == {}


@pytest.mark.slow
@pytest.mark.parametrize("method", peers(), ids=str)
def test_peers_survive_some(method: Method) -> None:
    """Prints (with `-rP`) how many. Asserts only that the peer was called as it should be."""
    pytest.importorskip(LIBRARIES[method.library])
    errors = failures(method)
    print(f"{method}: {survived(errors)}; not {', '.join(errors) or 'one failed'}")
    assert "used_twice" not in errors
    assert "list_of_targets" not in errors
