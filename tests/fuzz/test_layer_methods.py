"""The layer methods under drawn networks, inputs, targets and options."""

import inspect
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from tests.fuzz.calls import Call, check_call
from tests.fuzz.properties import (
    RefusedError,
    assert_close,
    assert_released,
    attempt,
    fuzz,
    tensors_of,
)
from tests.fuzz.strategies import cases, example_rows, options_of
from tests.methods import CLASSES

METHODS = {cls.title: cls for cls in CLASSES.values()}
# Their weights are of the first degree in the gradient, so that the maps scale with the logits.
LINEAR = ("Grad-CAM", "HiResCAM", "XGrad-CAM", "LayerCAM", "Eigen-Grad-CAM")


@st.composite
def calls(draw: Any, name: str, **fixed: Any) -> Call:
    cls, case = METHODS[name], draw(cases(**fixed))
    known = inspect.signature(cls).parameters

    def build(net: nn.Module, layer: str, **options: Any) -> Any:
        return cls(net, layer, **({"head": "head"} if "head" in known else {}), **options)

    init, arguments = draw(options_of(cls, case)), draw(options_of(cls.attribute, case))
    return Call(build, case, init, arguments, "init" if "generator" in known else "")


@pytest.mark.parametrize("name", METHODS)
@fuzz
@given(data=st.data())
def test_a_layer_method_is_right_or_says_why_not(name: str, data: Any) -> None:
    call = data.draw(calls(name))
    rows = data.draw(example_rows(call.case))
    result, seen = check_call(call, rows, cancels=METHODS[name].family == "masking")
    if result is None or call.arguments.get("attribute_to_layer_input"):
        return
    summed = call.arguments.get("attr_dim_summation", True)
    layer = seen[call.case.layer]
    shapes = [(call.case.n, 1 if summed else t.shape[1], *t.shape[2:]) for t in layer]
    assert [tuple(m.shape) for m in tensors_of(result)] == shapes


@pytest.mark.parametrize("name", METHODS)
@fuzz
@given(data=st.data())
def test_no_examples_are_one_clear_error(name: str, data: Any) -> None:
    call = data.draw(calls(name))
    with pytest.raises(RefusedError):
        attempt(lambda: call.run([]))


@pytest.mark.parametrize("name", LINEAR)
@fuzz
@given(data=st.data(), factor=st.sampled_from([0.25, 8.0, 1e-6]))
def test_maps_of_linear_rules_scale_with_the_logits(name: str, data: Any, factor: float) -> None:
    call = data.draw(calls(name, values=("normal", "flat", "negative", "one pixel")))
    call.case.gain = None
    call = replace(call.with_dtype(torch.float64))
    try:
        expected = attempt(call.run)
    except RefusedError:
        assume(False)
    with torch.no_grad():
        call.net.head.weight *= factor
        call.net.head.bias *= factor
    scaled = [t * factor for t in tensors_of(expected)]
    assert_close(call.run(), scaled, torch.float32)


@pytest.mark.parametrize("name", METHODS)
@fuzz
@given(data=st.data())
def test_a_layer_method_keeps_no_input_and_no_model(name: str, data: Any) -> None:
    def make() -> tuple[Any, list[Any]]:
        call = data.draw(calls(name))
        method, arguments = call.method(), call.examples()
        with suppress(RefusedError):
            attempt(lambda: method.attribute(**arguments))
        return method, list(arguments["inputs"])

    assert_released(make)
