"""Kills of trainings: `python -m tests.training_kills KIND MOMENT ...`.

KIND is "fcam" or "perception". A MOMENT is SIGNAL:EVENT:COUNT, such as SIGKILL:write:2, the second
writing of a file, or SIGINT:time:0.3, which is 0.3 of the time of an uninterrupted run. For each,
a process is forked that gets the signal at this moment, and another one that goes on. Its weights,
its checkpoint and its files must be those of the uninterrupted run. It prints what differs.
"""

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from captum.attr import LayerGradCam
from torch.utils._pytree import tree_flatten

from captum_ext._training import DecoderModule
from captum_ext.datasets import TexturedEllipses
from captum_ext.fcam import fit_fcam
from captum_ext.perception import LayerEncoder, fit_perception
from tests.networks import dropout_net, three_stage_net

OPTIONS = {"size": 32, "widths": (4, 4, 4), "n_epochs": 4, "batch_size": 8, "show_progress": False}
SCENES = list(TexturedEllipses(24, 0, (32, 32)))
INTERRUPTED, TERMINATED = 130 << 8, 143 << 8  # as os.waitpid gives them
PICTURES = [(scene.image, scene.target) for scene in SCENES]


def fcam(folder: Path) -> torch.nn.Module:
    model = three_stage_net().eval()
    guide = LayerGradCam(model, model[2])
    folders = {"cache": folder / "maps", "checkpoints": folder / "run"}
    return fit_fcam(model, PICTURES, guide, validation=SCENES[:6], **OPTIONS, **folders).decoder


def perception(folder: Path) -> torch.nn.Module:
    options = OPTIONS | {"widths": (8, 4), "convolutions": (1, 1)}
    encoder = LayerEncoder(dropout_net(), "1")
    return fit_perception(encoder, PICTURES, **options, checkpoints=folder / "run")


FITS: dict[str, Callable[[Path], torch.nn.Module]] = {"fcam": fcam, "perception": perception}


def send_at(number: int, event: str, count: str, seconds: float) -> None:
    """Arrange that this process gets a signal at an event, or after a share of the seconds."""
    calls = {"write": 0, "rename": 0, "batch": 0}

    def counted(name: str) -> bool:
        calls[name] += 1
        return name == event and calls[name] == int(count)

    save, replace, loss = torch.save, Path.replace, DecoderModule.total_loss

    def half_save(content: Any, file: Any) -> None:
        save(content, file)
        if counted("write"):
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), number)

    def replace_and_send(path: Path, target: Path) -> Any:
        result = replace(path, target)
        if counted("rename"):
            os.kill(os.getpid(), number)
        return result

    def loss_and_send(*args: Any) -> Any:
        if counted("batch"):
            os.kill(os.getpid(), number)
        return loss(*args)

    torch.save, Path.replace = half_save, replace_and_send
    DecoderModule.total_loss = loss_and_send
    if event == "time":
        timer = threading.Timer(float(count) * seconds, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()


def run(kind: str, folder: Path, *sent: Any) -> int:
    """Fork a process that trains in the folder, and return its exit status."""
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1]
    status = 1
    try:
        output = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if sent:
            send_at(*sent)
        decoder = FITS[kind](folder)
        torch.save(decoder.state_dict(), folder / "final.pt")
        status = 0
    except KeyboardInterrupt:
        status = INTERRUPTED >> 8
    except SystemExit:
        status = TERMINATED >> 8
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def compare(folder: Path, expected: Path) -> list[str]:
    """What differs in the files of two runs."""
    files, wanted = (
        {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}
        for root in (folder, expected)
    )
    wrong = [f"file {name}" for name in files ^ wanted]
    for name in sorted(files & wanted - {"log"}):
        contents = [torch.load(root / name, weights_only=True) for root in (folder, expected)]
        for content in contents:
            content.pop("callbacks", None)  # these name the folder
        (values, tree), (wanted_values, wanted_tree) = map(tree_flatten, contents)
        is_equal = str(tree) == str(wanted_tree) and all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            for a, b in zip(values, wanted_values, strict=True)
        )
        wrong += [] if is_equal else [f"content of {name}"]
    return wrong


def main(kind: str, moments: list[str]) -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    n_wrong = 0
    with tempfile.TemporaryDirectory() as name:
        straight, killed = Path(name, "straight"), Path(name, "killed")
        for _ in range(2):  # the first run imports more, and is slower
            shutil.rmtree(straight, ignore_errors=True)
            straight.mkdir()
            start = time.monotonic()
            assert run(kind, straight) == 0, (straight / "log").read_text()
            seconds = time.monotonic() - start
        for moment in moments:
            signal_name, event, count = moment.split(":")
            shutil.rmtree(killed, ignore_errors=True)
            killed.mkdir()
            number = getattr(signal, signal_name)
            status = run(kind, killed, number, event, count, seconds)
            # Lightning handles SIGTERM only while it trains. A late signal comes after the end.
            allowed = {signal.SIGKILL: (9,), signal.SIGINT: (INTERRUPTED,)}.get(
                number, (TERMINATED, signal.SIGTERM)
            )
            wrong = []
            if status not in allowed and not (event == "time" and status == 0):
                wrong.append(f"status {status}: {(killed / 'log').read_text()[-2000:]}")
            if run(kind, killed):
                wrong.append((killed / "log").read_text()[-2000:])
            else:
                wrong += compare(killed, straight)
            n_wrong += bool(wrong)
            print(moment, "status", status, *(wrong or ["equal"]), flush=True)
    return n_wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
