"""How well reconstructions keep pictures, and whether they show the classifier's features.

    python -m tests.benchmarks.perception [--train N] [--test N] [--epochs N] [--threads N]
                                          [--output FOLDER] [--quick]

The pictures are `captum_ext.datasets.TexturedEllipses` (64 x 64): one object, whose texture is the
class, among distractors, in random colours. A `TinyCNN` learns the class, and a second one, the
witness, learns it from other pictures and other weights. Decoders for some layers of the first are
trained by `fit_perception`: with the authors' weights of the loss, with a twentieth of the weight
of the latents, whose distances are large here, and without them (the authors' "no_dsim"). Then, on
pictures that none of the networks has seen:

- SSIM of the reconstructions, and of the mean of the training pictures, the best constant guess;
- the same of the distance of latents ("deep similarity"; smaller is nearer);
- whether the classifier gives its answer again when it is shown the reconstruction;
- whether the witness, shown the reconstruction, gives the classifier's answer: what only the
  classifier can see in a picture that was made by its own gradient, the witness does not;
- the same where the classifier is wrong: here the answer is not the truth, and a witness who is
  shown the picture itself says the truth.

In brackets are 95% intervals: of means by the normal approximation, of shares by Wilson's.
FOLDER gets `perception.json`, with the table; `perception_classifier.pt`, the weights of the
classifier; and `perception_<layer>.pt`, the decoders that the tutorial loads.
"""

import argparse
import json
import logging
import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torch.utils.data import Dataset

from captum_ext.datasets import TexturedEllipses, TinyCNN, train_classifier
from captum_ext.perception import (
    LayerEncoder,
    PerceptionDecoder,
    PerceptionVisualization,
    deep_similarity,
    fit_perception,
    structural_similarity,
)
from tests.benchmarks.measuring import environment, parse_arguments

SEEDS = {"train": 4000, "witness": 4001, "test": 4002}
NORMALIZE = ((0.5,) * 3, (0.25,) * 3)
BATCH = 250
# For each name: the layer, widths of the decoder's blocks, weights of the loss, and the file.
DECODERS: dict[str, tuple[str, tuple[int, ...], tuple[float, float, float], str | None]] = {
    'layer "4" (8 x 8), authors\' weights': ("4", (64, 32, 16), (0.2, 0.4, 0.4), None),
    "a twentieth for the latents": ("4", (64, 32, 16), (0.2, 0.02, 0.4), "perception_4.pt"),
    "nothing for the latents": ("4", (64, 32, 16), (0.4, 0.0, 0.6), None),
    'layer "2" (16 x 16), a twentieth': ("2", (32, 16), (0.2, 0.02, 0.4), "perception_2.pt"),
    'layer "0" (32 x 32), a twentieth': ("0", (16,), (0.2, 0.02, 0.4), None),
}

Row = dict[str, Any]


class Pictures(Dataset[Tensor]):
    """Drawn once, and without labels."""

    def __init__(self, scenes: TexturedEllipses) -> None:
        self.pixels = scenes.batch().pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index]


@torch.no_grad()
def answers(network: nn.Module, encoder: LayerEncoder, pictures: Tensor) -> Tensor:
    return torch.cat([network(encoder.images(part)).argmax(1) for part in pictures.split(BATCH)])


def mean_of(values: Tensor) -> tuple[float, float, float]:
    """And its interval."""
    mean, error = values.mean().item(), 1.96 * values.std().item() / math.sqrt(len(values))
    return mean, mean - error, mean + error


def share_of(hits: Tensor) -> tuple[float, float, float]:
    """And Wilson's interval."""
    n, z = len(hits), 1.96
    if not n:
        return math.nan, math.nan, math.nan
    p = hits.double().mean().item()
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, middle - half, middle + half


@torch.no_grad()
def distances(encoder: LayerEncoder, pictures: Tensor, others: Tensor) -> Tensor:
    return torch.cat(
        [
            deep_similarity(encoder(encoder.images(x)), encoder(encoder.images(y)))
            for x, y in zip(pictures.split(BATCH), others.split(BATCH), strict=True)
        ]
    )


