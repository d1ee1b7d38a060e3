"""What trainings by Lightning have in common: one `fit`, and checkpoints that resume."""

import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Generator, Tensor
from torch.nn import Module
from torch.utils.data import DataLoader, Sampler

from captum_ext._checks import check_count, check_seed
from captum_ext._data.pictures import PictureDataset
from captum_ext._engine.state import eval_mode, preserve_state, seeded_random
from captum_ext._identity import check_same_run, derive_seed


class DecoderModule(LightningModule):
    """A decoder that learns on a frozen classifier, and resumes from the same settings only.

    The classifier is not a submodule: it is in no checkpoint.

    Attributes:
        classifier: the module.
        decoder: on its features.
        settings: what the run must have in common with the one that was killed.
        order: of the pictures. Lightning says the epoch to it, but with workers, who read ahead,
            too late for the first epoch of a run that goes on.
        unread: the pictures that could not be read.
    """

    def __init__(self, classifier: Module, decoder: Module) -> None:
        super().__init__()
        self._frozen = (classifier,)
        self.decoder = decoder
        self.settings: dict[str, Any] = {}
        self.order: Shuffled | None = None
        self.unread: set[int] = set()

    @property
    def classifier(self) -> Module:
        return self._frozen[0]

    def total(self, parts: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The sum of the parts of a loss, logged.

        Raises:
            FloatingPointError: it is not finite.
        """
        total = torch.stack(list(parts.values())).sum()
        if not bool(torch.isfinite(total)):
            shown = ", ".join(f"{name} {value.item():g}" for name, value in parts.items())
            self.stop(f"batch {batch_idx} ({shown})")
        self.log_dict({f"train_{name}": value for name, value in parts.items()}, prog_bar=True)
        return total

    def stop(self, where: str) -> None:
        raise FloatingPointError(
            f"The loss is not finite in epoch {self.current_epoch}, {where}. A lower `lr` may help."
        )

    def on_fit_start(self) -> None:
        """The classifier is no submodule, so nobody else brings it to the device."""
        self.classifier.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = self.settings
        checkpoint["unread"] = sorted(self.unread)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of a run with other settings, or of a longer one."""
        check_same_run("`checkpoints` has another run's", checkpoint.get("run", {}), self.settings)
        done = checkpoint["epoch"] + 1
        if self.trainer.max_epochs is not None and done > self.trainer.max_epochs >= 0:
            raise ValueError(
                f"`n_epochs` is {self.trainer.max_epochs}, and `checkpoints` has a run of {done}: "
                f"name another folder, or delete it."
            )
        self.unread.update(checkpoint.get("unread", ()))
        if self.order is not None:
            self.order.set_epoch(done)


@dataclass(frozen=True)
class Fit:
    """The arguments that all trainings take, checked: see `fit_fcam`.

    Raises:
        TypeError, ValueError: one of them.
        RuntimeError: inside `torch.inference_mode`.
    """

    n_epochs: int
    batch_size: int
    checkpoints: str | Path | None
    seed: int
    num_workers: int
    show_progress: bool
    trainer: Mapping[str, Any] | None

    def __post_init__(self) -> None:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("Nothing is learned inside torch.inference_mode(): leave it first.")
        for name in ("n_epochs", "batch_size"):
            check_count(name, getattr(self, name))
        check_seed(self.seed)
        if not isinstance(self.trainer, Mapping | None):
            raise TypeError(f"`trainer` must be a mapping of arguments, got {type(self.trainer)}.")

    @contextmanager
    def around(self, classifier: Module) -> Iterator[torch.device]:
        """Modes, gradients and random numbers of a training, on this device; then as before."""
        device = next(classifier.parameters(), torch.empty(0)).device
        with ExitStack() as kept:
            kept.enter_context(eval_mode(classifier))
            kept.enter_context(preserve_state(classifier))
            kept.enter_context(torch.enable_grad())  # Lightning switches them on, and leaves that
            kept.enter_context(seeded_random(device, derive_seed(self.seed)))
            kept.callback(classifier.to, device)
            yield device

    def fit(self, module: DecoderModule, pictures: PictureDataset, validation: Any = None) -> None:
        """Train the decoder, from the last checkpoint on if there is one.

        Args:
            module: with its settings, on the classifier's device.
            pictures: to learn from.
            validation: a loader, or None.

        Raises:
            ValueError: no picture can be read; a checkpoint of another run.
        """
        device = next(module.classifier.parameters(), torch.empty(0)).device
        module.order = Shuffled(len(pictures), self.seed)
        loader = DataLoader(
            pictures,
            self.batch_size,
            sampler=module.order,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )
        with interruptible(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You defined a `validation_step`")
            trainer, resumed = self._trainer(device)
            trainer.fit(module, loader, validation, ckpt_path=resumed)
        if len(module.unread) == len(pictures):
            raise ValueError(f"`data`: none of its {len(pictures)} pictures can be read.")
        pictures.warn_of(module.unread)

    def _trainer(self, device: torch.device) -> tuple[Trainer, Path | None]:
        """With the file that it goes on from."""
        settings = {
            "max_epochs": self.n_epochs,
            "accelerator": "cpu" if device.type == "cpu" else "gpu",
            "devices": 1 if device.index is None else [device.index],
            "logger": False,
            "enable_progress_bar": self.show_progress,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": self.checkpoints is not None,
            "use_distributed_sampler": True,
            **(self.trainer or {}),
        }
        if self.checkpoints is None:
            return Trainer(**settings), None
        saver = ModelCheckpoint(
            self.checkpoints, "last", save_on_train_epoch_end=True, enable_version_counter=False
        )
        given = settings.get("callbacks") or []
        settings["callbacks"] = [*(given if isinstance(given, list) else [given]), saver]
        file = Path(self.checkpoints) / "last.ckpt"
        return Trainer(**settings), file if file.is_file() else None


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
        generator = Generator().manual_seed(derive_seed(self.seed, self.epoch))
        return iter(torch.randperm(self.n, generator=generator).tolist())
