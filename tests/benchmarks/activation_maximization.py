"""Settings of activation maximisation, compared on a trained network in one run.

    python -m tests.benchmarks.activation_maximization [--size N] [--steps N] [--threads N]
                                                       [--pictures FOLDER] [--quick]

It prints a table in Markdown, and with `--pictures` writes a strip of pictures for each row. All
rows have the same classes, steps and random numbers, and differ from the defaults as their name
says. Columns are means over the classes, for the resulting images and the network of the ascent:
the logit; the logit after a shift by a few pixels; and the logit and the probability of the class
after a blur of two pixels, which removes fine patterns. Times are of the processor, in total.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Generator

from captum_ext.features import ActivationMaximization
from captum_ext.imaging import blur
from captum_ext.zoo import load_model
from tests.benchmarks.measuring import parse_arguments

CLASSES = {
    "goldfish": 1,
    "macaw": 88,
    "flamingo": 130,
    "tiger": 292,
    "balloon": 417,
    "desktop computer": 527,
    "sports car": 817,
    "pizza": 963,
}
ROWS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "pixels": {"parametrization": "pixel"},
    "no blur": {"blur_every": 0},
    "pixels, no blur": {"parametrization": "pixel", "blur_every": 0},
    "no jitter": {"jitter": 0},
    "normalized gradient": {"optimizer": "normalized"},
}
SHIFTS = ((3, -5), (-6, 2), (7, 7), (-4, -8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=128, help="of the images, in pixels")
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pictures", type=Path, help="a folder for PNGs")
    options = parse_arguments(parser, size=48, steps=8)
    torch.set_num_threads(options.threads)
    demo = load_model()
    net, targets = demo.module.requires_grad_(False), list(CLASSES.values())
    own_class = (range(len(targets)), targets)
    normalize = (demo.preprocess.mean, demo.preprocess.std)
    print("| | logit | shifted | blurred | probability, blurred | lowest probability | seconds |")
    print("|---|---|---|---|---|---|---|")
    for name, row in ROWS.items():
        start = time.process_time()
        result = ActivationMaximization(net, normalize=normalize).maximize(
            (3, options.size, options.size),
            targets,
            n_steps=options.steps,
            generator=Generator().manual_seed(0),
            **row,
        )
        seconds = time.process_time() - start
        x = result.images
        shifted = torch.stack([net(torch.roll(x, shift, (2, 3)))[own_class] for shift in SHIFTS])
        blurred = net(blur(x, 13, 2.0))
        numbers = (
            result.scores.mean(),
            shifted.mean(),
            blurred[own_class].mean(),
            blurred.softmax(1)[own_class].mean(),
            net(x).softmax(1)[own_class].min(),
        )
        cells = " | ".join(f"{float(value):.2f}" for value in numbers)
        print(f"| {name} | {cells} | {seconds:.0f} |", flush=True)
        if options.pictures is not None:
            from torchvision.utils import save_image

            options.pictures.mkdir(parents=True, exist_ok=True)
            save_image(result.pictures, options.pictures / f"{name}.png", nrow=len(targets))


if __name__ == "__main__":
    main()
