"""`captum-ext evaluate --config`: settings in YAML, methods and metrics with options."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from captum.attr import IntegratedGradients, LayerGradCam

from captum_ext import cli, evaluation, zoo
from captum_ext.attr import FIDO, RISE, AugmentedSR, LayerCam, SESSWrapper
from captum_ext.cli.attributions import find_attributions
from captum_ext.cli.config import read_config
from captum_ext.cli.pictures import PictureFolder
from captum_ext.evaluation import summary
from tests import test_cli_evaluate, test_readme
from tests.evaluation.subjects import exported, forget
from tests.test_cli_evaluate import run

torch.set_num_threads(1)

command, resnet = test_cli_evaluate.command, test_cli_evaluate.resnet


@pytest.fixture
def config(command, resnet):
    """Write a file of settings that starts with those of the model."""

    def write(text):
        model = f"data: data\nmodel: resnet18\nweights: {resnet}\ndevice: cpu\nsize: 32\n"
        Path("run.yaml").write_text(f"{model}{text}\n")
        return ("evaluate", "--config", "run.yaml")

    return write


def refused(capsys, message, *argv):
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("captum-ext: error: ")
    assert message in error
    assert not Path("evaluation").exists()


# --- settings in a file --------------------------------------------------------------------------


def test_a_file_and_flags_give_the_same_rows(command, config, capsys):
    flags = ("--method", "layercam", "--metrics", "average_drop", "--seed", 7, "--output", "a")
    assert run(*command, *flags) == 0
    printed = capsys.readouterr().out
    text = "layer: layer2\nbatch-size: 2\nmethod: [grad-cam, layercam]\nmetrics: average_drop\n"
    assert run(*config(f"{text}seed: 7\noutput: b")) == 0
    assert capsys.readouterr().out == printed.replace("written to a", "written to b")
    for name in ("rows.csv", "settings.json", "summary.md"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()


def test_the_command_line_overrides_the_file(config):
    text = "layer: layer2\nmethod: [grad-cam, cam]\nmetrics: [road]\noutput: a\nseed: 3"
    flags = ("--method", "layercam", "--metrics", "average_drop", "--output", "b")
    assert run(*config(text), *flags) == 0
    assert not Path("a").exists()
    result = summary("b")
    assert list(result.figures) == ["layercam"]
    assert list(result.higher_is_better) == ["average_drop"]
    assert '"seed": 3' in Path("b/settings.json").read_text()


def test_keys_without_a_value_are_ignored(config, capsys):
    text = "layer: layer2\nmethod: grad-cam\nmetrics: average_drop\nsplit:\nbatch-size:"
    assert run(*config(text)) == 0
    assert '"batch_size": 16' in Path("evaluation/settings.json").read_text()


def options_of_evaluate():
    parser = cli._Parser()
    cli.evaluate.add_command(parser.add_subparsers())
    command_line = parser.parse_args(["evaluate"])
    assert vars(command_line).keys() == {"run"}  # options that are not given are not there
    return command_line.run.args[0]


def test_every_flag_has_a_key(capsys):
    assert run("evaluate", "--help") == 0
    flags = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    keys = {option.option_strings[0] for option in options_of_evaluate() if option.option_strings}
    assert flags == keys | {"--config"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 3", "unknown key 'batchsize'. Closest: batch-size"),
        ("config: a.yaml", "unknown key 'config'"),
        ("3: 4", "unknown key 3"),
        ("batch-size: many", "batch-size: expected an integer, got 'many'"),
        ("batch-size: true", "batch-size: expected an integer, got True"),
        ("batch-size: 0", "batch-size: 0 is not 1 or more"),
        ("seed: -1", "seed: -1 is not 0 to 4294967295"),
        ("layer: 2", "layer: expected text, got 2"),
        ("target: labels", "target: expected one of label, predicted, got 'labels'"),
        ("layout: [cub]", "layout: expected text, got ['cub']"),
        ("flagged: 1", "flagged: expected true or false, got 1"),
        ("method: []", "method: expected one or more names, got []"),
        ("method: {}", "method: expected one or more names, got {}"),
        ('method: {"": cam}', "method: expected names of one line, got ''"),
        ("method: {Saliency: {arguments: {target: 1}}}", "multiple values for keyword argument"),
        (
            "method: {IntegratedGradients: {arguments: {return_convergence_delta: true}}}",
            "--method: IntegratedGradients: ['return_convergence_delta'] cannot be given",
        ),
        ("method: [1]", "method: expected one or more names, got [1]"),
        ("size: {a: 1}", "size: expected an integer, got {'a': 1}"),
        ("method: gradcan", "unknown method 'gradcan'. Closest: grad-cam"),
        ("method: IntegratedGradient", "Closest: integrated-gradients"),
        ("method: NeuronGradient", "unknown method 'NeuronGradient'"),
        ("method: ShapleyValues", "unknown method 'ShapleyValues'"),
        ("method: Occlusion", "occlusion does not work on resnet18: "),
        ("method: {a: {methods: cam}}", "method: a: unknown key 'methods'. Closest: method"),
        ("method: {a: {method: [cam]}}", "method: a: method: expected text"),
        ("method: {cam: 3}", "method: cam: expected options of method, layer, arguments"),
        ("method: {cam: {sess: 3}}", "method: cam: sess: expected a mapping, got 3"),
        ("method: {a: cams}", "unknown method 'cams'"),
        ("method: {a: {method: Saliency, layer: conv1}}", "method: a: Saliency takes no layer"),
        ("method: {a: {method: rise, layer: conv1}}", "method: a: RISE takes no layer"),
        ("method: {RISE: {arguments: {n_masks: 0}}}", "RISE does not work on resnet18: `n_masks`"),
        ("method: {RISE: {arguments: {n_masks: 9.5}}}", "RISE does not work on resnet18: `n_masks"),
        ("method: {rise: {arguments: {grids: 3}}}", "rise does not work on resnet18: "),
        ("method: {rise: {arguments: {grid: 33}}}", "`grid` is finer than the inputs"),
        ("method: {F: {method: FIDO, arguments: {n_steps: 0}}}", "F does not work on resnet18: "),
        ("method: {F: {method: FIDO, arguments: {lr: fast}}}", "F does not work on resnet18: "),
        ("method: {a: {method: Saliency, arguments: {ab: 1}}}", "a does not work on resnet18: "),
        ("method: {cam: {sess: {scale: 3}}}", "cam does not work at layer layer4 of resnet18: "),
        ("method: cam\nmetrics: {insertion: {stp: 1}}", "got 'stp'"),
        ("method: cam\nmetrics: {insertion: {step: -1}}", "`step` must be"),
        (
            "method: cam\nmetrics: {pointing_game: {tolerence: 1}}",
            "must be one of ['tolerance'], got 'tolerence'",
        ),
        ("method: cam\nmetrics: {insertions: }", "--metrics must be names of"),
        ("against: cam\nmethod: grad-cam", "--against 'cam' is none of the methods"),
    ],
)
def test_errors_name_the_key(text, message, config, capsys):
    refused(capsys, message, *config(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [("- data", "must have lines `flag: value`"), ("a: [", "is not YAML: "), ("a: \0", "not YAML")],
)
def test_a_file_of_another_format_is_refused(text, message, config, capsys):
    argv = config("")
    Path("run.yaml").write_text(text)
    refused(capsys, message, *argv)


def doublings(first, following):
    """Nine aliases, of nine aliases, and so on: eight lines that stand for 43 million values."""
    names = list(zip("abcdefg", "bcdefgh", strict=True))
    lines = [following.format(name=b, aliases=",".join(9 * [f"*{a}"])) for a, b in names]
    return "\n".join([first, *lines])


FOREIGN = {
    "billion laughs": doublings("a: &a [x,x,x,x,x,x,x,x,x]", "{name}: &{name} [{aliases}]"),
    "merged keys": doublings("a: &a {k: v}", "{name}: &{name} {{<<: [{aliases}]}}"),
    "inside itself": "a: &a [*a]",
    "3,000 deep": "[" * 3000,
    "3,000 deep and closed": "method: " + "[" * 3000 + "]" * 3000,
    "100 deep": "method: " + "{a: " * 100 + "1" + "}" * 100,
    "too long": "size: 3\n" * 10_000,
    "long value": "x" * 60_000,
    "long key": f"? {'x' * 60_000}\n: 3",
    "long alias": "a: *" + "b" * 60_000,
    "long number": "size: " + "9" * 10_000,
    "long name of a method": "method: {x: {method: [" + "y" * 60_000 + "]}}",
    "long metric": "metrics: {insertion: [" + "y" * 60_000 + "]}",
    "long folder": "output: " + "y" * 60_000,
    "no date": "size: 2020-99-99",
    "no integer": "size: !!int x",
    "no bool": "flagged: !!bool x",
    "code": "a: !!python/object/apply:os.system [id]",
}


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_files_of_any_size_and_depth_are_refused_in_few_words(text, config, resnet, capsys):
    argv = config("method: grad-cam")
    Path("run.yaml").write_text(text)
    assert run("evaluate", "data", "--model", "resnet18", "--weights", str(resnet), *argv[1:]) == 2
    error = capsys.readouterr().err
    assert error.startswith("captum-ext: error: ")
    assert error.count("\n") == 1
    assert len(error) < 4200


def test_aliases_and_merged_keys_may_be_used(config):
    config("method: grad-cam")
    text = "method: {a: &a {method: cam}, b: {<<: *a, layer: layer2}}\n"
    Path("run.yaml").write_text(text)
    settings = read_config("run.yaml", options_of_evaluate(), ("method", "metrics"))
    assert settings == {
        "method": {"a": {"method": "cam"}, "b": {"method": "cam", "layer": "layer2"}}
    }


def test_a_missing_file_is_refused(config, capsys):
    config("")
    refused(capsys, "nowhere.yaml", "evaluate", "--config", "nowhere.yaml")


def test_settings_missing_in_the_file_are_named(config, capsys):
    config("")
    Path("run.yaml").write_text("size: 32")
    message = "the following arguments are required: DATA, --model"
    refused(capsys, message, "evaluate", "--config", "run.yaml")


# --- methods and metrics with options ------------------------------------------------------------


def test_wrappers_and_options_are_those_of_the_library(config, resnet):
    text = """