def measured(
    network: TinyCNN,
    witness: TinyCNN,
    encoder: LayerEncoder,
    decoder: PerceptionDecoder,
    train: Tensor,
    test: Tensor,
    targets: Tensor,
) -> Row:
    pv = PerceptionVisualization(LayerGradCam(network, network[4]), encoder, decoder)
    reconstructions = torch.cat(
        [pv.reconstruct(encoder.images(part)) for part in test.split(BATCH)]
    )
    guess = train.mean(0, keepdim=True).expand_as(test)
    answer, again = (answers(network, encoder, x) for x in (test, reconstructions))
    heard, truth = (answers(witness, encoder, x) for x in (reconstructions, test))
    wrong = answer != targets
    return {
        "ssim": mean_of(structural_similarity(test, reconstructions).mean(1)),
        "ssim of the mean picture": mean_of(structural_similarity(test, guess).mean(1)),
        "latents": mean_of(distances(encoder, test, reconstructions)),
        "latents of the mean picture": mean_of(distances(encoder, test, guess)),
        "classifier again": share_of(again == answer),
        "witness": share_of(heard == answer),
        "n wrong": int(wrong.sum()),
        "witness, wrong": share_of((heard == answer)[wrong]),
        "witness, wrong, of the picture": share_of((truth == answer)[wrong]),
        "right": share_of(~wrong),
    }


def cell(interval: tuple[float, float, float], percent: bool = False) -> str:
    scale, digits = (100, 0) if percent else (1, 2)
    mean, low, high = (f"{scale * value:.{digits}f}" for value in interval)
    return f"{mean} ({low} to {high})"


def table(rows: dict[str, Row]) -> str:
    lines = [
        "| | SSIM | of the mean picture | distance of latents | of the mean picture | "
        "classifier: same answer, % | witness: the classifier's answer, % | where it is wrong, % |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        cells = [
            cell(row[key])
            for key in (
                "ssim",
                "ssim of the mean picture",
                "latents",
                "latents of the mean picture",
            )
        ] + [cell(row[key], True) for key in ("classifier again", "witness", "witness, wrong")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=int, default=1000, help="pictures")
    parser.add_argument("--test", type=int, default=2000, help="pictures")
    parser.add_argument("--epochs", type=int, default=15, help="of each decoder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="a folder for the table and the weights")
    arguments = parse_arguments(parser, train=60, test=100, epochs=1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    machine = environment(torch.device("cpu"), arguments.threads)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), end="\n\n", flush=True)

    start = time.perf_counter()
    scenes = TexturedEllipses(arguments.train, SEEDS["train"])
    network = train_classifier(scenes)
    witness = train_classifier(TexturedEllipses(arguments.train, SEEDS["witness"]), seed=1)
    pictures = Pictures(scenes)
    test = TexturedEllipses(arguments.test, SEEDS["test"]).batch()
    print(f"two classifiers: {time.perf_counter() - start:.0f} s", flush=True)

    rows: dict[str, Row] = {}
    before = {name: value.clone() for name, value in network.state_dict().items()}
    decoders = []
    for name, (layer, widths, weights, file) in DECODERS.items():
        encoder = LayerEncoder(network, layer, normalize=NORMALIZE)
        begun = time.perf_counter()
        decoder = fit_perception(
            encoder,
            pictures,
            size=64,
            n_epochs=arguments.epochs,
            batch_size=16,
            lr=3e-3,
            widths=widths,
            weights=weights,
            show_progress=False,
        )
        seconds = time.perf_counter() - begun
        after = network.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        row = measured(
            network, witness, encoder, decoder, pictures.pixels / 255, test.pixels / 255,
            test.targets,
        )  # fmt: skip
        rows[name] = row | {"seconds": seconds}
        decoders.append((file, decoder, encoder))
        print(f"{name}: {seconds:.0f} s", flush=True)

    row = next(iter(rows.values()))
    text = (
        f"The classifier is right on {cell(row['right'], True)}% of {arguments.test} pictures and "
        f"wrong on {row['n wrong']}; of these, the witness who is shown the picture itself gives "
        f"the classifier's answer in {cell(row['witness, wrong, of the picture'], True)}%. "
        f"E is unchanged, to the bit."
    )
    seconds = time.perf_counter() - start
    print(f"\n{table(rows)}\n\n{text}\n\n{seconds:.0f} seconds in all")
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        content = {
            "environment": machine, "table": table(rows), "text": text, "rows": rows,
            "seconds": seconds,
        }  # fmt: skip
        (arguments.output / "perception.json").write_text(json.dumps(content, indent=1) + "\n")
        torch.save(network.state_dict(), arguments.output / "perception_classifier.pt")
        for file, decoder, encoder in decoders:
            if file is not None:
                decoder.save(arguments.output / file, encoder)


if __name__ == "__main__":
    main()
