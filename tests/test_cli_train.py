"""`captum-ext train-fcam`: its trainings, messages and errors."""

import functools
import inspect
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.models
from captum.attr import LayerGradCam
from PIL import Image

from captum_ext import cli, zoo
from captum_ext.attr import FCAM, LayerScoreCam, LayerTokenGradCam
from captum_ext.cli import train_fcam
from captum_ext.cli.models import check_devices
from captum_ext.cli.pictures import PictureFolder

pytest.importorskip("lightning")

from captum_ext.fcam import PAPER, fit, fit_fcam, training

torch.set_num_threads(1)

N_CLASSES = 3


def run(*argv):
    try:
        return cli.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def one_line(capsys, level="error"):
    """The text on stderr, which must be one line and no traceback."""
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    assert message.startswith(f"captum-ext: {level}: ")
    assert "Traceback" not in message
    return message


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """The weights of a classifier of three classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pt"
    torch.save(torchvision.models.resnet18(num_classes=N_CLASSES).state_dict(), path)
    return path


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A working folder, with the pictures of three classes in `data`."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in "abc":
        Path("data", name).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"data/{name}/{i}.png")
    return tmp_path


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Hide the warning of a decoder that has learned nothing: these trainings have few steps."""
    monkeypatch.setattr(fit, "COLLAPSED_LOSS", 100.0)


@pytest.fixture
def command(resnet):
    """A small run."""
    model = ("--model", "resnet18", "--weights", resnet, "--device", "cpu")
    return ("train-fcam", "data", *model, "--size", 64, "--epochs", 1, "--batch-size", 4)


@pytest.fixture
def fit_arguments(monkeypatch):
    """The arguments of `fit_fcam`, which trains nothing here."""
    seen = {}

    @functools.wraps(fit_fcam)
    def remember(classifier, data, guide, **options):
        seen.update(classifier=classifier, data=data, guide=guide, **options)
        with torch.no_grad():
            decoder = fit.FCAMDecoder.reading(classifier, torch.rand(1, 3, 64, 64))
        return FCAM(classifier, decoder.eval())

    monkeypatch.setattr(fit, "fit_fcam", remember)
    return seen


def straight(weights, **options):
    """The same training by the library."""
    loaded = zoo.load_model("resnet18", weights)
    folder = PictureFolder("data")
    normalize = (loaded.preprocess.mean, loaded.preprocess.std)
    settings = {"size": 64, "n_epochs": 1, "batch_size": 4, "show_progress": False} | options
    guide = LayerGradCam(loaded.module, loaded.module.layer4)
    return fit_fcam(loaded.module, folder, guide, normalize=normalize, **settings)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def interrupt(*args):
    raise KeyboardInterrupt


def interrupt_import(*args):
    """What extension modules raise where Ctrl-C comes during their import."""
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        raise ImportError("initialization failed") from error


@pytest.mark.parametrize("stop", [interrupt, interrupt_import])
@pytest.mark.parametrize("part", ["_parser", "train_fcam._check_files", "train_fcam._fit_settings"])
def test_ctrl_c_gives_one_line_at_any_moment(stop, part, command, workdir, capsys, monkeypatch):
    monkeypatch.setattr(f"captum_ext.cli.{part}", stop)
    assert run(*command) == 130
    assert "interrupted" in one_line(capsys, "stopped")


# --- the training --------------------------------------------------------------------------------


