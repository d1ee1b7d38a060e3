"""What trainings by Lightning have in common: checkpoints that resume, modes, order, interrupts."""

import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Generator
from torch.nn import Module
from torch.utils.data import Sampler

from captum_ext._fingerprint import changes
from captum_ext._pictures import hash_of


class ResumableModule(LightningModule):
    """A module that goes on from a checkpoint of the same settings only.

    Attributes:
        settings: what the run must have in common with the one that was killed.
        order: of the pictures. Lightning says the epoch to it, but with workers, who read ahead,
            too late for the first epoch of a run that goes on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {}
        self.order: Shuffled | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = self.settings

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of a run with other settings, or of a longer one."""
        changed = changes(checkpoint.get("run", {}), self.settings)
        if changed:
            raise ValueError(
                f"`checkpoints` has another run's: {changed}. Name another folder, or delete it."
            )
        done = checkpoint["epoch"] + 1
        if self.trainer.max_epochs is not None and done > self.trainer.max_epochs >= 0:
            raise ValueError(
                f"`n_epochs` is {self.trainer.max_epochs}, and `checkpoints` has a run of {done}: "
                f"name another folder, or delete it."
            )
        if self.order is not None:
            self.order.set_epoch(done)


def run_trainer(
    module: ResumableModule,
    pictures: Any,
    validation: Any,
    *,
    device: torch.device,
    n_epochs: int,
    checkpoints: str | Path | None,
    show_progress: bool,
    trainer: Mapping[str, Any] | None,
) -> None:
    """Train, and go on from the last checkpoint if there is one.

    Args:
        module: with its settings.
        pictures: a loader, in the order of `Shuffled`.
        validation: a loader, or None.
        device: the classifier's.
        n_epochs: in all, with those before.
        checkpoints: a folder, or None.
        show_progress: whether to draw progress bars.
        trainer: arguments of Lightning's `Trainer` that go before these.
    """
    settings = {
        "max_epochs": n_epochs,
        "accelerator": "cpu" if device.type == "cpu" else "gpu",
        "devices": 1 if device.index is None else [device.index],
        "logger": False,
        "enable_progress_bar": show_progress,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": checkpoints is not None,
        "use_distributed_sampler": True,
        **(trainer or {}),
    }
    module.order = pictures.sampler if isinstance(pictures.sampler, Shuffled) else None
    resumed = None
    if checkpoints is not None:
        saver = ModelCheckpoint(
            checkpoints, "last", save_on_train_epoch_end=True, enable_version_counter=False
        )
        given = settings.get("callbacks") or []
        settings["callbacks"] = [*(given if isinstance(given, list) else [given]), saver]
        file = Path(checkpoints) / "last.ckpt"
        resumed = file if file.is_file() else None
    with interruptible(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You defined a `validation_step`")
        Trainer(**settings).fit(module, pictures, validation, ckpt_path=resumed)


@contextmanager
def evaluated(module: Module) -> Iterator[None]:
    """The module in eval mode, and then each part as it was."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt again: Lightning ends the process, and ignores the next one."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from ended
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


class Shuffled(Sampler[int]):
    """A new order in each epoch, that depends on the seed and the epoch alone."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed, self.epoch = n, seed, 0

    def __len__(self) -> int:
        return self.n

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = Generator().manual_seed(hash_of(self.seed, self.epoch))
        return iter(torch.randperm(self.n, generator=generator).tolist())
