"""What is said where a library is missing."""

from importlib import metadata

import pytest

from ddae_hf.experiments.libraries import not_installed, pip_line, requirements

LINES = [
    "torch>=2.11",
    "datasets>=4.8; extra == \"experiments\"",
    "scikit-learn<2,>=1.6; extra == 'experiments'",
    "tqdm ; extra == \"experiments\"",
    "tqdm; extra == \"demo\"",
    "a.library[parts]>=6; extra == \"demo\"",
]  # fmt: skip


@pytest.fixture
def installed(monkeypatch):
    """Names of the libraries that are installed, to be changed."""
    there = {"torch", "datasets", "scikit-learn", "tqdm", "a-library"}

    def version(name):
        if name not in there:
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: LINES)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"sklearn": ["scikit_learn"], "a": ["A_Library"]})
    return there


def test_everything_of_an_extra_that_is_missing_is_in_one_line(installed):
    installed -= {"datasets", "scikit-learn", "a-library"}
    said = not_installed("ddae sweep", "sklearn.svm", "experiments")
    line = 'pip install "datasets>=4.8" "scikit-learn<2,>=1.6"'
    assert said == f"ddae sweep needs sklearn.svm, which is not installed: {line}"
    assert pip_line("demo", "a.page") == 'pip install "a.library[parts]>=6"'
    installed -= {"torch", "tqdm"}
    assert pip_line("demo", "torch") == 'pip install "torch>=2.11" tqdm "a.library[parts]>=6"'


def test_where_nothing_is_missing_the_modules_own_library_is_named(installed):
    assert pip_line("experiments", "sklearn.svm") == 'pip install "scikit-learn<2,>=1.6"'
    assert pip_line("demo", "a") == 'pip install "a.library[parts]>=6"'
    assert pip_line("experiments", "other.parts") == "pip install other"


def test_without_metadata_the_module_is_named(installed, monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert pip_line("demo", "gradio.blocks") == "pip install gradio"


@pytest.mark.parametrize("extra", ["experiments", "demo", "inception"])
def test_the_extras_of_this_package_are_read(extra):
    found = requirements(extra)
    assert {"torch", "datasets", "scikit-learn"} <= found.keys() and found["torchmetrics"].startswith("torchmetrics>=")
    assert ("gradio" in found, "torch-fidelity" in found) == (extra == "demo", extra == "inception")
    assert "pytest" not in found