def test_a_decoder_is_trained_written_and_loaded(resnet, workdir, command, capsys):
    assert run(*command, "--seed", 3, "--resize", 70) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert sorted(p.name for p in workdir.iterdir()) == ["data", "fcam.pt"]
    lines = captured.out.splitlines()
    assert [line.split(maxsplit=1) for line in lines[:5]] == [
        ["model", "resnet18"],
        ["guide", "grad-cam at layer layer4"],
        ["decoder", "reads relu, layer1, layer2, layer3, layer4"],
        ["pictures", "6 of 3 classes"],
        ["epochs", "1"],
    ]
    assert "written to fcam.pt; load it by" in captured.out

    names = {}
    exec("\n".join(line.strip() for line in lines[lines.index("") + 2 :]), names)
    x = torch.rand(2, 3, 65, 80)
    maps = names["fcam"].attribute(x)
    assert maps.shape == x.shape
    assert maps.std() > 1e-4
    expected = straight(resnet, seed=3, resize=70)
    assert equal(names["fcam"].decoder.state_dict(), expected.decoder.state_dict())
    other = torchvision.models.resnet18(num_classes=N_CLASSES)
    with pytest.raises(ValueError, match="is not the classifier"):
        FCAM.load("fcam.pt", other)


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_that_cannot_be_read_are_named_at_the_end(workers, workdir, command, capsys):
    """Once each, though seen twice, and also where another process reads them."""
    Path("data/a/text.jpg").write_text("no picture")
    complete = Path("data/b/1.png").read_bytes()
    Path("data/b/cut.png").write_bytes(complete[:300])
    Path("data/b/sum.png").write_bytes(complete.replace(b"IDAT", b"IDAt"))  # PIL: SyntaxError
    assert run(*command, "--epochs", 2, "--workers", workers, "--cache", "maps") == 0
    captured = capsys.readouterr()
    notes = captured.err.splitlines()
    assert notes[0] == "captum-ext: note: 3 of 9 pictures were left out:"
    for note, name in zip(notes[1:], ("a/text.jpg", "b/cut.png", "b/sum.png"), strict=True):
        assert note.startswith(f"captum-ext: note: 'data/{name}' cannot be read as an image")
    assert "6 of 3 classes" in captured.out
    assert Path("fcam.pt").is_file()


def test_no_picture_can_be_read(workdir, command, capsys):
    for path in Path("data").rglob("*.png"):
        path.write_bytes(b"")
    assert run(*command) == 2
    message = one_line(capsys)
    assert "none of the 6 pictures can be read; the first: 'data/a/0.png' cannot be read" in message
    assert not Path("fcam.pt").exists()


def test_the_librarys_warnings_are_notes(workdir, command, capsys, monkeypatch):
    monkeypatch.setattr(fit, "COLLAPSED_LOSS", -1.0)
    assert run(*command) == 0
    assert "The decoder has learned nothing" in one_line(capsys, "note")


def test_pictures_are_upright_and_in_rgb(workdir):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("L", (40, 20)).save("data/a/0.jpg", exif=exif)
    picture, label = PictureFolder("data")[0]
    assert (picture.size, picture.mode, label) == ((20, 40), "RGB", 0)


# --- the settings --------------------------------------------------------------------------------


def test_defaults_are_those_of_fit_fcam(resnet, workdir, fit_arguments):
    model = ("--model", "resnet18", "--weights", resnet, "--device", "cpu")
    assert run("train-fcam", "data", *model) == 0
    parameters = inspect.signature(fit_fcam).parameters
    for name in train_fcam._FLAGS:
        assert fit_arguments[name] == parameters[name].default
    assert "trainer" not in fit_arguments
    assert type(fit_arguments["guide"]) is LayerTokenGradCam
    assert fit_arguments["guide"].layer is fit_arguments["classifier"].layer4
    assert fit_arguments["layers"] == ["relu", "layer1", "layer2", "layer3", "layer4"]


def test_paper_takes_the_papers_settings(workdir, command, fit_arguments):
    with_size = command[: command.index("--size")]
    assert run(*with_size, "--paper", "--epochs", 7) == 0
    assert {name: fit_arguments[name] for name in PAPER} == {**PAPER, "n_epochs": 7}


