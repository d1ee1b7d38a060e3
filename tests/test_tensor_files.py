"""Stored files: no code in them runs, and what is damaged or out of range is refused."""

import io
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from captum.attr import LayerGradCam
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from captum_ext import _identity, _tensor_files
from captum_ext._errors import ArgumentError, InputError
from captum_ext._identity import atomic_write
from captum_ext._tensor_files import read_tensors, write_tensors
from captum_ext.fcam import fit_fcam
from captum_ext.features import TopActivations
from tests.networks import three_stage_net
from tests.stored_files import DAMAGES, FIT, SCENES, STORED_FILES, compress

HUGE = 10**9


def is_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refused(name: str, folder: Path) -> str:
    """The message of the error that reading the file gives; it names the file."""
    stored = STORED_FILES[name]
    with pytest.raises((ArgumentError, InputError), match=stored.name.replace(".", r"\.")) as error:
        stored.run(folder)
    message = str(error.value)
    assert len(message) < 1000
    return message


@pytest.fixture(scope="module", params=STORED_FILES)
def stored(request: Any, tmp_path_factory: Any) -> tuple[str, bytes, Any]:
    """A kind of file, the content of such a file, and the result of the run that wrote it."""
    folder = tmp_path_factory.mktemp("stored")
    torch.manual_seed(0)
    result = STORED_FILES[request.param].run(folder)
    assert [path.name for path in folder.iterdir()] == [STORED_FILES[request.param].name]
    return request.param, (folder / STORED_FILES[request.param].name).read_bytes(), result


def test_a_stored_file_is_read_again(stored: tuple[str, bytes, Any], tmp_path: Path) -> None:
    name, content, result = stored
    (tmp_path / STORED_FILES[name].name).write_bytes(content)
    assert is_equal(STORED_FILES[name].run(tmp_path), result)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_hostile_files_are_refused(
    damage: str, stored: tuple[str, bytes, Any], tmp_path: Path
) -> None:
    name, content, _ = stored
    file = tmp_path / STORED_FILES[name].name
    file.write_bytes(content)
    DAMAGES[damage](file, tmp_path / "touched")
    refused(name, tmp_path)
    assert not (tmp_path / "touched").exists()
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_compressed_files_are_refused(stored: tuple[str, bytes, Any], tmp_path: Path) -> None:
    """A small file could become a large content. Weights of others may be compressed."""
    name, content, result = stored
    file = tmp_path / STORED_FILES[name].name
    file.write_bytes(content)
    compress(file, file)
    if name == "weights":
        assert is_equal(STORED_FILES[name].run(tmp_path), result)
    else:
        assert "is compressed" in refused(name, tmp_path)


def test_each_zeroed_block_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    content = {"a": torch.arange(1, 400.0), "b": torch.full((9,), 7), "options": [1, 2.5, "x"]}
    write_tensors(file, content)
    data = file.read_bytes()
    n_refused = 0
    for start in range(0, len(data) - 15, 16):
        file.write_bytes(data[:start] + bytes(64) + data[start + 64 :])
        try:
            again = read_tensors(file, "path", f"`path` {file} is wrong", content)
        except ArgumentError:
            n_refused += 1
        else:
            assert is_equal({k: again[k] for k in "ab"}, {k: content[k] for k in "ab"})
            assert again["options"] == content["options"]
    assert n_refused > 100


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        write_tensors(tmp_path / "a.pt", {"a": torch.ones(3)})
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert not any(entry.CRC for entry in archive.infolist())
    assert (
        read_tensors(tmp_path / "a.pt", "path", "`path` is wrong", ["a"])["a"].tolist() == [1.0] * 3
    )


# --- content -------------------------------------------------------------------------------------


def change_in(*path: Any, value: Any) -> Callable[[Any], None]:
    """A change of one entry of a nested content; a function is applied to the entry."""

    def change(content: Any) -> None:
        *front, last = path
        for key in front:
            content = content[key]
        content[last] = value(content[last]) if callable(value) else value

    return change


