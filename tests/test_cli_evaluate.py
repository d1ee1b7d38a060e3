"""`captum-ext evaluate`: its results, messages and errors."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.models
from captum.attr import LayerGradCam
from PIL import Image

from captum_ext import cli, evaluation, zoo
from captum_ext.cli.pictures import PictureFolder
from captum_ext.evaluation import summary
from captum_ext.evaluation.store import ResultStore, ResultWriter

torch.set_num_threads(1)


def run(*argv):
    try:
        return cli.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pt"
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), path)
    return path


@pytest.fixture
def command(resnet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in "abc":
        Path("data", name).mkdir(parents=True)
        pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"data/{name}/0.png")
    model = ("--model", "resnet18", "--weights", resnet, "--device", "cpu", "--layer", "layer2")
    return ("evaluate", "data", *model, "--size", 32, "--method", "grad-cam", "--batch-size", 2)


def test_a_folder_of_some_classes_needs_class_names(command, capsys):
    """Without them the first folders would count as the model's first classes."""
    shutil.rmtree("data/c")
    assert run(*command, "--output", "run") == 2
    message = capsys.readouterr().err
    assert "has 2 classes, and resnet18 has 3 classes" in message
    assert "--class-names" in message
    assert not Path("run").exists()


def test_results_are_those_of_the_library(command, resnet, capsys):
    assert run(*command, "--method", "layer-cam", "--output", "run", "--seed", 3) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    result = summary("run")
    assert list(result.figures) == ["grad-cam", "layercam"]
    assert list(result.higher_is_better) == ["insertion", "deletion"]
    assert captured.out == f"{result.markdown()}\nwritten to run\n"
    assert Path("run/summary.md").read_text() == result.markdown()
    assert Image.open("run/figure.png").size[0] > 100
    loaded = zoo.load_model("resnet18", resnet)
    cam = LayerGradCam(loaded.module, loaded.module.layer2)
    straight = evaluation.evaluate(
        {"grad-cam": (cam, {"relu_attributions": True})},
        PictureFolder("data"),
        ["insertion", "deletion"],
        output="straight",
        size=32,
        batch_size=2,
        show_progress=False,
    )
    assert straight.figures["grad-cam"] == result.figures["grad-cam"]
    assert sorted(p.name for p in Path("run").iterdir()) == [
        *("curves.png", "figure.png", "results.0.lock", "results.0.sqlite", "rows.csv"),
        *("settings.json", "summary.md", "timings.csv"),
    ]


def test_a_corrupt_picture_is_a_failed_row_and_exit_code_1(command, capsys):
    Path("data/b/0.png").write_bytes(b"no picture")
    assert run(*command, "--metrics", "average_drop") == 1
    captured = capsys.readouterr()
    assert captured.err == (
        "captum-ext: note: 1 of 3 rows failed; their reasons are in evaluation\n"
    )
    assert "grad-cam: 1 failed, the first for: OSError: " in captured.out
    assert summary("evaluation").figures["grad-cam"]["average_drop"].images == 2
    rows = Path("evaluation/rows.csv").read_bytes()
    assert run(*command, "--metrics", "average_drop") == 1  # all rows are there
    assert Path("evaluation/rows.csv").read_bytes() == rows
    capsys.readouterr()
    assert run(*command, "--metrics", "average_drop", "--seed", 1) == 2
    message = capsys.readouterr().err
    assert message.startswith(
        "captum-ext: error: --output evaluation has the rows of another run: "
    )
    assert "seed was 0 and is 1" in message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--metrics", "insertions"), "--metrics must be names of"),
        (
            ("--metrics", "localization"),
            "--metrics: the first 3 examples of DATA that can be read have neither",
        ),
        (("--output", "no/where"), "'no' does not exist"),
        (("--output", "file"), "is a file"),
        (("--method", "gradcan"), "unknown method 'gradcan'"),
        (("--size", "0"), "--size"),
        (("--layer", "nowhere"), "nowhere"),
        (("--target", "labels"), "--target"),
    ],
)
def test_errors_that_the_user_can_correct_are_one_line(more, message, command, capsys):
    Path("file").write_bytes(b"")
    assert run(*command, *more) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert err.startswith("captum-ext: error: ")
    assert message in err
    assert not Path("evaluation").exists()


def test_a_folder_that_another_run_writes_to_is_an_error_of_one_line(command, capsys):
    metrics = ("--metrics", "average_drop")
    assert run(*command, *metrics) == 0
    capsys.readouterr()
    with ResultWriter(ResultStore.read("evaluation"), 0):
        assert run(*command, *metrics) == 2
    message = "captum-ext: error: --output: another process or thread is writing to evaluation.\n"
    assert capsys.readouterr().err == message


def test_nothing_but_corrupt_pictures_is_an_error(command, capsys):
    for name in "abc":
        Path(f"data/{name}/0.png").write_bytes(b"no picture")
    assert run(*command) == 2
    assert "All 3 rows failed" in capsys.readouterr().err


def test_ctrl_c_says_how_to_resume(command, capsys, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", stopped)
    assert run(*command) == 130
    assert "the same command resumes the run" in capsys.readouterr().err


def test_help_imports_no_large_package():
    code = (
        "import sys; from captum_ext.cli import main\n"
        "try: main(['evaluate', '--help'])\n"
        "finally: print([m for m in ('torch', 'torchvision', 'yaml') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
    assert "--config FILE" in ran.stdout
