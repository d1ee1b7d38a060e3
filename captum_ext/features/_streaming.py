"""One pass over the pictures of a data set, which resumes from a file after it was killed."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from captum_ext._data.loading import CpuLoader
from captum_ext._data.pictures import PictureDataset
from captum_ext._errors import ArgumentError
from captum_ext._identity import check_same_run
from captum_ext._layer_maps import LayerMaps
from captum_ext._repr import bounded_repr
from captum_ext._tensor_files import read_tensors, write_tensors
from captum_ext.features._top_activations import TopActivations


class PassState(NamedTuple):
    """The top activations of the first `n_done` pictures of a shard.

    `unread` are the indices of those pictures that cannot be read.
    """

    top: TopActivations
    n_done: int
    unread: list[int]


class PassCheckpoint:
    """The file of an unfinished pass.

    Args:
        path: the file.
        fingerprint: the settings that a resumed pass must share with the one that was killed.
        interval: the number of pictures from one writing of the file to the next.

    Attributes:
        saved: the content of the file; None if there is no file yet.

    Raises:
        ValueError: the file is no such checkpoint, or a damaged one, or that of another run.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any], interval: int) -> None:
        self.path, self.fingerprint, self.interval = path, fingerprint, interval
        self.saved: dict[str, Any] | None = None
        if not path.exists():
            return
        problem = f"`checkpoint` {path} is no checkpoint of patches"
        keys = ("fingerprint", "top", "n_done", "unread")
        self.saved = read_tensors(path, "checkpoint", problem, keys)
        if not isinstance(self.saved["fingerprint"], dict):
            raise ArgumentError(f"{problem}: it has no fingerprint.", "checkpoint")
        message = f"`checkpoint` {path} is of another run"
        check_same_run(message, self.saved["fingerprint"], fingerprint, "file", "checkpoint")

    def read(self, empty: TopActivations, maps: Tensor, shard: range) -> "PassState":
        """The stored state of the pass, or that of its start.

        Args:
            empty: the collector at the start.
            maps: the maps (1, C, h, w) of one picture, with the channels that are collected.
            shard: indices of the pictures.

        Raises:
            ValueError: the state is not that of such a pass.
        """
        if self.saved is None:
            return PassState(empty, 0, [])
        n_done, unread = self.saved["n_done"], self.saved["unread"]
        reason = ""
        if type(n_done) is not int or not 0 <= n_done <= len(shard):
            reason = f"{bounded_repr(n_done)} of {len(shard)} pictures are done"
        elif not isinstance(unread, list) or not all(
            type(index) is int and index in shard[:n_done] for index in unread
        ):
            reason = f"pictures that cannot be read are {bounded_repr(unread)}"
        else:
            try:
                top = TopActivations.from_state_dict(self.saved["top"])
            except (TypeError, ValueError) as error:
                reason = str(error)
            else:
                reason = _misfit(top, empty, maps, set(shard[:n_done]) - set(unread))
        if reason:
            raise ArgumentError(
                f"`checkpoint` {self.path} is damaged, delete it: {reason}.", "checkpoint"
            )
        return PassState(top, n_done, unread)

    def write(self, top: TopActivations, n_done: int, unread: list[int]) -> None:
        """Write the state after `n_done` pictures."""
        content = {"top": top.state_dict(), "n_done": n_done, "unread": unread}
        write_tensors(self.path, {"fingerprint": self.fingerprint, **content})


def _misfit(top: TopActivations, empty: TopActivations, maps: Tensor, done: set[int]) -> str:
    """The reason why a stored collector is not one of the pictures `done`, or an empty text."""
    if (top.n, top.per_image) != (empty.n, empty.per_image):
        return f"it collects {top.n} activations, {top.per_image} of an image"
    if top.grid is None:
        return f"it has nothing of {len(done)} pictures" if done else ""
    if (len(top.values), *top.grid) != (maps.shape[1], *maps.shape[2:]):
        return f"its maps have {len(top.values)} channels of {top.grid}"
    strange = set(top.indices.unique().tolist()) - done
    return f"picture {min(strange)} was not done" if strange else ""


def stream_pictures(
    maps: LayerMaps,
    pictures: PictureDataset,
    shard: range,
    units: tuple[int, ...] | None,
    state: PassState,
    checkpoint: PassCheckpoint | None,
    batch_size: int,
    num_workers: int,
    show_progress: bool,
) -> tuple[TopActivations, list[int]]:
    """Collect the top activations in one pass over the pictures of a shard.

    Args:
        maps: the layer's maps.
        pictures: the data set.
        shard: indices of the pictures.
        units: channels of the layer. None takes all.
        state: the state to go on from.
        checkpoint: the file to write to, or None.
        batch_size: pictures in a forward pass.
        num_workers: processes that read pictures.
        show_progress: whether to draw a progress bar.

    Returns:
        The top activations, and the indices of the pictures that cannot be read.

    Raises:
        ValueError: no picture can be read.
    """
    top, n_done, unread = state
    n_written = n_done
    loader = CpuLoader(
        Subset(pictures, shard[n_done:]),
        batch_size,
        num_workers=num_workers,
        generator=torch.Generator(),  # the global one stays as it is
    )
    for pixels, _, indices, is_read in tqdm(loader, desc="patches", disable=not show_progress):
        n_done += len(indices)
        unread += indices[~is_read].tolist()
        if bool(is_read.any()):
            images = maps.images(pixels[is_read].to(maps.device).float() / 255)
            activations = maps.run_full_pass(images)
            if units is not None:
                channels = torch.tensor(units, device=activations.device)
                activations = activations.index_select(1, channels)
            top.update(activations, indices[is_read])
        if checkpoint is not None and (
            n_done - n_written >= checkpoint.interval or n_done == len(shard)
        ):
            checkpoint.write(top, n_done, unread)
            n_written = n_done
    if len(unread) == len(shard):
        raise ArgumentError("`data`: none of its pictures can be read.", "data")
    return top, unread
