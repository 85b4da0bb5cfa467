"""What documents, docstrings and messages name is there: commands and their options, files, rooms, headings."""

import ast
import dataclasses
import importlib
import inspect
import json
import re
import shlex
import tokenize
from functools import cache
from pathlib import Path

import pytest

from ddae_hf.commands.main import COMMANDS
from ddae_hf.commands.parsing import find_config, parse

from .test_package import imports

ROOT = Path(__file__).parent.parent
PLACES = ("ddae_hf", "benchmarks", "model_cards", "examples")
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
DOCUMENTS += [path for place in ("docs", *PLACES, ".github") for path in (ROOT / place).rglob("*.md")]
NOTEBOOKS = [*(ROOT / "examples" / "notebooks").glob("*.ipynb")]
MODULES = [path for place in PLACES for path in (ROOT / place).rglob("*.py")]
OTHERS = [ROOT / "Makefile", *(ROOT / "ddae_hf" / "commands" / "configs").rglob("*.yaml")]
OTHERS += (ROOT / ".github").rglob("*.yml")
TEXTS = {path.relative_to(ROOT).as_posix(): path for path in sorted([*DOCUMENTS, *NOTEBOOKS, *MODULES, *OTHERS])}
COMMAND = re.compile(r"(?:^|[\s/(])(?:ddae|-m ddae_hf) +([a-z][\w-]*)(?![\w.])(.*)")
BENCHMARK = re.compile(r"-m benchmarks\.(\w+)(.*)")
# Options of other programs, and `--conf`, by which a docstring says what is no option.
FOREIGN = {"conf", "config_file", "num_cpu_threads_per_process", "num_processes", "multi_gpu", "dynamo_backend"}
FOREIGN |= {"dynamo_use_regional_compilation", "dynamo_use_dynamic", "machine_rank", "main_process_ip"}
FOREIGN |= {"repo_type", "version"}
# Files that commands and benchmarks write, and that lie in checkpoints and Spaces.
WRITTEN = {"training_options.yaml", "pipeline.py", "paper.yaml", "network.yaml", "demo.yaml", "linear_probe.yaml"}


def strings(path):
    """Every text of a module, with what is filled in left as `{}`, and every comment."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts |= {value for value in node.values if isinstance(value, ast.Constant)}
            yield "".join(str(value.value) if isinstance(value, ast.Constant) else "{}" for value in node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts:
            yield inspect.cleandoc(node.value)
    with tokenize.open(path) as file:
        yield from (token.string for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.COMMENT)


@cache
def texts(name):
    """The texts of a file."""
    path = TEXTS[name]
    return tuple(strings(path)) if path.suffix == ".py" else (written(path),)


def written(path):
    """What a file says; of a notebook its cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])


def joined(text):
    """A text in which a line that goes on is one line."""
    return re.sub(r"\\\n\s*", "", text)


def lines_of_code(name):
    """The lines of a file that its reader may type: of fenced blocks, of indented ones, of recipes."""
    for text in texts(name):
        if name == "Makefile":
            found = re.findall(r"^\t@?(.*)$", joined(text).replace("$(BIN)/", ""), re.MULTILINE)
        elif name.endswith((".md", ".ipynb")):
            blocks = re.findall(r"^ *```bash\n(.*?)^ *```", joined(text), re.MULTILINE | re.DOTALL)
            found = [line for block in blocks for line in block.splitlines()]
        else:
            found = re.findall(r"^ {4,}(\S.*)$", joined(text), re.MULTILINE)
        yield from (re.sub(r"(^|\s)#.*", "", line).strip() for line in found)


def spans(name):
    """What stands between backticks, on one line or on two."""
    for text in texts(name):
        prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
        yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"\n *# ", "\n", prose)))


def mentions():
    """Every place of a command: the file, the command, and the words after it."""
    for name in TEXTS:
        for code in (*lines_of_code(name), *spans(name)):
            if found := COMMAND.search(code):
                yield name, *found.groups()


@cache
def kinds(command):
    """The dataclasses of a command's options."""
    return importlib.import_module(f"ddae_hf.commands.{command.replace('-', '_')}").KINDS


@cache
def options_of(command):
    """The options of a command."""
    return {field.name for kind in kinds(command) for field in dataclasses.fields(kind)} | {"config", "help"}


def named(words):
    """The options that words name."""
    found = {option.replace("-", "_") for option in re.findall(r"(?<![\w-])--([a-z][\w-]*)", words)}
    return {option.removeprefix("no_") for option in found}


def test_commands_that_are_named_are_there_with_their_options():
    found = list(mentions())
    assert {command for _, command, _ in found} == COMMANDS.keys()  # and so each of them is told of
    for name, command, words in found:
        assert named(words) <= options_of(command), f"{name}: ddae {command}{words}"
        for config in re.findall(r"--config ([a-z]\w*)(?![\w/.])", words):
            assert find_config(config), name


WHOLE = [(*found.groups(), name) for name in TEXTS for line in lines_of_code(name) if (found := COMMAND.search(line))]
WHOLE = [line for line in WHOLE if "..." not in line[1] and "config NAME" not in line[1]]


@pytest.mark.parametrize(("command", "words", "name"), WHOLE)
def test_lines_that_are_shown_are_understood(command, words, name, monkeypatch):
    """Whole: every value, and nothing that is needed is left out."""
    monkeypatch.chdir(ROOT)
    parse(kinds(command), None, shlex.split(words), f"ddae {command}")


