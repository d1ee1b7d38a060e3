"""RISE and FIDO under drawn networks, inputs, targets and options; and their memory."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_ext.attr import FIDO, RISE
from captum_ext.infill import channel_means, local_mean
from tests.fuzz.calls import Call, check_call
from tests.fuzz.properties import RefusedError, assert_close, attempt, fuzz, tensors_of
from tests.fuzz.strategies import COUNTS, HEADS, Case, cases, example_rows, options_of

Option = dict[str, Any]


def sides(case: Case) -> st.SearchStrategy[Any]:
    """One number or one for each dimension, perhaps larger than the inputs."""
    n = st.integers(1, 9)
    return st.one_of(n, st.tuples(*(n for _ in case.spec.size)))


RISE_OPTIONS: Option = {
    "n_masks": lambda case: st.integers(1, 20),
    "p": lambda case: st.sampled_from([0.5, 0.1, 0.99]),
    "grid": sides,
    "estimator": lambda case: st.sampled_from(["standard", "self-normalized"]),
    "tolerance": lambda case: st.sampled_from([None, 0.1, 100.0]),
}
FIDO_OPTIONS: Option = {
    "baselines": lambda case: st.sampled_from(
        [None, 0.5, "blur", "mean", "zeros", "local", "noise", channel_means, local_mean]
    ),
    "objective": lambda case: st.sampled_from(["joint", "ssr", "sdr"]),
    "n_steps": lambda case: st.integers(1, 3),
    "n_masks": lambda case: st.integers(1, 3),
    "dropout": lambda case: st.sampled_from(["scd", "cd"]),
    "temperature": lambda case: st.sampled_from([0.1, 1.0, 10.0]),
    "l1": lambda case: st.sampled_from([0.0, 5e-4, 1.0]),
    "tv": lambda case: st.sampled_from([0.0, 1e-2]),
    "tv_norm": lambda case: st.sampled_from(["l1", "l2"]),
    "lr": lambda case: st.sampled_from([0.1, 10.0]),
    "eps": lambda case: st.sampled_from([0.1, 1e-8]),
    "warmup": lambda case: st.integers(0, 2),
    "mask_size": lambda case: st.one_of(st.none(), sides(case)),
}


@st.composite
def rise_calls(draw: Any) -> Call:
    case = draw(cases())
    options = {"grid": 1} | draw(options_of(RISE.attribute, case, RISE_OPTIONS))
    options = {"n_masks": 20} | options
    if case.second is None and not isinstance(options.get("baselines"), Tensor):
        names = st.sampled_from([options.get("baselines"), "blur", "mean", "zeros"])
        options["baselines"] = draw(names)
    init = draw(options_of(RISE, case))
    return Call(lambda net, layer, **o: RISE(net, **o), case, init, options, "attribute")


@st.composite
def fido_calls(draw: Any) -> Call:
    outputs = draw(st.sampled_from(["logits", "logits", "probabilities"]))
    heads = HEADS if outputs == "logits" else ("linear", "flat", "map")
    case = draw(cases(dims=2, heads=heads, second=(None, "extra")))
    options = {"n_steps": 2, "n_masks": 2} | draw(options_of(FIDO.attribute, case, FIDO_OPTIONS))

    def build(net: nn.Module, layer: str, outputs: str) -> FIDO:
        return FIDO(net if outputs == "logits" else lambda *x: net(*x).softmax(1), outputs)

    return Call(build, case, {"outputs": outputs}, options, "attribute")


def assert_shapes(result: Any, call: Call) -> None:
    inputs = call.case.inputs()
    assert [t.shape for t in tensors_of(result)] == [x.shape for x in inputs]
    maps = tensors_of(result)[0]
    assert torch.equal(maps, maps[:, :1].expand_as(maps)), "equal in all channels"


@fuzz
@given(call=rise_calls(), data=st.data())
def test_rise_is_right_or_says_why_not(call: Call, data: Any) -> None:
    rows = data.draw(example_rows(call.case))
    # Whether an example has converged depends on its last bits.
    result, _ = check_call(call, rows, is_stable=call.arguments.get("tolerance") is None)
    if result is None:
        return
    assert_shapes(result, call)
    if call.init.get("score", "softmax") in ("softmax", "sigmoid"):
        assert tensors_of(result)[0].min() >= 0


@fuzz
@given(call=rise_calls(), size=COUNTS)
def test_the_masks_of_rise_do_not_depend_on_the_size_of_chunks(call: Call, size: int) -> None:
    try:
        expected = attempt(call.run)
    except RefusedError:
        return
    call.arguments["perturbations_per_eval"] = size
    if call.case.values not in ("huge", "mixed"):
        assert_close(attempt(call.run), expected, call.case.spec.dtype)


@fuzz
@given(call=fido_calls(), data=st.data())
def test_fido_is_right_or_says_why_not(call: Call, data: Any) -> None:
    rows = data.draw(example_rows(call.case))
    result, _ = check_call(call, rows, is_stable=False)
    if result is None:
        return
    assert_shapes(result, call)
    maps = tensors_of(result)[0]
    assert bool((maps >= 0).all() & (maps <= 1).all())


@pytest.mark.parametrize("make", [rise_calls, fido_calls])
@fuzz
@given(data=st.data())
def test_no_examples_are_one_clear_error(make: Any, data: Any) -> None:
    call = data.draw(make())
    with pytest.raises(RefusedError):
        attempt(lambda: call.run([]))