def remove_from(*path: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        *front, last = path
        for key in front:
            content = content[key]
        del content[last]

    return change


def with_first(value: float) -> Callable[[Tensor], Tensor]:
    """A function that replaces the first element of a tensor."""

    def replaced(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return replaced


def expanded(tensor: Tensor) -> Tensor:
    return tensor.flatten()[:1].expand(HUGE)


NAN = float("nan")
_WEIGHTS = {
    "NaN": (change_in("decoder", "head.weight", value=with_first(NAN)), "not finite"),
    "inf": (change_in("decoder", "head.bias", value=with_first(-torch.inf)), "not finite"),
    "no weight": (remove_from("decoder", "head.bias"), "has no 'head.bias'"),
    "more weights": (change_in("decoder", "other", value=torch.ones(1)), "does not belong"),
    "shape": (change_in("decoder", "head.bias", value=torch.ones(7)), r"the shape \(7,\)"),
    "dtype": (change_in("decoder", "head.bias", value=lambda t: t.long()), "dense torch.float32"),
    "complex": (change_in("decoder", "head.bias", value=lambda t: t.cfloat()), "dense"),
    "sparse": (change_in("decoder", "head.bias", value=lambda t: t.to_sparse()), "dense"),
    "expanded": (change_in("decoder", "head.bias", value=expanded), "dense"),
    "text": (change_in("decoder", "head.bias", value="ones"), "dense"),
    "no weights": (change_in("decoder", value=[]), "dense"),
    "no fingerprint": (change_in("classifier", value=3), "no fingerprint"),
    "dtypes": (change_in("dtypes", value={"a": 3}), "no fingerprint"),
}
_CHECKPOINT = {
    "NaN": (change_in("state_dict", "decoder.head.weight", value=with_first(NAN)), "not finite"),
    "shape": (change_in("state_dict", "decoder.head.bias", value=torch.ones(7)), "the shape"),
    "no weight": (remove_from("state_dict", "decoder.head.bias"), "has no"),
    "no weights": (remove_from("state_dict"), "has no 'state_dict'"),
    "epoch -1": (change_in("epoch", value=-1), "epoch is -1"),
    "epoch 0.5": (change_in("epoch", value=0.5), "epoch is 0.5"),
    "no epoch": (remove_from("epoch"), "has no 'epoch'"),
    "unread": (change_in("unread", value=[-1]), r"are \[-1\]"),
    "unread 8": (change_in("unread", value=[8]), r"are \[8\]"),
    "no optimizer": (change_in("optimizer_states", value=[]), "cannot go on|optimizer"),
    "optimizer": (change_in("optimizer_states", value=[{"state": 3}]), "cannot go on"),
    "no loops": (remove_from("loops"), "has no 'loops'"),
    "loops": (change_in("loops", value={"fit_loop": 3}), "cannot go on"),
    "callbacks": (change_in("callbacks", value=3), "cannot go on"),
    "version": (change_in("pytorch-lightning_version", value=[1]), "cannot go on"),
    "fingerprint": (change_in("fingerprint", value=[1]), "another run"),
}
_MOMENTS = ("optimizer_states", 0, "state", 0)
CHANGES: dict[str, dict[str, tuple[Callable[[Any], None], str]]] = {
    "decoder of F-CAM": _WEIGHTS
    | {
        "channels": (change_in("channels", value=[HUGE, 8]), "channels"),
        "all channels": (change_in("channels", value=[6] * 10**6), "channels"),
        "no channels": (change_in("channels", value=[]), "options"),
        "channels -1": (change_in("channels", value=[-1, 8]), "channels"),
        "widths": (change_in("widths", value=[8, HUGE]), "widths"),
        "other widths": (change_in("widths", value=[4, 8]), "of another architecture"),
        "text": (change_in("widths", value="abc"), "widths"),
        "center": (change_in("center", value=True), "of another architecture"),
        "layers": (change_in("layers", value=["0"]), "options"),
        "an unknown layer": (change_in("layers", value=["0", "none"]), "none"),
        "numbers as layers": (change_in("layers", value=[0, 1]), "options"),
    },
    "decoder of Perception Visualization": _WEIGHTS
    | {
        "channels": (change_in("channels", value=HUGE), "channels"),
        "widths": (change_in("widths", value=[HUGE, 4]), "widths"),
        "convolutions": (change_in("convolutions", value=[HUGE, 1]), "convolutions"),
        "colors": (change_in("colors", value=HUGE), "colors"),
        "stride 3": (change_in("stride", value=3), "power of two"),
        "stride": (change_in("stride", value=2**62), "options"),
        "no number": (change_in("stride", value=2**100_000), "has no decoder"),
        "None": (change_in("widths", value=None), "widths"),
        "encoder": (change_in("encoder", value=7), "options"),
    },
    "checkpoint of patches": {
        "done -1": (change_in("n_done", value=-1), "-1 of 8"),
        "done 9": (change_in("n_done", value=9), "9 of 8"),
        "done True": (change_in("n_done", value=True), "True of 8"),
        "unread": (change_in("unread", value=[8]), "unread|cannot be read"),
        "fingerprint": (change_in("fingerprint", value="x"), "no fingerprint"),
        "n": (change_in("top", "n", value=4), "collects 4"),
        "no keys": (remove_from("top", "keys"), "must have"),
        "NaN": (change_in("top", "values", value=with_first(NAN)), "finite"),
        "order": (change_in("top", "values", value=with_first(-9.0)), "descending"),
        "keys": (change_in("top", "keys", value=with_first(-1)), "0 or more"),
        "pictures": (change_in("top", "keys", value=with_first(64 * 8)), "picture 8 was not"),
        "grid": (change_in("top", "grid", value=(4, 16)), "channels of"),
        "grid 0": (change_in("top", "grid", value=(0, 8)), "grid"),
        "units": (change_in("top", value=TopActivations(3).state_dict()), "units|channels|grid|no"),
        "expanded": (change_in("top", "values", value=expanded), "dense"),
        "int8": (change_in("top", "values", value=lambda t: t.to(torch.int8)), "finite"),
        "top": (change_in("top", value=[]), "must have"),
    },
    "cache of F-CAM": {
        "NaN": (change_in("maps", value=with_first(NAN)), "from 0 to 1"),
        "2": (change_in("maps", value=with_first(2.0)), "from 0 to 1"),
        "number": (change_in("maps", value=lambda t: t[:7]), "not 8 x 1"),
        "channels": (change_in("maps", value=lambda t: t.expand(-1, 3, -1, -1)), "not 8 x 1"),
        "dtype": (change_in("maps", value=lambda t: t.double()), "not 8 x 1"),
        "text": (change_in("maps", value="x"), "not 8 x 1"),
        "fingerprint": (change_in("fingerprint", value=[1]), "not 8 x 1"),
    },
    "checkpoint of F-CAM": _CHECKPOINT
    | {
        "best": (change_in("best", value=3), "best epoch is 3"),
        "score": (change_in("best", value={"score": NAN, "decoder": {}}), "best epoch"),
        "no decoder": (
            change_in("best", value={"score": 1.0, "decoder": {}}),
            "has no",
        ),
        "momentum": (change_in(*_MOMENTS, "momentum_buffer", value=torch.ones(2)), "the shape"),
        "momentum NaN": (
            change_in(*_MOMENTS, "momentum_buffer", value=with_first(NAN)),
            "not finite",
        ),
    },
    "checkpoint of Perception Visualization": _CHECKPOINT
    | {"moment": (change_in(*_MOMENTS, "exp_avg", value=torch.ones(2)), "the shape")},
}


@pytest.mark.parametrize(
    ("stored", "change"),
    [(name, change) for name, changes in CHANGES.items() for change in changes],
    indirect=["stored"],
)
def test_wrong_content_is_refused(
    stored: tuple[str, bytes, Any], change: str, tmp_path: Path
) -> None:
    name, data, _ = stored
    content = torch.load(io.BytesIO(data), weights_only=True)
    function, message = CHANGES[name][change]
    function(content)
    torch.save(content, tmp_path / STORED_FILES[name].name)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        STORED_FILES[name].run(tmp_path)
    if "another run" not in message:
        refused(name, tmp_path)
    assert time.monotonic() - start < 20


class OwnCheckpointIO(TorchCheckpointIO):
    """Lightning's way to read checkpoints, as a user may pass it."""


@pytest.mark.parametrize("damage", ["a pickle that runs code", "an entry that runs code"])
def test_lightning_itself_reads_no_code(damage: str, tmp_path: Path) -> None:
    model = three_stage_net().eval()
    guide = LayerGradCam(model, model[2])
    trainer = {"plugins": OwnCheckpointIO()}
    options = FIT | {"checkpoints": tmp_path / "run", "trainer": trainer}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_fcam(model, SCENES, guide, **options)
        DAMAGES[damage](tmp_path / "run" / "last.ckpt", tmp_path / "touched")
        with pytest.raises(ArgumentError, match=r"cannot go on from .*last\.ckpt"):
            fit_fcam(model, SCENES, guide, **options)
    assert not (tmp_path / "touched").exists()


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_alone(
    error: BaseException,
    stored: tuple[str, bytes, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = stored[0]
    if name == "weights":
        pytest.skip("written by others")

    def half(content: Any, file: IO[bytes]) -> None:
        file.write(b"half")
        raise error

    monkeypatch.setattr(_tensor_files.torch, "save", half)
    with pytest.raises(type(error)):
        STORED_FILES[name].run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    file = tmp_path / "a[1].pt"
    abandoned, other = tmp_path / ".a[1].pt.7.8.partial", tmp_path / ".b.pt.7.8.partial"
    abandoned.touch()
    other.touch()
    with atomic_write(file) as first:
        first.write_text("first")
        with _identity.atomic_write(tmp_path / "b.txt") as second:
            second.write_text("second")
        _identity._remove_abandoned(file)  # as another process would, at the same time
        assert first.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "a[1].pt", "b.txt"]


def test_bounded_errors_of_deep_content(tmp_path: Path) -> None:
    """A small file can hold lists whose text would not fit into memory."""
    nested: Any = [1]
    for _ in range(60):
        nested = [nested, nested]
    message = _identity.describe_changes({"a": nested, "b": nested}, {"a": 1, "b": "x" * 9000})
    assert len(message) < 70_000
