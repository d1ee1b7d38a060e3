"""F-CAM as an attribution: its equation, its independence of the target, and its files."""

import copy
import threading
import warnings
from contextlib import nullcontext

import pytest
import torch
from captum.attr import NoiseTunnel
from captum.metrics import infidelity
from captum.testing.attr.helpers import test_config
from captum.testing.helpers.basic_models import BasicModel_ConvNet
from torch import Tensor, nn

from captum_ext.attr import FCAM, SESSWrapper, UpsampleWrapper
from captum_ext.fcam import FCAMDecoder
from tests.captures import layer_activations
from tests.networks import two_stage_net


def fcam(model=None):
    model = two_stage_net() if model is None else model
    torch.manual_seed(1)
    decoder = FCAMDecoder.reading(model, torch.rand(1, 3, 32, 32), widths=(8, 4))
    for _ in range(3):
        features = [torch.rand(8, 6, 16, 16), torch.rand(8, 8, 8, 8)]
        decoder(features, (32, 32))
    decoder.head.weight.data.mul_(20)  # else all is about 1/2
    return FCAM(model, decoder.eval())


def images(n=3, size=(32, 32), seed=0):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


# --- the map -------------------------------------------------------------------------------------


def test_the_map_is_the_foreground_of_the_decoders_softmax():
    method, x = fcam(), images()
    features = [
        result[0] for result in layer_activations(method.forward_func, method.layers, (x,))[0]
    ]
    assert [tuple(f.shape[1:]) for f in features] == [(6, 16, 16), (8, 8, 8)]
    logits = method.decoder(features, (32, 32))
    by_hand = logits[:, 1:].exp() / logits.exp().sum(1, keepdim=True)
    torch.testing.assert_close(method.foreground(x), by_hand)
    maps = method.attribute(x)
    assert maps.shape == x.shape
    assert all(torch.equal(maps[:, c : c + 1], method.foreground(x)) for c in range(3))
    assert maps.std() > 0.05


@pytest.mark.parametrize("size", [(33, 47), (97, 64), (9, 8)])
def test_maps_have_the_inputs_size(size):
    x = images(2, size)
    assert fcam().attribute(x).shape == x.shape


@pytest.mark.parametrize(
    "target", [0, 3, [0, 1, 2], torch.tensor([3, 2, 1]), (1,), [(0,), (1,), (2,)], None]
)
def test_a_target_changes_nothing(target):
    method, x = fcam(), images()
    assert torch.equal(method.attribute(x, target=target), method.attribute(x, target=1))


@pytest.mark.parametrize("target", [[0, 1], torch.zeros(2).long()])
def test_targets_are_checked(target):
    with pytest.raises(AssertionError):
        fcam().attribute(images(), target=target)


def test_a_batch_equals_its_images():
    method, x = fcam(), images()
    maps = method.attribute(x)
    for i in range(3):
        torch.testing.assert_close(maps[i : i + 1], method.attribute(x[i : i + 1]))


def test_tuples_and_dtypes_of_inputs_are_kept():
    method, x = fcam(), images()
    (result,) = method.attribute((x,))
    assert torch.equal(result, method.attribute(x))
    double = fcam()
    double.forward_func.double()
    assert double.attribute(x.double()).dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16):
        half, decoded = fcam(), fcam()
        decoded.decoder.to(dtype)
        for method in (half, decoded):
            method.forward_func.to(dtype)
            maps = method.attribute(x.to(dtype))
            assert maps.dtype == dtype
            assert (maps.float() - result).abs().max() < 0.1
            assert method.foreground(x.to(dtype)).dtype == torch.float32


def test_captums_wrappers_and_metrics_accept_it():
    """NoiseTunnel, our wrappers and Captum's metrics are tried, and inference mode."""
    method, x = fcam(), images()
    assert NoiseTunnel(method).attribute(x, nt_samples=2, target=1).shape == x.shape
    assert SESSWrapper(method, n_scales=2, window=24).attribute(x, target=1).shape == x.shape
    assert torch.equal(UpsampleWrapper(method).attribute(x), method.attribute(x))
    maps = method.attribute(x)

    def noise(inputs):
        return 0.1 * torch.ones_like(inputs), inputs - 0.1

    assert infidelity(method.forward_func, noise, x, maps, target=1).shape == (3,)
    with torch.inference_mode():
        torch.testing.assert_close(method.attribute(x), maps)


