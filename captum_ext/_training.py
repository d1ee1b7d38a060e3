"""Training of decoders by Lightning: one `fit`, and checkpoints that resume."""

import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Generator, Tensor
from torch.nn import Module
from torch.utils.data import Sampler

from captum_ext._checks import check_count, check_seed, first_line
from captum_ext._data.loading import CpuLoader
from captum_ext._data.pictures import PictureDataset
from captum_ext._engine.modules import default_device, module_device
from captum_ext._engine.state import eval_mode, preserve_state, seeded_random
from captum_ext._errors import ArgumentError, ArgumentTypeError
from captum_ext._identity import check_same_run, derive_seed
from captum_ext._repr import bounded_repr
from captum_ext._tensor_files import misfit, read_tensors, write_tensors

# What Lightning and torch raise for a checkpoint whose content is not what they expect.
_OF_DAMAGE = (
    *(AttributeError, EOFError, IndexError, KeyError, RuntimeError, TypeError, ValueError),
    pickle.UnpicklingError,
)

TERMINATED = 128 + signal.SIGTERM  # the exit code


class _CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoints, whose checksums are compared, and which are written atomically.

    Lightning itself writes them in the folder of temporary files, which may be on another disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None or "://" in str(path):  # another computer's
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_tensors(path, checkpoint)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        problem = f"`checkpoints`: {path} is no checkpoint, delete it"
        checkpoint: dict[str, Any] = read_tensors(
            path, "checkpoints", problem, ("state_dict", "optimizer_states", "epoch", "loops")
        )
        return checkpoint