layer: layer2
seed: 3
method:
  grad-cam:
  early: {method: Layer_CAM, layer: layer1}
  fine: {method: grad-cam, sess: {window: 32, scales: [40], smooth: false}}
  moved: {method: grad-cam, augmented-sr: {n_augmentations: 2}}
  IG: {method: IntegratedGradients, arguments: {n_steps: 3}}
metrics: {insertion: {step: 0.5}, average_drop: }
"""
    assert run(*config(text)) == 0
    loaded = zoo.load_model("resnet18", resnet)
    net = loaded.module
    cam = LayerGradCam(net, net.layer2)
    positive = {"relu_attributions": True}
    generator = torch.Generator().manual_seed(3)
    straight = {
        "grad-cam": (cam, positive),
        "early": (LayerCam(net, "layer1"), positive),
        "fine": (SESSWrapper(cam, window=32, scales=[40], smooth=False), positive),
        "moved": (AugmentedSR(cam, n_augmentations=2, generator=generator), positive),
        "IG": (IntegratedGradients(net), {"n_steps": 3, "internal_batch_size": 16}),
    }
    metrics = {"insertion": {"step": 0.5}, "average_drop": {}}
    options = {"size": 32, "seed": 3, "output": "straight", "show_progress": False}
    result = evaluation.evaluate(straight, PictureFolder("data"), metrics, **options)
    assert summary("evaluation").figures == result.figures
    assert len({str(figures) for figures in result.figures.values()}) == 5  # five different maps


def test_rise_and_fido_with_arguments(config, resnet):
    text = """