def test_every_option_reaches_fit_fcam(workdir, command, fit_arguments):
    options_given = {"resize": 72, "n_epochs": 2, "batch_size": 5, "seed": 9, "num_workers": 1}
    options = [str(a) for n, v in options_given.items() for a in (train_fcam._FLAGS[n], v)]
    folders = ("--checkpoints", "run", "--cache", "maps", "--devices", "2")
    guide = ("--guide", "Score_CAM", "--layer", "layer3")
    assert run(*command, *options, *folders, *guide, "--output", "d.pth") == 0
    options_given |= {"size": 64, "checkpoints": "run", "cache": "maps", "trainer": {"devices": 2}}
    assert {name: fit_arguments[name] for name in options_given} == options_given
    assert isinstance(fit_arguments["guide"], LayerScoreCam)
    assert fit_arguments["guide"].layer is fit_arguments["classifier"].layer3
    assert fit_arguments["guide_kwargs"] == {"perturbations_per_eval": 16}
    assert Path("d.pth").is_file()


def test_pictures_are_normalised_as_the_model_expects(
    workdir, command, fit_arguments, monkeypatch, resnet
):
    loaded = zoo.load_model("resnet18", resnet)
    preprocess = zoo.Preprocess(256, 224, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    other = zoo.LoadedModel("net", loaded.module, preprocess, loaded.categories, "layer4")
    monkeypatch.setattr(zoo, "load_model", lambda *_: other)
    assert run(*command) == 0
    assert fit_arguments["normalize"] == (preprocess.mean, preprocess.std)


def test_fewer_classes_than_the_classifier_has_are_noted(workdir, command, fit_arguments, capsys):
    shutil.rmtree("data/c")
    assert run(*command) == 0
    message = one_line(capsys, "note")
    assert "has 2 classes and resnet18 3" in message
    assert "a for class 0 (0) to b for class 1 (1)" in message


def test_only_the_first_process_writes_files_and_messages(
    workdir, command, fit_arguments, capsys, monkeypatch
):
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    assert run(*command, "--devices", 2) == 0
    assert capsys.readouterr() == ("", "")
    assert not Path("fcam.pt").exists()


def test_unreadable_pictures_of_other_processes_are_counted(workdir, monkeypatch):
    def gather(of_processes, indices):
        of_processes[:] = [indices, {0, 4}]

    folder = PictureFolder("data")
    folder.is_unreadable[2] = True
    assert folder.unreadable_indices() == [2]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert folder.unreadable_indices() == [0, 2, 4]


# --- stopped trainings ---------------------------------------------------------------------------


def stop_in_epoch(monkeypatch, epoch, action):
    """Call `action` in the first step of an epoch."""
    step = training.FCAMModule.training_step

    def stopped(self, batch, batch_idx):
        return action() if self.current_epoch == epoch else step(self, batch, batch_idx)

    monkeypatch.setattr(training.FCAMModule, "training_step", stopped)


def interrupt():
    signal.raise_signal(signal.SIGINT)


def test_the_same_command_resumes_after_ctrl_c(resnet, workdir, command, capsys):
    command = (*command, "--epochs", 4, "--checkpoints", "run")
    for epoch in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            stop_in_epoch(patch, epoch, interrupt)
            assert run(*command) == 130
        message = one_line(capsys, "stopped")
        assert "interrupted; the same command resumes from run/last.ckpt" in message
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert not Path("fcam.pt").exists()
    assert run(*command) == 0
    assert "went on   from run/last.ckpt" in capsys.readouterr().out
    classifier = zoo.load_model("resnet18", resnet).module
    resumed = FCAM.load("fcam.pt", classifier).decoder.state_dict()
    assert equal(resumed, straight(resnet, n_epochs=4).decoder.state_dict())


def test_a_terminated_training_does_not_end_as_if_it_were_complete(
    workdir, command, capsys, monkeypatch
):
    """Lightning raises a SystemExit without a code, which Python takes for 0."""
    stop_in_epoch(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGTERM))
    assert run(*command, "--epochs", 2, "--checkpoints", "run") == 143
    message = one_line(capsys, "stopped")
    assert "terminated; the same command resumes from run/last.ckpt" in message
    assert not Path("fcam.pt").exists()


