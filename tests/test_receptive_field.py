"""Receptive fields against published tables, and against where gradients end."""

import pytest
import torch
import torchvision.models as zoo
from torch import Tensor, nn
from torch.nn import functional as F

from captum_ext._receptive_field import Field, receptive_field, unit_offset
from tests.attr.layer.test_reshape_and_suggest import VIT_LAYER, small_vit
from tests.methods import small_net


@pytest.mark.parametrize(
    ("name", "layer", "size", "stride", "start"),
    [
        # Sizes and strides are those of Araujo et al. 2019.
        ("alexnet", "features.12", 195, 32, 31),
        ("vgg16", "features.30", 212, 32, (212 - 1) / 2 - 90),
        ("vgg16", "features.29", 196, 16, (196 - 1) / 2 - 90),
        ("resnet18", "layer4", 435, 32, 0),
        ("resnet50", "layer4", 427, 32, 0),
        ("resnet50", "layer3", 267, 16, 0),
        ("mobilenet_v2", "features", 491, 32, 0),
    ],
)
def test_published_fields(name: str, layer: str, size: int, stride: int, start: float) -> None:
    model = getattr(zoo, name)(weights=None).eval()
    module = model.get_submodule(layer)
    field = receptive_field(model, module, torch.zeros(1, 3, 224, 224))
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
def test_offsets(name: str, layer: str, offset: float | None) -> None:
    model = getattr(zoo, name)(weights=None).eval()
    module, x = model.get_submodule(layer), torch.zeros(1, 3, 224, 224)
    shapes: list[torch.Size] = []
    handle = module.register_forward_hook(lambda m, i, o: shapes.append(o.shape))
    field = receptive_field(model, module, x)
    handle.remove()
    cells = (shapes[0][2], shapes[0][3])
    found = unit_offset(field, (224, 224), cells)
    assert found[0] == found[1]
    if offset is not None:
        assert found == (offset, offset)


class Branches(nn.Module):
    """Two branches, padding on one side, a dilated convolution, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 4, (5, 3), stride=(2, 1), padding=(2, 0), dilation=(1, 2))
        self.thin = nn.Conv2d(3, 4, 1, stride=(2, 1))
        self.down = nn.Conv2d(8, 4, 2, stride=2)
        self.layer = nn.AvgPool2d(3, 1, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (3, 0, 1, 0))
        x = torch.cat([self.wide(F.pad(x, (2, 2, 0, 0))), self.thin(x)], 1)
        x = self.down(x * torch.sigmoid(x.mean((2, 3), keepdim=True).detach()))
        x = self.layer(x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2))
        return self.head(x.mean((2, 3)))


def reached(net: nn.Module, layer: nn.Module, size: tuple[int, int], unit: tuple[int, int]) -> list:
    """Where the gradient of one unit is not 0: first and last row and column."""
    x = torch.rand(1, 3, *size, dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda m, i, o: kept.append(o))
    net(x)
    handle.remove()
    (gradient,) = torch.autograd.grad(kept[0][0, :, unit[0], unit[1]].sum(), x)
    seen = gradient[0].abs().sum(0) > 0
    rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
    return [int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])]


def expected(field: Field, unit: tuple[int, int]) -> list:
    ends = []
    for axis, i in zip(field, unit, strict=True):
        centre = axis.start + i * axis.stride
        ends += [centre - (axis.size - 1) / 2, centre + (axis.size - 1) / 2]
    return ends


def test_gradients_end_where_fields_do() -> None:
    torch.manual_seed(0)
    net = Branches().double().eval()
    for parameter in net.parameters():
        nn.init.uniform_(parameter, 0.1, 1.0)  # nothing cancels, and no ReLU is shut
    size = (60, 50)
    field = receptive_field(net, net.layer, torch.rand(1, 3, *size, dtype=torch.float64))
    for unit in ((6, 9), (7, 12)):
        assert reached(net, net.layer, size, unit) == expected(field, unit)


def test_what_cannot_be_followed() -> None:
    vit = small_vit()
    with pytest.raises(ValueError, match="is not known"):
        receptive_field(vit, vit.get_submodule(VIT_LAYER), torch.zeros(1, 3, 24, 24))
    net = small_net()
    with pytest.raises(ValueError, match="`fc` are centred is not known"):
        receptive_field(net, net.fc, torch.zeros(1, 3, 9, 9))


def test_it_leaves_no_trace(trace_free) -> None:
    net, x = small_net(), torch.rand(1, 3, 9, 9)
    with trace_free(net, x):
        field = receptive_field(net, net.relu2, x)
    assert field.rows == (5, 1, 0)
