"""The model of a command: the device that it runs on, and inputs on which it is tried."""

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from captum_ext.zoo import LoadedModel


def find_device(name: str | None) -> "torch.device":
    """The device called `name`; None is the first GPU, or the CPU where there is none.

    Raises:
        InputError: a device that is unknown or cannot be used.
    """
    import torch

    from captum_ext._errors import InputError

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            device = torch.device(name)
            torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # torch's messages are pages long
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        mps = ["mps"] if torch.backends.mps.is_available() else []
        raise InputError(
            f"the device {name!r} cannot be used here. Available: {', '.join(['cpu', *gpus, *mps])}"
        ) from error
    return device


def check_devices(count: int, device: "torch.device") -> None:
    """Raise an error where there are fewer devices, or where several are named as one.

    Raises:
        InputError: either.
    """
    import torch

    from captum_ext._errors import InputError

    if device.type == "cpu":
        return
    gpus = torch.cuda.device_count() if device.type == "cuda" else 1
    if count > gpus:
        raise InputError(f"--devices {count} are more than the GPUs here, {gpus}")
    if device.index is not None:
        raise InputError(f"--devices {count} begin at the first GPU: leave out --device {device}")


def random_input(size: int) -> "Tensor":
    """An input (1, 3, size, size) on which models and methods are tried."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, 3, size, size, generator=generator, dtype=torch.float32, device="cpu")


def check_input_size(loaded: "LoadedModel", x: "Tensor") -> None:
    """Raise an error unless the model takes inputs of the size of `x`.

    Raises:
        InputError: the model refuses it, or gives an output that is not finite.
    """
    from captum_ext._errors import InputError
    from captum_ext.zoo import probabilities

    try:
        probabilities(loaded, x)
    except InputError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(
            f"{loaded.name} does not take pictures of {x.shape[2]} x {x.shape[3]} pixels "
            f"({error}): give another --size"
        ) from error
