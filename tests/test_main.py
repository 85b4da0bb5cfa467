"""The program `ddae`: its commands, what it refuses, and how it starts."""

import ast
import importlib
import os
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest

import ddae_hf
from ddae_hf import __main__ as module
from ddae_hf.commands import main as program
from ddae_hf.commands import running
from ddae_hf.experiments.libraries import not_installed

ROOT = Path(__file__).parent.parent


def python(code, *words, status=0, **environment):
    """What a new process prints that runs this code with these words, without the settings of these tests' threads."""
    inherited = {name: value for name, value in os.environ.items() if name not in {*program.WAITING, "OMP_NUM_THREADS"}}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout


def refused(*words):
    with pytest.raises(SystemExit) as stopped:
        program.main(words)
    return stopped.value.code


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_help_lists_every_command_with_a_line(words, capsys):
    program.main(words)
    said = capsys.readouterr().out.splitlines()
    for name, line in program.COMMANDS.items():
        assert sum(shown.split() == [name, *line.split()] for shown in said) == 1
    assert max(map(len, said)) <= 100


def test_commands_are_the_modules_of_the_package():
    shared = {"main", "running", "parsing"}
    files = {path.stem for path in Path(program.__file__).parent.glob("[!_]*.py")} - shared
    assert {name.replace("-", "_") for name in program.COMMANDS} == files


@pytest.mark.parametrize("name", sorted(set(program.COMMANDS) - {"demo"}))
def test_a_command_has_options_a_description_and_a_function(name, capsys):
    command = importlib.import_module(f"ddae_hf.commands.{name.replace('-', '_')}")
    assert command.KINDS and all(map(is_dataclass, command.KINDS)) and callable(command.main)
    with pytest.raises(SystemExit) as stopped:
        program.main([name.replace("-", "_"), "--help"])  # which goes by both spellings
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: ddae {name} [options]\n\n{command.__doc__.partition(chr(10))[0]}\n")
    assert f"ddae {name} " in command.__doc__ or name == "quickstart"


def test_an_unknown_command_is_refused_with_the_nearest(capsys):
    everything = ", ".join(program.COMMANDS)
    for word, near in (("pretrian", "pretrain, transfer"), ("xyzzy", everything), ("--configs", "configs")):
        assert refused(word) == 2
        assert capsys.readouterr().err == f"ddae: there is no command {word!r}. The nearest: {near}.\n"


def test_the_version_is_that_of_the_package(capsys):
    program.main(["--version"])
    assert capsys.readouterr().out == f"ddae_hf {ddae_hf.__version__}\n"


def test_what_takes_long_is_shared():
    alone = {"quickstart", "correspondence", "ema", "convert", "demo", "configs"}
    assert set(program.SHARED) == program.COMMANDS.keys() - alone


@pytest.mark.parametrize("name", program.COMMANDS)
def test_several_processes_share_the_commands_that_are_made_for_them_alone(name, monkeypatch):
    started = []
    monkeypatch.setattr(running, "run_command", lambda command, words: started.append((command, words)))
    monkeypatch.setattr(importlib, "import_module", lambda module, package: module)
    monkeypatch.setenv("WORLD_SIZE", "2")
    if name in program.SHARED:
        program.main([name, "--seed", "1"])
        assert started == [(f".{name.replace('-', '_')}", ["--seed", "1"])]
    else:
        said = refused(name)
        assert said.startswith(f"ddae {name} runs as one process, but 2 were launched") and not started
    monkeypatch.setenv("WORLD_SIZE", "1")
    started.clear()
    program.main([name])
    assert len(started) == 1


@pytest.mark.parametrize(("name", "extra"), [("sweep", "experiments"), ("demo", "demo")])
def test_a_missing_library_is_named_with_what_installs_it(name, extra, monkeypatch):
    def missing(library):
        def importing(*module):
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)

        monkeypatch.setattr(importlib, "import_module", importing)

    missing("a_library.of_parts")
    assert refused(name) == not_installed(f"ddae {name}", "a_library.of_parts", extra)
    missing("ddae_hf.experiments.gone")  # a fault of this package
    with pytest.raises(ModuleNotFoundError):
        program.main([name])


def test_every_extra_that_is_named_exists():
    setup = next(node.value for node in ast.parse((ROOT / "setup.py").read_text()).body if isinstance(node, ast.Expr)
                 and isinstance(node.value, ast.Call))  # fmt: skip
    options = {option.arg: option.value for option in setup.keywords}
    extras = {ast.literal_eval(key) for key in options["extras_require"].keys}
    assert {"experiments", *program.EXTRAS.values()} <= extras
    assert ast.literal_eval(options["entry_points"]) == {"console_scripts": ["ddae = ddae_hf.commands.main:run"]}
    assert module.run is program.run  # `python -m ddae_hf` is the same program


@pytest.fixture
def start(monkeypatch):
    """Call `run` with these words in this environment, and return how the program was started: anew, or here."""

    def start(*words, **environment):
        for name in (*program.WAITING, "OMP_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        seen = []
        monkeypatch.setattr(sys, "argv", ["ddae", *words])
        monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "ddae_hf", *words])
        monkeypatch.setattr(os, "execv", lambda path, command: seen.append((path, command)))
        monkeypatch.setattr(program, "main", lambda words: seen.append("here"))
        program.run()
        policy = os.environ.get("OMP_WAIT_POLICY")
        return seen, policy

    return start


@pytest.mark.skipif(sys.platform != "linux", reason="only there does the program start itself again")
def test_a_command_starts_itself_again_unless_its_user_has_said_how_threads_wait(start):
    (anew, *_), policy = start("sweep", "--knn")
    assert anew == (sys.executable, [sys.executable, "-m", "ddae_hf", "sweep", "--knn"]) and policy == "PASSIVE"
    assert start("sweep", OMP_WAIT_POLICY="ACTIVE") == (["here"], "ACTIVE")
    assert start("sweep", GOMP_SPINCOUNT="1000") == (["here"], None)
    assert start("sweep", OMP_NUM_THREADS="1") == (["here"], None)
    for words in ([], ["-h"], ["--help"], ["sweep", "--help"], ["--version"]):
        assert start(*words) == (["here"], None)
    assert start("sweep", OMP_NUM_THREADS="2")[1] == "PASSIVE"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only there does the program start itself again")
def test_a_real_process_starts_itself_again_once():
    code = "import os; from ddae_hf.commands.main import run; "
    code += "print(os.getpid(), os.environ.get('OMP_WAIT_POLICY'), flush=True); run()"
    first, second = python(code, "nothing", status=2).splitlines()  # which is no command
    assert first.split()[1] == "None" and second.split() == [first.split()[0], "PASSIVE"]


def test_help_loads_no_library_that_the_package_does_not():
    code = "import sys, ddae_hf; before = {*sys.modules}; sys.argv = ['ddae', '--help']; "
    code += "from ddae_hf.commands.main import run; run(); print(sorted({*sys.modules} - before))"
    loaded = ast.literal_eval(python(code).splitlines()[-1])
    assert {"ddae_hf.commands", "ddae_hf.commands.main"} <= set(loaded)
    assert {name.partition(".")[0] for name in loaded} - {"ddae_hf"} <= sys.stdlib_module_names
    assert not [name for name in loaded if name.startswith("ddae_hf.experiments")]
