"""One pass over the pictures of a data set, which a file lets go on after it was killed."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from captum_ext._data.pictures import PictureDataset
from captum_ext._identity import atomic_write, check_same_run
from captum_ext.features._layer_maps import LayerMaps
from captum_ext.features._top_activations import TopActivations


class Store:
    """The file of a run, and what it must be the same in."""

    def __init__(self, path: Path, fingerprint: dict[str, Any], every: int) -> None:
        self.path, self.fingerprint, self.every = path, fingerprint, every
        self.saved: dict[str, Any] | None = None
        if not path.exists():
            return
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            found = saved["fingerprint"]
        except Exception as error:  # torch has many kinds of them for what it did not write
            raise ValueError(f"`checkpoint` {path} is no checkpoint of patches.") from error
        check_same_run(f"`checkpoint` {path} is of another run", found, fingerprint, "file")
        self.saved = saved

    def write(self, top: TopActivations, done: int, unread: list[int]) -> None:
        content = {
            "fingerprint": self.fingerprint,
            "top": top.state_dict(),
            "done": done,
            "unread": unread,
        }
        with atomic_write(self.path) as unfinished:
            torch.save(content, unfinished)


def streamed(
    maps: LayerMaps,
    pictures: PictureDataset,
    shard: range,
    units: tuple[int, ...] | None,
    top: TopActivations,
    store: Store | None,
    batch_size: int,
    num_workers: int,
    show_progress: bool,
) -> tuple[TopActivations, list[int]]:
    """One pass over the places of `shard`: the best, and the places that cannot be read."""
    done, unread = 0, []
    if store is not None and store.saved is not None:
        done, unread = store.saved["done"], store.saved["unread"]
        top = TopActivations.from_state_dict(store.saved["top"])
    stored = done
    loader = DataLoader(
        Subset(pictures, shard[done:]),
        batch_size,
        num_workers=num_workers,
        generator=torch.Generator(),  # the global one stays as it is
    )
    for pixels, _, places, is_read in tqdm(loader, desc="patches", disable=not show_progress):
        done += len(places)
        unread += places[~is_read].tolist()
        if bool(is_read.any()):
            found = maps(maps.images(pixels[is_read]))
            if units is not None:
                found = found.index_select(1, torch.tensor(units, device=found.device))
            top.update(found, places[is_read])
        if store is not None and (done - stored >= store.every or done == len(shard)):
            store.write(top, done, unread)
            stored = done
    if len(unread) == len(shard):
        raise ValueError("`data`: none of its pictures can be read.")
    return top, unread