layer: layer2
method:
  RISE: {arguments: {n_masks: 30, grid: [3, 4], p: 0.4, baselines: blur, perturbations_per_eval: 9}}
  wide: {method: rise, arguments: {n_masks: 30, tolerance: 0.1}, sess: {window: 32, scales: [40]}}
  FIDO: {arguments: {n_steps: 2, n_masks: 1, baselines: mean}}
metrics: average_drop
"""
    assert run(*config(text)) == 0
    net = zoo.load_model("resnet18", resnet).module
    few = {"n_masks": 30, "grid": (3, 4), "p": 0.4, "baselines": "blur"}
    straight = {
        "RISE": (RISE(net), {**few, "perturbations_per_eval": 9}),
        "wide": (
            SESSWrapper(RISE(net), window=32, scales=[40]),
            {"n_masks": 30, "tolerance": 0.1, "perturbations_per_eval": 16},
        ),
        "FIDO": (
            FIDO(net),
            {"n_steps": 2, "n_masks": 1, "baselines": "mean", "internal_batch_size": 16},
        ),
    }
    options = {"size": 32, "output": "straight", "show_progress": False}
    result = evaluation.evaluate(straight, PictureFolder("data"), ["average_drop"], **options)
    assert summary("evaluation").figures == result.figures
    assert len({str(figures) for figures in result.figures.values()}) == 3


def test_trials_of_slow_methods_are_short(command, monkeypatch):
    """Only the trial has one mask or step; the evaluation has all of them."""
    trials = []

    def keep(arguments, attributions, source, loaded):
        for _, kwargs in attributions.values():
            assert kwargs.get("n_masks", 1000) == 1000
        raise KeyboardInterrupt

    def counted(name, cls):
        original = cls.attribute

        def attribute(self, inputs, *args, **kwargs):
            trials.append((name, kwargs.get("n_masks"), kwargs.get("n_steps")))
            return original(self, inputs, *args, **kwargs)

        attribute.__signature__ = inspect.signature(original)
        monkeypatch.setattr(cls, "attribute", attribute)

    counted("RISE", RISE)
    counted("FIDO", FIDO)
    monkeypatch.setattr(cli.evaluate, "run_evaluation", keep)
    assert run(*command, "--method", "rise", "FIDO") == 130
    assert trials == [("RISE", 1, None), ("FIDO", 1, 1)]


def test_a_run_with_random_copies_resumes(config, capsys):
    text = "layer: layer2\nbatch-size: 1\nmetrics: average_drop\nmethod:\n"
    argv = config(f"{text}  moved: {{method: grad-cam, augmented-sr: {{n_augmentations: 2}}}}")
    assert run(*argv) == 0
    before = exported(Path("evaluation"))
    assert forget(Path("evaluation"), "number > 0") == 2
    assert run(*argv) == 0
    assert exported(Path("evaluation")) == before


def test_classes_of_captum_on_the_command_line(command):
    flags = ("--metrics", "average_drop", "--output", "run")
    assert run(*command, "--method", "Saliency", *flags) == 0
    assert list(summary("run").figures) == ["grad-cam", "saliency"]


def test_names_are_found_in_any_spelling_and_once():
    result = find_attributions(["Grad_CAM", "gradcam", "Saliency", "Saliency"])
    assert [request.name for request in result] == ["grad-cam", "saliency"]
    rise = find_attributions(["RISE", "rise", "FIDO"])
    assert [request.name for request in rise] == ["rise", "fido"]
    default = [method.name for method in cli.methods.default_methods()]
    assert [request.name for request in find_attributions(None)] == default


def test_the_readmes_file_can_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"```\n(data: .*?)```", test_readme.README, re.DOTALL)
    Path("run.yaml").write_text(text)
    settings = read_config("run.yaml", options_of_evaluate(), ("method", "metrics"))
    assert settings["batch_size"] == 32
    assert list(settings["metrics"]) == ["localization", "insertion"]
    requests = find_attributions(settings["method"])
    assert [request.name for request in requests] == ["grad-cam", "layer3", "SESS", "IG"]
    assert requests[2].wrappers == {"sess": {"n_scales": 6}}
    assert requests[3].arguments == {"n_steps": 20}


# --- the summary again ---------------------------------------------------------------------------


def test_a_run_is_summarized_again_against_another_method(command, capsys):
    flags = ("--method", "layercam", "--metrics", "average_drop", "--output", "run")
    assert run(*command, *flags) == 0
    rows = Path("run/rows.csv").read_bytes()
    capsys.readouterr()
    again = ("evaluate", "--summarize", "--output", "run", "--against", "layercam")
    assert run(*again) == 0
    result = summary("run", against="layercam")
    assert capsys.readouterr().out == f"{result.markdown()}\nwritten to run\n"
    assert Path("run/summary.md").read_text() == result.markdown()
    assert "less layercam" in result.markdown()
    assert Path("run/rows.csv").read_bytes() == rows
    assert run(*command, *flags, "--against", "Layer_CAM") == 0
    assert result.markdown() in capsys.readouterr().out
    assert run(*again[:-1], "cam") == 2
    assert "--against must be one of ['grad-cam', 'layercam']" in capsys.readouterr().err


def test_a_missing_run_cannot_be_summarized(command, capsys):
    message = "there is no run in --output evaluation"
    refused(capsys, message, "evaluate", "--summarize")
