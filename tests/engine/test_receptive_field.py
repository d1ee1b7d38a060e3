"""Receptive fields equal published ones, and the regions in which gradients are not zero."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_ext._engine.receptive_field import ReceptiveField, receptive_field, unit_offset
from captum_ext._engine.state import preserve_state
from captum_ext.attr import AugmentedSR, LayerHiResCam, channels_last_to_first
from captum_ext.features import maximally_activating_patches
from tests.networks import (
    VIT_LAYER,
    BranchedNet,
    FunctionBetweenConvs,
    Lambda,
    small_net,
    small_vit,
    torchvision_net,
)


@pytest.mark.parametrize(
    ("name", "layer", "size", "stride", "start"),
    [
        # Sizes and strides are those of Araujo et al. 2019.
        ("alexnet", "features.12", 195, 32, 31),
        ("vgg16", "features.30", 212, 32, (212 - 1) / 2 - 90),
        ("vgg16", "features.29", 196, 16, (196 - 1) / 2 - 90),
        ("vgg19", "features.35", 252, 16, 7.5),
        ("resnet18", "layer4", 435, 32, 0),
        ("resnet50", "layer1", 35, 4, 0),
        ("resnet50", "layer2", 91, 8, 0),
        ("resnet50", "layer3", 267, 16, 0),
        ("resnet50", "layer4", 427, 32, 0),
        ("densenet121", "features", 2071, 32, 14),
        ("inception_v3", "Mixed_7c", 1311, 32, 37),
        ("mobilenet_v2", "features", 491, 32, 0),
    ],
)
def test_fields_equal_published_ones(
    name: str, layer: str, size: int, stride: int, start: float
) -> None:
    model = torchvision_net(name, device="meta")
    module = model.get_submodule(layer)
    field = receptive_field(model, module, torch.zeros(1, 3, 224, 224, device="meta"), exact=True)
    assert field.rows == field.columns == (size, stride, start)


@pytest.mark.parametrize(
    ("name", "layer", "offset"),
    [
        ("vgg11", "features.19", 0.0),
        ("resnet18", "layer4", -15.5),
        ("resnet18", "layer3", -7.5),
        ("efficientnet_b0", "features", -15.5),
        ("densenet121", "features", None),
        ("convnext_tiny", "features", 0.0),
        ("mobilenet_v3_small", "features", -15.5),
        ("squeezenet1_1", "features", None),
    ],
)
def test_unit_offsets_equal_known_ones(name: str, layer: str, offset: float | None) -> None:
    model = torchvision_net(name, device="meta")
    module, x = model.get_submodule(layer), torch.zeros(1, 3, 224, 224, device="meta")
    shapes: list[torch.Size] = []
    handle = module.register_forward_hook(lambda m, i, o: shapes.append(o.shape))
    field = receptive_field(model, module, x)
    handle.remove()
    cells = (shapes[0][2], shapes[0][3])
    y, x = unit_offset(field, (224, 224), cells)
    assert y == x
    assert offset in (None, y)


class StopError(Exception):
    """Ends a forward pass at the layer."""


def stop(module: nn.Module, args: object, output: Tensor) -> None:
    raise StopError


def gradient_box(
    net: nn.Module, layer: nn.Module, size: tuple[int, int], unit: tuple[int, int]
) -> list:
    """The first and last row and column in which the gradient of one unit is not 0."""
    x = torch.rand(1, 3, *size, dtype=torch.float64, requires_grad=True)
    outputs: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda m, i, o: outputs.append(o))]
    handles.append(layer.register_forward_hook(stop))
    with pytest.raises(StopError):
        net(x)
    for handle in handles:
        handle.remove()
    (gradient,) = torch.autograd.grad(outputs[0][0, :, unit[0], unit[1]].sum(), x)
    mask = gradient[0].abs().sum(0) > 0
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return [int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])]


def field_box(field: ReceptiveField, unit: tuple[int, int]) -> list:
    """The first and last row and column of the receptive field of one unit."""
    ends = []
    for axis, i in zip(field[:2], unit[::-1] if field.is_transposed else unit, strict=True):
        centre = axis.start + i * axis.stride
        ends += [centre - (axis.size - 1) / 2, centre + (axis.size - 1) / 2]
    return ends


def test_gradients_of_a_branched_net_end_at_the_field() -> None:
    torch.manual_seed(0)
    net = BranchedNet().double().eval()
    for parameter in net.parameters():
        nn.init.uniform_(parameter, 0.1, 1.0)  # no gradient cancels, and all ReLUs are open
    size = (60, 50)
    field = receptive_field(net, net.layer, torch.rand(1, 3, *size, dtype=torch.float64))
    for unit in ((6, 9), (7, 12)):
        assert gradient_box(net, net.layer, size, unit) == field_box(field, unit)


@pytest.mark.parametrize(("kernel", "dilation"), [((2, 4), (1, 1)), ((4, 3), (3, 2))])
def test_fields_of_even_kernels_with_same_padding_equal_those_of_gradients(
    kernel: tuple[int, int], dilation: tuple[int, int]
) -> None:
    """PyTorch pads an odd number by one more at the end."""
    conv = nn.Conv2d(3, 1, kernel, padding="same", dilation=dilation, dtype=torch.float64)
    nn.init.ones_(conv.weight)
    net, size = nn.Sequential(conv), (20, 24)
    field = receptive_field(net, conv, torch.rand(1, 3, *size, dtype=torch.float64))
    assert gradient_box(net, conv, size, (9, 12)) == field_box(field, (9, 12))


MOVES = {
    "transpose": lambda x: x.transpose(2, 3),
    "swapaxes": lambda x: x.swapaxes(-1, axis1=2),
    "mT": lambda x: x.mT,
    "permute": lambda x: x.permute(0, 1, 3, 2),
    "channels last and back": lambda x: x.permute(0, 2, 3, 1).relu().movedim(-1, 1),
    "movedim": lambda x: x.movedim(3, 2),
    "moveaxis": lambda x: torch.moveaxis(x, (2, 3), (3, 2)),
    "flip": lambda x: x.flip(2),
    "flip both": lambda x: torch.flip(x, dims=(2, 3)),
    "rot90": lambda x: torch.rot90(x, 1, (2, 3)),
    "rot270": lambda x: x.rot90(3, [2, 3]),
    "rot180": lambda x: x.rot90(k=2, dims=(3, 2)),
    "reshape there and back": lambda x: x.reshape(1, 2, 1, *x.shape[2:]).view(x.shape),
    "reshape of channels last": lambda x: (
        x.movedim(1, -1).reshape(*x.shape[2:], 2, 1).reshape(1, *x.shape[2:], 2).movedim(3, 1)
    ),
    "pad": lambda x: F.pad(x, (1, 0, -1, 2)),
}


class MovesAndConvs(nn.Module):
    """Convolutions and poolings, different along both axes, with the named moves in between."""

    def __init__(self, moves: tuple[str, ...]) -> None:
        super().__init__()
        windows = (
            nn.Conv2d(3, 2, (2, 3), stride=(1, 2), padding=(1, 0)),
            nn.AvgPool2d((3, 1), stride=(2, 1)),
            nn.Conv2d(2, 2, (1, 2), padding=(0, 1), dilation=(1, 3), bias=False),
        )
        self.moves, self.windows, self.layer = moves, nn.ModuleList(windows), nn.Identity()
        self.double()
        for parameter in self.parameters():
            nn.init.uniform_(parameter, 0.1, 1.0)  # no gradient cancels

    def forward(self, x: Tensor) -> Tensor:
        for i, window in enumerate(self.windows):
            x = window(x)
            x = MOVES[self.moves[i]](x) if i < len(self.moves) else x
        return self.layer(x)


def check_fields_by_gradients(net: nn.Module, size: tuple[int, int]) -> None:
    """Compare the field of each unit with the pixels that it has a gradient for."""
    x = torch.rand(1, 3, *size, dtype=torch.float64)
    field = receptive_field(net, net.layer, x, exact=True)
    n_inside = 0
    for unit in itertools.product(*map(range, net(x).shape[2:])):
        top, bottom, left, right = field_box(field, unit)
        if top >= 0 and left >= 0 and bottom < size[0] and right < size[1]:
            assert gradient_box(net, net.layer, size, unit) == [top, bottom, left, right], unit
            n_inside += 1
    assert n_inside > 1


@pytest.mark.parametrize("name", MOVES)
def test_fields_follow_functions_that_move_or_turn_the_map(name: str) -> None:
    for moves in ((name,), ("pad", name), ("transpose", name), (name, "flip", name)):
        check_fields_by_gradients(MovesAndConvs(moves), (24, 28))


@pytest.mark.slow
def test_fields_follow_all_pairs_of_moves() -> None:
    for moves in itertools.product(MOVES, repeat=2):
        check_fields_by_gradients(MovesAndConvs((*moves, "flip")), (24, 28))


def test_the_box_of_a_transposed_map_is_that_of_the_bright_pixel() -> None:
    image = torch.zeros(3, 4, 4)
    image[:, 0, 3] = 1
    conv = nn.Conv2d(3, 1, 1, bias=False)
    nn.init.ones_(conv.weight)
    net = nn.Sequential(conv, Lambda(lambda x: x.transpose(2, 3)), nn.Flatten(), nn.Linear(16, 2))
    options = {"n": 1, "size": 4, "normalize": ((0.0,) * 3, (1.0,) * 3)}
    patches = maximally_activating_patches(net.eval(), "1", [(image, 0)], **options)
    assert patches.positions[0, 0].tolist() == [3, 0]
    assert patches.boxes[0, 0].tolist() == [3, 0, 4, 1]
    assert patches.unclipped_boxes[0, 0].tolist() == [3, 0, 4, 1]
    assert patches.crops([(image, 0)], 0)[0].tolist() == [[[255]]] * 3


@pytest.mark.parametrize("name", ["transpose", "flip", "rot90"])
def test_a_map_that_cannot_be_laid_over_the_image_has_no_offset(name: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 3), Lambda(MOVES[name]), nn.Flatten(), nn.Linear(72, 2))
    x = torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"transposed or flipped.*reshape_transform"):
        unit_offset(receptive_field(net, net[1], x), (8, 8), (6, 6))
    back = {"transpose": MOVES["transpose"], "flip": MOVES["flip"], "rot90": MOVES["rot270"]}[name]
    cam = LayerHiResCam(net.eval(), "1", reshape_transform=back)
    sr = AugmentedSR(cam, n_augmentations=2, align="rf")
    assert sr.attribute(x, target=0).shape == x.shape


def linear_copy(net: nn.Module) -> nn.Module:
    """Make a net linear: one channel, average poolings, no ReLUs and no norms."""
    for name, part in net.named_children():
        if isinstance(part, nn.Conv2d):
            options = {"dilation": part.dilation, "bias": False, "dtype": torch.float64}
            new = nn.LazyConv2d(1, part.kernel_size, part.stride, part.padding, **options)
        elif isinstance(part, nn.MaxPool2d):
            new = nn.AvgPool2d(part.kernel_size, part.stride, part.padding, part.ceil_mode)
        elif isinstance(part, nn.ReLU | nn.ReLU6 | nn.BatchNorm2d):
            new = nn.Identity()
        else:
            new = linear_copy(part)
        setattr(net, name, new)
    return net


@pytest.mark.parametrize(
    ("name", "layer", "side"),
    [
        ("alexnet", "features", 384),
        ("vgg11", "features.19", 256),
        ("vgg16", "features.29", 384),
        ("vgg19", "features.35", 448),
        ("resnet18", "layer4", 736),
        ("resnet50", "layer3", 448),
        ("resnet50", "layer4", 736),
        ("mobilenet_v2", "features", 800),
        ("mnasnet0_5", "layers", 1248),
        ("squeezenet1_1", "features", 384),
        ("googlenet", "inception4a", 480),
    ],
)
def test_gradients_of_real_nets_end_at_the_field(name: str, layer: str, side: int) -> None:
    net = torchvision_net(name, device="meta")
    image = torch.zeros(1, 3, 224, 224, device="meta")
    field = receptive_field(net, net.get_submodule(layer), image, exact=True)
    copy = linear_copy(net).double()
    module, shapes = copy.get_submodule(layer), []
    hooks = [module.register_forward_hook(lambda m, i, o: shapes.append(o.shape))]
    hooks.append(module.register_forward_hook(stop))
    size = (side, side + 32)
    with pytest.raises(StopError):
        copy(torch.rand(1, 3, *size, dtype=torch.float64))
    for hook in hooks:
        hook.remove()
    for part in copy.modules():
        if type(part) is nn.Conv2d:  # lazy convolutions behind the layer did not run
            nn.init.uniform_(part.weight, 0.5, 1.5)
    unit = (shapes[0][2] // 2, shapes[0][3] // 2)
    assert gradient_box(copy, module, size, unit) == field_box(field, unit)
    assert field.rows.size < side, "the field ends inside of the image"


@pytest.mark.parametrize(
    ("name", "layer", "function"),
    [
        ("mobilenet_v3_small", "features.2", "adaptive_avg_pool2d"),
        ("efficientnet_b0", "features", "adaptive_avg_pool2d"),
        ("regnet_y_400mf", "trunk_output", "adaptive_avg_pool2d"),
    ],
)
def test_squeeze_and_excitation_is_ignored_unless_exact(
    name: str, layer: str, function: str
) -> None:
    net, x = torchvision_net(name), torch.zeros(1, 3, 64, 64)
    module = net.get_submodule(layer)
    assert receptive_field(net, module, x).rows.stride > 1
    with pytest.raises(ValueError, match=f"`{function}` is on the way"):
        receptive_field(net, module, x, exact=True)


def gated_in_place(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :2] = x.mean((2, 3), keepdim=True)[:, :2].expand(-1, -1, *x.shape[2:])
    return x


LOCAL = {
    "channel shuffle": lambda x: x.view(-1, 2, 3, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
    "channels last": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (6,)).permute(0, 3, 1, 2),
    "softmax of channels": lambda x: x.softmax(1),
    "gate of channels": lambda x: x * x.mean(1, keepdim=True).sigmoid(),
    "part of the channels": lambda x: torch.cat([x[:, :3], x[:, 3:].relu()], 1),
    "identity by pooling": lambda x: F.adaptive_avg_pool2d(x, x.shape[2:]),
    "padding": lambda x: F.pad(x, (1, 1))[:, :, :, :],
    "local response norm": lambda x: F.local_response_norm(x, 2),
    "there and back": lambda x: x.transpose(2, 3).transpose(2, 3),
}
MIXING = {
    "group_norm": lambda x: F.group_norm(x, 2),
    "instance_norm": lambda x: F.instance_norm(x),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "softmax": lambda x: x.softmax(2),
    "cumsum": lambda x: x.cumsum(2),
    "pad": lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "linear": lambda x: F.linear(x, torch.ones(x.shape[3], x.shape[3])),
    "getitem": lambda x: x[:, :, torch.arange(x.shape[2]).flip(0)],
    "max": lambda x: x - x.amax((2, 3), keepdim=True),
    "global pooling": lambda x: x - F.avg_pool2d(x, x.shape[2:]),
    "setitem": gated_in_place,
    "roll": lambda x: x + x.roll(1, 2),
    "local_response_norm": lambda x: F.local_response_norm(x.transpose(1, 2), 3).transpose(1, 2),
    "gate": lambda x: x.mul_(x.mean((2, 3), keepdim=True)),
}


@pytest.mark.parametrize("name", [*LOCAL, *MIXING])
def test_exact_fields_accept_only_functions_that_work_unit_by_unit(name: str) -> None:
    function = (LOCAL | MIXING)[name]
    net, x = FunctionBetweenConvs(function), torch.rand(1, 3, 12, 12, requires_grad=True)
    # The gradient shows whether a unit with a 5 x 5 field depends on pixels outside of it.
    (gradient,) = torch.autograd.grad(net(x)[0, :, 6, 6].sum(), x)
    beyond = gradient.abs().sum((0, 1))
    beyond[4:9, 3:10] = 0
    assert bool((beyond == 0).all()) == (name in LOCAL)
    if name in LOCAL:
        assert receptive_field(net, net.second, x, exact=True).rows == (5, 1, 0)
    else:
        with pytest.raises(ValueError, match="`second`"):
            receptive_field(net, net.second, x, exact=True)


def mean_of_all_units(x):  # type: ignore[no-untyped-def]
    return x.mean((2, 3), keepdim=True) * torch.ones_like(x)


HIDDEN = {
    "script": torch.jit.script(mean_of_all_units),
    "module of a script": torch.jit.script(nn.Conv2d(6, 6, 13, padding=6)),
    "item": lambda x: torch.full((6, 12, 12), x.mean().item()),
    "float": lambda x: torch.ones(6, 12, 12) * float(x.max()),
    "bool": lambda x: torch.ones(6, 1, 1) * (2 if x[0, 0, 0, 0] > x.mean() else 1),
    "tolist": lambda x: torch.tensor(x[:, :, :1].tolist()),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()[:, :, :1].copy()),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_exact_fields_detect_scripts_and_numbers_read_from_the_image(name: str) -> None:
    """Another branch has a known field, which alone would be too small."""
    hidden = HIDDEN[name]
    net, x = FunctionBetweenConvs(lambda y: y + hidden(y)), torch.rand(1, 3, 12, 12)
    with pytest.raises(ValueError, match="`second` may see all of the image"):
        receptive_field(net, net.second, x, exact=True)
    with torch.no_grad():
        brighter = x.clone()
        brighter[..., 0, :] = brighter[..., -1, :] = 50
        assert (net(brighter) - net(x))[..., 6, 6].abs().max() > 1e-4


def test_exact_fields_allow_numbers_read_from_shapes() -> None:
    def scaled(x: Tensor) -> Tensor:
        assert x.is_floating_point()
        return x / x.shape[1] ** 0.5 + float(x.dim()) * torch.ones(()).item()

    net = FunctionBetweenConvs(scaled)
    field = receptive_field(net, net.second, torch.rand(1, 3, 12, 12), exact=True)
    assert field.rows == (5, 1, 0)


def test_reshape_transform_is_traced() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, (3, 5)), Lambda(lambda x: x.permute(0, 2, 3, 1)))
    field = receptive_field(
        net, net[1], torch.rand(1, 3, 9, 9), exact=True, reshape_transform=channels_last_to_first
    )
    assert field == ((3, 1, 1), (5, 1, 2), False)


def test_layers_that_cannot_be_traced_are_errors() -> None:
    vit = small_vit()
    with pytest.raises(ValueError, match="are not known"):
        receptive_field(vit, vit.get_submodule(VIT_LAYER), torch.zeros(1, 3, 24, 24))
    net = small_net()
    with pytest.raises(ValueError, match="of `layer` `fc` are not known"):
        receptive_field(net, net.fc, torch.zeros(1, 3, 9, 9))


def test_receptive_field_leaves_no_trace(trace_free) -> None:
    net, x = small_net(), torch.rand(1, 3, 9, 9)
    with trace_free(net, x), preserve_state(net):
        field = receptive_field(net, net.relu2, x)
    assert field.rows == (5, 1, 0)
