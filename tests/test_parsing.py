"""Options from command lines and YAML files."""

import re
from dataclasses import dataclass
from typing import Literal

import pytest

from ddae_hf.commands.parsing import parse, read_config
from ddae_hf.experiments.options import Options, Table, option


@dataclass(kw_only=True)
class Some(Options):
    """Options of every kind."""

    batch_size: int = option(250, "Images at a time.")
    learning_rate: float = option(1e-3, "Rate, 5 % of it.")
    sigmas: list[float] = option([0.1, 0.2], "Levels.")
    log_sigma: list[float] | None = option(None, "Mean and deviation.")
    layers: list[str] = option(["decoder"], "Layers.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "Precision.")
    random_flip: bool | None = option(None, "Mirror half of them.")
    center_crop: bool = option(True, "Cut squares.")
    push_to_hub: bool = option(False, "Push it.")
    name: str | None = option(None, "Its name.")
    denoiser: Table = option(Table(), "Its network.")
    few_labels: list[int] = option([], "Labels a class.")
    l2: list[float] = option([], "Strengths.", nargs="*")

    def check(self):
        if self.name == "wrong":
            raise ValueError("name is 'wrong': give another.")


@dataclass(kw_only=True)
class More(Options):
    model_name_or_path: str = option(help="Checkpoint.")


def some(*words):
    (found,) = parse([Some], "What it does.", [str(word) for word in words])
    return found


def refused(capsys, *words, kinds=(Some,)):
    """Return the message that ends the program, which is no traceback."""
    with pytest.raises(SystemExit) as stopped:
        parse(kinds, "What it does.", [str(word) for word in words])
    assert stopped.value.code == 2
    return capsys.readouterr().err.split("error: ")[-1]


@pytest.fixture
def config(tmp_path):
    def write(text, name="config.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_options_of_every_kind_come_from_words():
    assert some() == Some()
    found = some(
        *("--batch_size", 3, "--learning-rate", "5e-4", "--sigmas", 1, 2, "--log_sigma", "-1.2", "1.2"),
        *("--layers", "all", "--mixed_precision", "bf16", "--name", "x", "--denoiser", "{a: 1e-4, b: [x]}"),
    )
    assert (found.batch_size, found.learning_rate, found.sigmas) == (3, 5e-4, [1.0, 2.0])
    assert (found.log_sigma, found.layers, found.mixed_precision, found.name) == ([-1.2, 1.2], ["all"], "bf16", "x")
    assert found.denoiser == {"a": 1e-4, "b": ["x"]}
    first, second = parse([Some, More], None, ["--model_name_or_path", "here", "--batch_size", "2"])
    assert (first.batch_size, second.model_name_or_path) == (2, "here")


@pytest.mark.parametrize("name", ["random_flip", "center_crop", "push_to_hub"])
def test_flags_are_turned_on_and_off_in_every_way(name, config):
    dashed = name.replace("_", "-")
    for words in ([f"--{name}"], [f"--{name}", "true"], [f"--{dashed}"]):
        assert getattr(some(*words), name) is True
        assert getattr(some("--config", config(f"{name}: false"), *words), name) is True
    for words in ([f"--no-{name}"], [f"--{name}", "false"], [f"--no-{dashed}"]):
        assert getattr(some(*words), name) is False
        assert getattr(some("--config", config(f"{name}: true"), *words), name) is False
    assert getattr(some("--config", config(f"{name}: true")), name) is True
    assert getattr(some("--config", config(f"{name}: false")), name) is False


def test_a_file_gives_way_to_the_command_line(config):
    path = config(
        "learning_rate: 5e-4\nbatch_size: 7\nsigmas: [1, 2e0]\nlayers: all\nmixed_precision: no\nname: 12\n"
        "log_sigma: [-1.2, 1.2]\ndenoiser: {a: 1, dropout: 1e-4}\n"
    )
    found = some("--config", path, "--batch_size", 3)
    assert (found.learning_rate, found.batch_size, found.sigmas, found.layers) == (5e-4, 3, [1.0, 2.0], ["all"])
    assert (found.mixed_precision, found.name, found.log_sigma) == ("no", "12", [-1.2, 1.2])
    assert found.denoiser == {"a": 1, "dropout": 1e-4} and isinstance(found.denoiser, Table)
    assert some(f"--config={path}").batch_size == 7
    (more,) = parse([More], None, ["--config", str(config("model_name_or_path: there", "more.yaml"))])
    assert more.model_name_or_path == "there"  # it need not be in the command line then
    assert some("--config", config("batch_size: null")).batch_size == 250


def test_the_options_that_a_run_left_are_a_configuration(config):
    """Those of 0.2.0 name the configuration that it took, whose options they hold."""
    path = config("config: gone.yaml\nbatch_size: 7", "training_options.yaml")
    assert some("--config", path).batch_size == 7


def test_a_configuration_takes_over_what_its_base_says(config):
    config("seed: 1\nsteps: 3\ndenoiser: {_class_name: A, v: 1, w: 1}\nscheduler: {_class_name: A, x: 1}", "a")
    config("base: a\nseed: 2\ndenoiser: {v: 2}\nscheduler: {_class_name: A, y: 2}", "b")
    path = config("base: [b]\nscheduler: {_class_name: B, z: 3}\ndenoiser:\n  u: 5", "c")
    assert read_config(path) == {
        "seed": 2,
        "steps": 3,
        "denoiser": {"_class_name": "A", "v": 2, "w": 1, "u": 5},
        "scheduler": {"_class_name": "B", "z": 3},
    }
    assert read_config(path.with_name("b"))["scheduler"] == {"_class_name": "A", "x": 1, "y": 2}


@pytest.mark.parametrize(
    "text, message",
    [
        ("batch_siz: 3", "there is no option 'batch_siz': the nearest is batch_size"),
        ("batch_size: 3\nbatch_size: 4", "'batch_size' comes twice"),
        ("denoiser: {a: 1, a: 2}", "'a' comes twice"),
        ("denoiser: &d {a: 1}\nname: *d", "aliases"),
        ("batch_size: 0", "batch_size is 0: it must be at least 1"),
        ("batch_size: many", "batch_size is 'many': it must be a whole number"),
        ("batch_size: [1, 2]", "batch_size is [1, 2]: it must be a whole number"),
        ("batch_size: true", "batch_size is True: it must be a whole number"),
        ("learning_rate: .nan", "learning_rate is nan: it must be finite"),
        ("learning_rate: fast", "learning_rate is 'fast': it must be a number"),
        ("sigmas: [0.1, x]", "sigmas is 'x': it must be a number"),
        ("mixed_precision: fp8", "allowed are no, fp16, bf16"),
        ("mixed_precision: yes", "allowed are no, fp16, bf16"),
        ("push_to_hub: 1", "push_to_hub is 1: it must be true or false"),
        ("push_to_hub: 'yes'", "push_to_hub is 'yes': it must be true or false"),
        ("denoiser: 3", "denoiser: '3' is not a mapping"),
        ("name: 1e5", "name is 100000.0: it must be text"),
        ("name: {a: 1}", "name is {'a': 1}"),
        ("name: wrong", "name is 'wrong': give another."),
        ("config: other.yaml", "there is no option 'config'"),
        ("labels_per_class: 10", "there is no option 'labels_per_class' any more: give few_labels."),
        ("[1, 2]", "must hold options, `name: value`, but holds a list"),
        ("just text", "but holds a str"),
        ("a: [1", "cannot be read"),
        ("base: missing.yaml", "missing.yaml: there is no such file (named as the base of"),
        ("base: config.yaml", "names itself as its base"),
        ("base: [3]", "base is [3]: it must name files"),
        ("base: {a: 1}", "it must name files"),
    ],
)
def test_a_wrong_file_ends_the_program_with_a_sentence(config, capsys, text, message):
    assert message in refused(capsys, "--config", config(text))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--batch_size", "0"], "batch_size is 0: it must be at least 1."),
        (["--learning_rate", "nan"], "learning_rate is nan"),
        (["--batch_size", "1.5"], "invalid int value: '1.5'"),
        (["--conf", "x.yaml"], "there is no option 'conf': the nearest is config"),
        (["--batch", "3"], "there is no option 'batch': the nearest is batch_size"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: there is no such file."),
        (["--config"], "expected one argument"),
        (["--mixed_precision", "fp8"], "invalid choice"),
        (["--push_to_hub", "perhaps"], "perhaps"),
        (["--denoiser", "[1]"], "denoiser: '[1]' is not a mapping: give options, such as"),
        (["--denoiser", "{a: 1, a: 2}"], "'a' comes twice"),
        (["--name", "wrong"], "name is 'wrong': give another."),
        (["--labels-per-class", "10"], "there is no option 'labels_per_class' any more: give few_labels."),
        (["--regularisation=0.1"], "there is no option 'regularisation' any more: give l2"),
        (["3"], "there is no option '3'"),
    ],
)
def test_wrong_words_end_the_program_with_a_sentence(capsys, words, message):
    assert message in refused(capsys, *words)


def test_what_has_no_default_must_be_given(capsys):
    assert "required: --model_name_or_path" in refused(capsys, kinds=[More])


def test_help_tells_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        some("--help")
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert stopped.value.code == 0 and "What it does." in text
    for words in (
        "Images at a time. (default: 250)",
        "Rate, 5 % of it. (default: 0.001)",
        "Levels. (default: [0.1, 0.2])",
        "Push it. (default: False)",
        "Cut squares. (default: True)",
        "{no,fp16,bf16}",
        "--config CONFIG",
    ):
        assert words in text, words


def test_a_list_may_be_empty_where_its_option_says_so(config, capsys):
    assert some("--l2").l2 == [] == some("--config", config("l2: []")).l2
    assert "expected at least one argument" in refused(capsys, "--few_labels")