def test_ctrl_c_without_checkpoints(workdir, command, capsys, monkeypatch):
    stop_in_epoch(monkeypatch, 0, interrupt)
    assert run(*command) == 130
    assert one_line(capsys, "stopped") == "captum-ext: stopped: interrupted\n"
    assert [p.name for p in workdir.iterdir()] == ["data"]


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_loss_that_is_not_finite_names_the_last_checkpoint(
    epoch, workdir, command, capsys, monkeypatch
):
    step = training.partial_cross_entropy
    calls = iter([1.0, 1.0] * epoch + [torch.nan])
    monkeypatch.setattr(training, "partial_cross_entropy", lambda *a: next(calls) * step(*a))
    assert run(*command, "--epochs", 2, "--checkpoints", "run") == 2
    message = one_line(capsys)
    assert f"The loss is not finite in epoch {epoch}, batch 0 (seeds nan" in message
    assert ("The last checkpoint is run/last.ckpt" in message) == (epoch == 1)
    assert not Path("fcam.pt").exists()


def test_folders_of_another_run_are_refused(workdir, command, capsys):
    command = (*command, "--checkpoints", "run", "--cache", "maps")
    assert run(*command) == 0
    capsys.readouterr()
    Path("fcam.pt").unlink()
    assert run(*command, "--seed", 1) == 2
    assert "--checkpoints run has another run's: seed was 0 and is 1. Name" in one_line(capsys)
    assert run(*command[:-4], "--cache", "maps", "--guide", "layer-cam") == 2
    assert "--cache maps has the maps of another run: guide was" in one_line(capsys)
    assert not Path("fcam.pt").exists()


@pytest.mark.parametrize(
    ("content", "message"), [(b"text", "'run/last.ckpt' is not a checkpoint"), (None, "is a file")]
)
def test_checkpoints_of_another_format_are_refused(content, message, workdir, command, capsys):
    if content is None:
        Path("run").write_text("a file")
    else:
        Path("run").mkdir()
        Path("run/last.ckpt").write_bytes(content)
    assert run(*command, "--checkpoints", "run") == 2
    assert message in one_line(capsys)