def test_options_that_are_named_alone_are_of_some_command():
    everywhere = FOREIGN.union(*(options_of(command) for command in COMMANDS))
    own = {path.stem: own_options(path) for path in (ROOT / "benchmarks").glob("*.py")}
    for name in TEXTS:
        module = Path(name)
        allowed = everywhere | (own[module.stem] if module.parts[0] == "benchmarks" and module.suffix else set())
        if name in ("docs/performance.md", "docs/appendix/performance.md"):
            allowed = allowed.union(*own.values())
        for span in spans(name):
            assert named(span) <= allowed or "{}" in span, f"{name}: {span}"
        for line in lines_of_code(name):
            if found := BENCHMARK.search(line):
                assert named(found[2]) <= everywhere | own[found[1]], f"{name}: {line}"


def own_options(path):
    """The options of a benchmark, which it adds to a parser or has as fields of a dataclass, by their names there."""
    text = path.read_text(encoding="utf-8")
    fields = (node.target for node in ast.walk(ast.parse(text)) if isinstance(node, ast.AnnAssign))
    return named(" ".join(re.findall(r'"(--\w+)"', text))) | {ast.unparse(target) for target in fields}


def there(name, path):
    """Whether a file or folder is in the repository: from its root, beside the text that names it, or by its end.

    Modules of commands have the names of old scripts, and so only the architecture names them by these.
    """
    if Path(path).name in WRITTEN or any([*place.glob(path)] for place in (ROOT, (ROOT / name).parent)):
        return True
    known = [Path("/" + file) for file in known_files()]
    if name != "docs/architecture.md":
        known = [file for file in known if file.parent != Path("/ddae_hf/commands")]
    return any(file.match("*/" + path) for file in known)


@cache
def known_files():
    """The files of all places, from the root."""
    paths = [path for place in ("docs", "tests", *PLACES) for path in (ROOT / place).rglob("*")]
    return [path.relative_to(ROOT).as_posix() for path in paths if "__pycache__" not in path.parts]


def test_files_that_are_named_are_there():
    inside = re.compile(rf"^(?:docs|tests|{'|'.join(PLACES)})/[\w./*-]*$")
    for name in TEXTS:
        for text in texts(name):
            for path in re.findall(r"(?<![\w/.*{}$-])[\w*][\w./*-]*\.(?:py|yaml)(?![\w(])", text):
                assert there(name, path), f"{name}: {path}"
        for span in spans(name):
            assert not inside.match(span) or there(name, span.rstrip("/")), f"{name}: {span}"


def slug(heading):
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_links_lead_somewhere():
    for path in [*DOCUMENTS, *NOTEBOOKS, ROOT / "CHANGELOG.md"]:
        text = written(path)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if not re.match(r"https?:|\{\{", link):
                file, _, anchor = link.partition("#")
                target = path.parent / file if file else path
                assert target.exists(), f"{path.name}: {link}"
                if anchor:
                    headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                    assert anchor in map(slug, headings), f"{path.name}: {link}"


def test_targets_of_make_are_there():
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for name in TEXTS:
        code = "\n".join([*lines_of_code(name), *spans(name)])
        for target in re.findall(r"^make ([a-z][\w-]*)", code, re.MULTILINE):
            assert target in targets, f"{name}: make {target}"


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROOMS = {"ddae_hf": "flat modules", "experiments": "rooms of experiments", "commands": "rooms of commands"}
ROOMS |= {"demo": "rooms of the demo", "benchmarks": "rooms of benchmarks"}


def section(title):
    """A part of the architecture, to the next heading."""
    return re.search(rf"^## The {title}.*?(?=^## )", ARCHITECTURE, re.MULTILINE | re.DOTALL)[0]


@pytest.mark.parametrize("place", ROOMS)
def test_the_architecture_has_every_room_after_those_that_it_imports(place):
    folder = ROOT / place if place in ("ddae_hf", "benchmarks") else ROOT / "ddae_hf" / place
    firsts = [row.split("|")[1] for row in section(ROOMS[place]).splitlines() if row.startswith("| `")]
    rooms = {module: number for number, first in enumerate(firsts) for module in re.findall(r"`(\w+)\.py`", first)}
    assert rooms.keys() == {path.stem for path in folder.glob("[!_]*.py")}
    for name in rooms:
        for imported in imports(folder / f"{name}.py"):
            if re.match(r"\.\w", imported):
                assert rooms[imported[1:]] < rooms[name], f"{name} imports {imported}"


def test_places_of_changes_are_there():
    """What stands behind a module's name is in it, and whatever else is named is in some module."""
    modules = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "ddae_hf").rglob("*.py")}
    (part,) = re.findall(r"^## Where a change goes(.*?)^## ", ARCHITECTURE, re.MULTILINE | re.DOTALL)
    changes = [row.split("|")[2] for row in part.splitlines() if row.startswith("| ")][1:]
    assert len(changes) == 10
    for change in changes:
        for place, name in re.findall(r"`(?:\w+/)?(\w+\.py)`: (?:[a-z ]*)`([\w.]+)`", change):
            assert all(re.search(rf"\b{part}\b", modules[place]) for part in name.split(".")), f"{place}: {name}"
        for name in re.findall(r"`([\w.]+)`", change):
            parts = [] if name.endswith(".py") else name.split(".")
            assert all(re.search(rf"\b{part}\b", "".join(modules.values())) for part in parts), name


def test_lines_of_prose_are_of_one_width():
    for path in [*DOCUMENTS, *NOTEBOOKS, ROOT / "CHANGELOG.md"]:
        generated = (
            path.parent.name == "model_cards"
            and path.name != "README.md"
            or path.parent.name == "digits_checkpoint"
            or path.name == "model_card_template.md"
        )
        for line in () if generated else written(path).splitlines():
            assert len(line) <= 120 or line.startswith("|") or "](http" in line, f"{path.name}: {line}"