def of_a_conv_net(entry):
    return (
        isinstance(entry["model"], BasicModel_ConvNet)
        and isinstance(entry["attribute_args"]["inputs"], Tensor)
        and "additional_forward_args" not in entry["attribute_args"]
    )


ENTRIES = [entry for entry in test_config.config if of_a_conv_net(entry)]


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry["name"] for entry in ENTRIES])
def test_captums_generic_configuration(entry):
    """Entries whose model has maps: a batch equals its examples, and no hook is left."""
    model, x = entry["model"].eval(), entry["attribute_args"]["inputs"]
    target = entry["attribute_args"].get("target")
    decoder = FCAMDecoder.reading(model, x, widths=(4,)).eval()
    assert decoder.layers == ["relu1", "pool1", "relu2"]
    decoder.head.weight.data.mul_(20)
    method = FCAM(model, decoder)
    maps = method.attribute(x, target=target)
    alone = torch.cat([method.attribute(x[i : i + 1], target=0) for i in range(len(x))])
    torch.testing.assert_close(maps, alone, rtol=1e-5, atol=1e-4)
    assert maps.std() > 1e-2
    still = NoiseTunnel(method).attribute(x, target=target, stdevs=0.0, nt_samples=2)
    torch.testing.assert_close(still, maps, rtol=1e-5, atol=1e-4)
    with pytest.raises(AssertionError):
        method.attribute(x, target=(9, 9, 9, 9, 9))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- no trace ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, "model", "decoder", "target", "channels"])
def test_it_leaves_no_trace(error, trace_free):
    """Errors are raised in the middle of the model, in the decoder, and for invalid inputs."""
    method, x = fcam(), images().requires_grad_()
    x.grad = torch.rand_like(x)
    for i, p in enumerate([*method.forward_func.parameters(), *method.decoder.parameters()]):
        p.requires_grad_(i % 2 == 0)
        p.grad = torch.full_like(p, i)

    def stop(module, args):
        raise ZeroDivisionError

    # A hook between the two layers that are read, and one after the last block.
    for part, module in (("model", method.forward_func[1][1]), ("decoder", method.decoder.head)):
        if part == error:
            module.register_forward_pre_hook(stop)
    inputs = x[:, :2] if error == "channels" else x
    expected = {"target": AssertionError, "channels": ValueError}.get(error, ZeroDivisionError)
    raises = pytest.raises(expected) if error else nullcontext()
    with trace_free(method.forward_func, x), trace_free(method.decoder), raises:
        result = method.attribute(inputs, target=[0, 1] if error == "target" else 1)
        assert not result.requires_grad


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("frozen", [False, True])
def test_grad_modes_and_frozen_models_change_nothing(mode, frozen, trace_free):
    method, x = fcam(), images()
    expected = method.attribute(x)
    method.forward_func.requires_grad_(not frozen)
    method.decoder.requires_grad_(not frozen)
    with mode(), trace_free(method.forward_func, x), trace_free(method.decoder):
        assert torch.equal(method.attribute(x), expected)


def test_eight_threads_share_a_model(trace_free):
    """All threads are in the middle of the model at once, with images of several sizes."""
    method, meeting = fcam(), threading.Barrier(8)
    batches = [images(2, (24 + 2 * k, 40 - k), seed=k) for k in range(8)]
    expected = [method.attribute(x) for x in batches]
    result = [None] * 8

    def wait(module, args):
        meeting.wait(60)

    method.forward_func[1].register_forward_pre_hook(wait)

    def run(k):
        for _ in range(5):
            result[k] = method.attribute(batches[k])

    threads = [threading.Thread(target=run, args=(k,)) for k in range(8)]
    with trace_free(method.forward_func), trace_free(method.decoder):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for maps, same in zip(result, expected, strict=True):
        assert torch.equal(maps, same)


@pytest.mark.parametrize("part", ["forward_func", "decoder"])
def test_train_mode_gives_a_warning_and_buffers_are_restored(part):
    method = fcam()
    module = getattr(method, part).train()
    before = state(module)
    with pytest.warns(UserWarning, match="train mode"):
        method.attribute(images())
    assert module.training
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


# --- files ---------------------------------------------------------------------------------------


