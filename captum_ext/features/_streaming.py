"""One pass over the pictures of a data set, which resumes from a file after it was killed."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from tqdm import tqdm

from captum_ext._data.loading import CpuLoader
from captum_ext._data.pictures import PictureDataset
from captum_ext._errors import ArgumentError
from captum_ext._identity import atomic_write, check_same_run
from captum_ext._layer_maps import LayerMaps
from captum_ext.features._top_activations import TopActivations


class PassCheckpoint:
    """The file of an unfinished pass.

    Args:
        path: the file.
        fingerprint: the settings that a resumed pass must share with the one that was killed.
        interval: the number of pictures from one writing of the file to the next.

    Attributes:
        saved: the content of the file; None if there is no file yet.

    Raises:
        ValueError: the file is no such checkpoint, or that of another run.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any], interval: int) -> None:
        self.path, self.fingerprint, self.interval = path, fingerprint, interval
        self.saved: dict[str, Any] | None = None
        if not path.exists():
            return
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            stored_fingerprint = saved["fingerprint"]
        except Exception as error:  # torch raises many types for files of others
            raise ArgumentError(
                f"`checkpoint` {path} is no checkpoint of patches.", "checkpoint"
            ) from error
        message = f"`checkpoint` {path} is of another run"
        check_same_run(message, stored_fingerprint, fingerprint, "file", "checkpoint")
        self.saved = saved

    def write(self, top: TopActivations, n_done: int, unread: list[int]) -> None:
        """Write the state after `n_done` pictures."""
        content = {"top": top.state_dict(), "n_done": n_done, "unread": unread}
        with atomic_write(self.path) as unfinished:
            torch.save({"fingerprint": self.fingerprint, **content}, unfinished)


def stream_pictures(
    maps: LayerMaps,
    pictures: PictureDataset,
    shard: range,
    units: tuple[int, ...] | None,
    top: TopActivations,
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
        top: the collector, which is still empty.
        checkpoint: the file to go on from and to write to, or None.
        batch_size: pictures in a forward pass.
        num_workers: processes that read pictures.
        show_progress: whether to draw a progress bar.

    Returns:
        The top activations, and the indices of the pictures that cannot be read.

    Raises:
        ValueError: no picture can be read.
    """
    n_done, unread = 0, []
    if checkpoint is not None and checkpoint.saved is not None:
        n_done, unread = checkpoint.saved["n_done"], checkpoint.saved["unread"]
        top = TopActivations.from_state_dict(checkpoint.saved["top"])
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