# --- errors that the user can correct -------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guide", "grdcam"], "unknown method 'grdcam'. Closest: grad-cam"),
        (["--guide", "rise"], "unknown method 'rise'. Closest: "),
        (["--model", "resnet1"], "Closest: resnet18"),
        (["--weights", "none.pt"], "'none.pt' does not exist"),
        (["--layer", "layer5"], "Closest: layer"),
        (["--layer", "fc"], "gives the shape (1, 3)"),
        (["--layer", "avgpool"], "grad-cam at layer avgpool of resnet18 gives maps of a single"),
        (["--size", "32"], "grad-cam at layer layer4 of resnet18 gives maps of a single pixel"),
        (["--device", "cuda:99"], "'cuda:99' cannot be used here"),
        (["--output", "a.png"], "ends in .pt or .pth"),
        (["--output", "none/a.pt"], "'none' does not exist: make it first"),
        (["--resize", "16"], "--resize must be at least --size, (64, 64), got (16, 16)"),
        (["--size", "0"], "--size: 0 is not 1 or more"),
        (["--epochs", "many"], "--epochs: invalid integer value: 'many'"),
        (["--workers=-1"], "--workers: -1 is not 0 or more"),
        (["--seed", str(2**32)], "is not 0 to 4294967295"),
        (["--size", "2"], "no spatial features of several resolutions at 2 x 2 pixels"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_wrong_arguments_are_one_line(options, message, workdir, command, capsys):
    assert run(*command, *options) == 2
    assert message in one_line(capsys)
    assert [p.name for p in workdir.iterdir()] == ["data"]


def test_the_model_must_be_named(workdir, capsys):
    assert run("train-fcam", "data") == 2
    assert "--model" in one_line(capsys)


@pytest.mark.parametrize("name", ["none", "empty", "flat", "hollow", "data/a/0.png"])
def test_folders_without_pictures_are_refused(name, workdir, command, capsys):
    Path("empty").mkdir()
    Path("hollow/a").mkdir(parents=True)
    Path("flat").mkdir()
    shutil.copy("data/a/0.png", "flat")
    assert run("train-fcam", name, *command[2:]) == 2
    message = one_line(capsys)
    assert f"the folder {name!r} " in message
    wrong = "a folder of pictures for each class" if Path(name).is_dir() else "does not exist"
    assert wrong in message


def test_more_classes_than_the_classifier_has_are_refused(workdir, command, capsys):
    shutil.copytree("data/a", "data/d")
    assert run(*command) == 2
    assert "'data' has 4 classes, and resnet18 has 3" in one_line(capsys)


def test_a_model_without_spatial_features_is_refused(workdir, command, capsys):
    torch.manual_seed(0)
    torch.save(torchvision.models.vit_b_32(num_classes=N_CLASSES).state_dict(), "vit.pt")
    vit = ("--model", "vit_b_32", "--weights", "vit.pt")
    assert run(*command, *vit) == 2
    assert "vit_b_32 does not take pictures of 64 x 64 pixels (" in one_line(capsys)
    assert run(*command, *vit, "--size", 224) == 2
    assert "vit_b_32 has no spatial features" in one_line(capsys)


def test_a_guide_that_does_not_work_is_refused(workdir, command, capsys):
    net = torchvision.models.mobilenet_v3_small(num_classes=N_CLASSES)
    torch.save(net.state_dict(), "mobilenet.pt")
    model = ("--model", "mobilenet_v3_small", "--weights", "mobilenet.pt")
    assert run(*command, *model, "--guide", "cam") == 2
    assert "cam does not work at layer features of mobilenet_v3_small" in one_line(capsys)


def test_weights_that_are_not_finite_are_refused(resnet, workdir, command, capsys):
    state = torch.load(resnet, weights_only=True)
    state["fc.bias"][0] = torch.nan
    torch.save(state, "nan.pt")
    assert run(*command, "--weights", "nan.pt") == 2
    assert "not finite" in one_line(capsys)


def test_the_weights_file_is_no_output(resnet, workdir, command, capsys):
    before = resnet.read_bytes()
    assert run(*command, "--output", resnet) == 2
    assert "is the weights file" in one_line(capsys)
    assert resnet.read_bytes() == before


def test_too_many_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_devices(2, torch.device("cuda"))
    check_devices(9, torch.device("cpu"))
    with pytest.raises(zoo.InputError, match="--devices 3 are more than the GPUs here, 2"):
        check_devices(3, torch.device("cuda"))
    with pytest.raises(zoo.InputError, match="leave out --device cuda:1"):
        check_devices(2, torch.device("cuda:1"))


def test_too_little_memory_names_the_batch_size(workdir, command, capsys, monkeypatch):
    def full():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    stop_in_epoch(monkeypatch, 0, full)
    assert run(*command) == 2
    assert "a lower --batch-size" in one_line(capsys)


def test_without_lightning_the_extra_is_named(workdir, command, capsys, monkeypatch):
    for name in ("captum_ext.fcam.fit", "captum_ext.fcam.training", "captum_ext._training"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    assert run(*command) == 2
    message = one_line(capsys)
    assert "needs Lightning" in message
    assert 'pip install "captum_ext[train]"' in message


def test_our_own_mistakes_are_not_hidden(workdir, command, monkeypatch):
    def mistake():
        raise ValueError("a bug")

    stop_in_epoch(monkeypatch, 0, mistake)
    with pytest.raises(ValueError, match="a bug"):
        run(*command)


def test_a_full_disk_leaves_the_old_decoder(workdir, command, fit_arguments, capsys, monkeypatch):
    def full(content, file):
        file.write(b"half")
        raise OSError("No space left on device")

    Path("fcam.pt").write_bytes(b"old")
    monkeypatch.setattr(torch, "save", full)
    assert run(*command) == 2
    assert "No space left" in one_line(capsys)
    assert Path("fcam.pt").read_bytes() == b"old"
    assert sorted(p.name for p in workdir.iterdir()) == ["data", "fcam.pt"]


def test_help_imports_no_large_package():
    code = (
        "import sys; from captum_ext.cli import main\n"
        "try: main(['train-fcam', '--help'])\n"
        "finally: print([m for m in ('torch', 'torchvision', 'lightning') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
    assert "--checkpoints DIR" in ran.stdout