def test_a_saved_decoder_is_loaded(tmp_path):
    method, x = fcam(), images()
    method.save(tmp_path / "decoder.pt")
    saved = torch.load(tmp_path / "decoder.pt", weights_only=True)
    assert saved["layers"] == ["0", "1"]
    again = FCAM.load(tmp_path / "decoder.pt", copy.deepcopy(method.forward_func))
    assert torch.equal(again.attribute(x), method.attribute(x))
    assert not again.decoder.training
    assert (tmp_path / "decoder.pt").stat().st_size < 60_000  # not the classifier


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m[4].weight.data.mul_(1 + 1e-6), "4.weight"),
        (lambda m: m[0][1].running_mean.add_(1), "0.1.running_mean"),
        (lambda m: m.append(nn.Linear(4, 2)), "5.bias"),
        (lambda m: m.__delitem__(4), "4.bias"),
    ],
)
def test_another_classifier_is_refused(change, named, tmp_path):
    method = fcam()
    method.save(tmp_path / "decoder.pt")
    with torch.no_grad():
        change(method.forward_func)
    with pytest.raises(ValueError, match=rf"decoder.pt.*{named}"):
        FCAM.load(tmp_path / "decoder.pt", method.forward_func)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    method = fcam()
    method.save(path)
    content_of_file = path.read_bytes()
    torch.save({"classifier": {}}, path)
    tensors = path.read_bytes()
    torch.save(method.decoder, path)  # an object, not plain values
    for content in (
        b"widths: 8\n",
        b"",
        bytes(9),
        content_of_file[:-100],
        tensors,
        path.read_bytes(),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"`path` .*a\.pt has no decoder"):
            FCAM.load(path, method.forward_func)
    with pytest.raises(FileNotFoundError):
        FCAM.load(tmp_path / "b.pt", method.forward_func)


def test_a_decoder_of_a_function_is_not_saved(tmp_path):
    model, method = two_stage_net(), fcam()
    of_a_function = FCAM(lambda x: model(x), method.decoder, [model[0], model[1]])
    assert of_a_function.attribute(images()).shape == (3, 3, 32, 32)
    with pytest.raises(ValueError, match=r"`forward_func` must be a torch\.nn\.Module"):
        of_a_function.save(tmp_path / "decoder.pt")
    assert not (tmp_path / "decoder.pt").exists()


def test_another_dtype_is_distinguished_from_other_weights(tmp_path):
    method, path = fcam(), tmp_path / "decoder.pt"
    method.save(path)
    model = copy.deepcopy(method.forward_func)
    with pytest.raises(ValueError, match=r"torch\.float16.*torch\.float32.*convert"):
        FCAM.load(path, model.half())
    again = FCAM.load(path, method.forward_func)
    again.forward_func.half()
    assert again.attribute(images().half()).dtype == torch.float16
    model[0][1].num_batches_tracked.add_(1)  # an integer, whatever the dtype
    with pytest.raises(ValueError, match="other values"):
        FCAM.load(path, model)
    model[0][1].num_batches_tracked.sub_(1)
    model.append(nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"not in that.*other values"):
        FCAM.load(path, model)


def test_files_without_dtypes_are_loaded(tmp_path):
    method, path = fcam(), tmp_path / "decoder.pt"
    method.save(path)
    saved = torch.load(path, weights_only=True)
    del saved["dtypes"]
    torch.save(saved, path)
    assert torch.equal(
        FCAM.load(path, method.forward_func).attribute(images()), method.attribute(images())
    )
    with pytest.raises(ValueError, match="other values"):
        FCAM.load(path, method.forward_func.half())


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        (torch.zeros(1, 3, 8, 8).long(), "inputs"),
        (torch.full((1, 3, 8, 8), float("nan")), "inputs"),
        ((torch.zeros(1, 3, 8, 8),) * 2, "inputs"),
        (torch.zeros(3, 8, 8), "inputs"),
    ],
)
def test_invalid_inputs_are_refused(inputs, named):
    with pytest.raises(ValueError, match=named):
        fcam().attribute(inputs)


def test_invalid_decoders_and_layers_are_refused():
    model = two_stage_net()
    with pytest.raises(TypeError, match="decoder"):
        FCAM(model, nn.Conv2d(3, 2, 1))
    nameless = FCAMDecoder([6, 8], [4, 4]).eval()
    with pytest.raises(ValueError, match="layers"):
        FCAM(model, nameless)
    with pytest.raises(ValueError, match="layers"):
        FCAM(model, nameless, ["0"])
    with pytest.raises(ValueError, match="nowhere"):
        FCAM(model, nameless, ["0", "nowhere"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = FCAM(model, nameless, ["0", model[1]]).attribute(images())
    assert result.shape == (3, 3, 32, 32)
    with pytest.raises(ValueError, match="features"):
        FCAM(model, nameless, ["1", "0"]).attribute(images())