class DecoderModule(LightningModule):
    """A decoder that learns on a frozen classifier, and resumes only with the same settings.

    The classifier is not a submodule, so no checkpoint contains it.

    Args:
        classifier: the frozen module.
        decoder: the module that learns, on the classifier's features.

    Attributes:
        fingerprint: the settings that a resumed run must share with the run that was killed.
        order: the sampler of the pictures. Lightning sets its epoch. With workers, which read
            ahead, that comes too late for the first epoch of a resumed run, so
            `on_load_checkpoint` sets it, too.
        unread: indices of the pictures that could not be read.
        has_started: whether the training has started or resumed.
    """

    def __init__(self, classifier: Module, decoder: Module) -> None:
        super().__init__()
        self._frozen = (classifier,)
        self.decoder = decoder
        self.fingerprint: dict[str, Any] = {}
        self.order: SeededShuffle | None = None
        self.unread: set[int] = set()
        self.has_started = False

    @property
    def classifier(self) -> Module:
        return self._frozen[0]

    def total_loss(self, parts: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The sum of a loss's parts, which are logged.

        Args:
            parts: the weighted terms by name, each a scalar.
            batch_idx: the number of the batch, for the error.

        Raises:
            FloatingPointError: the sum is not finite.
        """
        total = torch.stack(list(parts.values())).sum()
        if not bool(torch.isfinite(total)):
            terms = ", ".join(f"{name} {value.item():g}" for name, value in parts.items())
            self.raise_not_finite(f"batch {batch_idx} ({terms})")
        self.log_dict({f"train_{name}": value for name, value in parts.items()}, prog_bar=True)
        return total

    def raise_not_finite(self, moment: str) -> None:
        """Raise the FloatingPointError of a training that has diverged."""
        raise FloatingPointError(
            f"The loss is not finite in epoch {self.current_epoch}, {moment}. "
            f"A lower `lr` may help."
        )

    def on_fit_start(self) -> None:
        """Move the classifier to the device. Lightning moves submodules only."""
        self.classifier.to(self.device)

    def on_train_start(self) -> None:
        self.has_started = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fingerprint"] = self.fingerprint
        checkpoint["unread"] = sorted(self.unread)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: the checkpoint is of a run with other settings, or of a longer run, or it is
                damaged.
        """
        saved = checkpoint.get("fingerprint", {})
        check_same_run(
            "`checkpoints` has another run's",
            saved if isinstance(saved, dict) else {},
            self.fingerprint,
            argument="checkpoints",
        )
        wrong = self.damage(checkpoint)
        if wrong:
            file = self.trainer.ckpt_path
            raise ArgumentError(
                f"`checkpoints`: {file} is damaged, delete it: {wrong}.", "checkpoints"
            )
        done = checkpoint["epoch"] + 1
        if self.trainer.max_epochs is not None and done > self.trainer.max_epochs >= 0:
            raise ArgumentError(
                f"`n_epochs` is {self.trainer.max_epochs}, but `checkpoints` has a run of {done}: "
                f"name another folder, or delete it.",
                "n_epochs",
            )
        self.unread.update(checkpoint.get("unread", ()))
        if self.order is not None:
            self.order.set_epoch(done)

    def damage(self, checkpoint: Mapping[str, Any]) -> str:
        """The first value of a checkpoint that is none of this run, or an empty text."""
        epoch, unread = checkpoint["epoch"], checkpoint.get("unread", [])
        if type(epoch) is not int or epoch < 0:
            return f"its epoch is {bounded_repr(epoch)}"
        n = sys.maxsize if self.order is None else len(self.order)
        if not isinstance(unread, list) or not all(
            type(index) is int and 0 <= index < n for index in unread
        ):
            return f"pictures that cannot be read are {bounded_repr(unread)}"
        if "state_dict" not in checkpoint:  # a strategy of Lightning has loaded it itself
            return ""
        weights = {f"decoder.{name}" for name, _ in self.decoder.named_parameters()}
        wrong = misfit(checkpoint["state_dict"], self.state_dict(), weights.__contains__)
        shapes = [weight.shape for weight in self.decoder.parameters()]
        return wrong or _optimizer_damage(checkpoint["optimizer_states"], shapes)


def _optimizer_damage(states: Any, shapes: Sequence[torch.Size]) -> str:
    """The first state of optimizers that does not fit weights of these shapes, or an empty text."""
    if not states:
        return "it has no states of optimizers"
    entries = [entry for state in states for entry in state["state"].items()]
    for index, values in entries:
        for name, value in values.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != shapes[index]:
                return f"its {name!r} of weight {index} has the shape {tuple(value.shape)}"
            if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
                return f"its {name!r} of weight {index} is not finite"
    return ""


@dataclass(frozen=True)
class TrainingRun:
    """The arguments that all trainings share, validated; see `fit_fcam` for their meaning.

    Raises:
        TypeError: `seed` or `trainer` is of another type.
        ValueError: `n_epochs` or `batch_size` is not an integer of at least 1.
        RuntimeError: the training is started inside `torch.inference_mode`.
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
            raise RuntimeError("Training is impossible in torch.inference_mode(): leave it first.")
        for name in ("n_epochs", "batch_size"):
            check_count(name, getattr(self, name))
        check_seed(self.seed)
        if not isinstance(self.trainer, Mapping | None):
            raise ArgumentTypeError(
                f"`trainer` must be a mapping of arguments, got {type(self.trainer)}.", "trainer"
            )

    @contextmanager
    def prepared(self, classifier: Module) -> Iterator[torch.device]:
        """A block with the modes, gradients and random numbers of a training.

        Everything is as before when the block is left, the classifier's device included.

        Yields:
            The classifier's device.
        """
        device = module_device(classifier)
        with ExitStack() as stack:
            # First, so that trainings in several threads run one after another.
            stack.enter_context(seeded_random(device, derive_seed(self.seed)))
            if default_device().type != "cpu":  # which may be another than the data's
                stack.enter_context(device)
            stack.enter_context(eval_mode(classifier))
            stack.enter_context(preserve_state(classifier))
            stack.enter_context(torch.enable_grad())  # Lightning would leave gradients on
            stack.callback(classifier.to, device)
            yield device

    def fit(self, module: DecoderModule, pictures: PictureDataset, validation: Any = None) -> None:
        """Train the decoder, from the last checkpoint on if there is one.

        Args:
            module: the decoder's module with its settings, on the classifier's device.
            pictures: the pictures to learn from.
            validation: a loader of validation batches, or None.

        Raises:
            ValueError: no picture can be read, or the checkpoint is damaged or of another run.
        """
        module.order = SeededShuffle(len(pictures), self.seed)
        loader = CpuLoader(
            pictures,
            self.batch_size,
            sampler=module.order,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )
        with keyboard_interrupt(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You defined a `validation_step`")
            trainer, checkpoint = self._trainer(module_device(module.classifier))
            try:
                trainer.fit(module, loader, validation, ckpt_path=checkpoint, weights_only=True)
            except _OF_DAMAGE as error:
                is_known = isinstance(error, ArgumentError | torch.OutOfMemoryError)
                if checkpoint is None or module.has_started or is_known:
                    raise
                raise ArgumentError(
                    f"`checkpoints`: the run cannot go on from {checkpoint} ({first_line(error)}). "
                    f"Name another folder, or delete it.",
                    "checkpoints",
                ) from error
        if len(module.unread) == len(pictures):
            raise ArgumentError(
                f"`data`: none of its {len(pictures)} pictures can be read.", "data", "unreadable"
            )
        pictures.warn_of_unread(module.unread)

    def _trainer(self, device: torch.device) -> tuple[Trainer, Path | None]:
        """Lightning's trainer, and the checkpoint that it resumes from, if there is one."""
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
        callbacks = settings.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        settings["callbacks"] = [*callbacks, saver]
        trainer, file = Trainer(**settings), Path(self.checkpoints) / "last.ckpt"
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # Lightning's default
            trainer.strategy.checkpoint_io = _CheckpointFiles()
        return trainer, file if file.exists() else None


@contextmanager
def keyboard_interrupt() -> Iterator[None]:
    """A block in which Ctrl-C raises KeyboardInterrupt, as everywhere in Python.

    Lightning would end the process instead, and leave a handler that ignores the next Ctrl-C. After
    SIGTERM it would end the process with code 0, as if the training were complete.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except (SystemExit, ImportError) as error:  # the latter from a module that was being imported
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        if isinstance(error, SystemExit) and error.code is None:
            error.code = TERMINATED
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


class SeededShuffle(Sampler[int]):
    """Draws a new order in each epoch, which depends on the seed and the epoch alone.

    Args:
        n: the number of examples.
        seed: the seed of all epochs.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed, self.epoch = n, seed, 0

    def __len__(self) -> int:
        return self.n

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. Lightning calls this at the start of each one."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = Generator().manual_seed(derive_seed(self.seed, self.epoch))
        return iter(torch.randperm(self.n, generator=generator, device="cpu").tolist())
