"""The package as a whole: who imports whom, what is public, the wheel outside the clone."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ddae_hf
from ddae_hf import experiments
from ddae_hf.experiments.libraries import not_installed, pip_line

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ddae_hf"
# A module imports only modules of earlier lines.
FLAT = [
    ["building", "cut", "generators", "pickles", "remote_code", "self_conditioned"],
    ["families", "latents"],
    ["augment", "labels", "noise", "weights"],
    ["network_class", "sampling"],
    ["dits", "texts", "unets"],
    ["conditional_unets", "pixart"],
    ["networks"],
    ["hidden_states"],
    ["adapters"],
    ["checkpoints", "classification_heads", "conversion"],
    ["configuration_ddae", "diffusion", "prompts"],
    ["image_processing_ddae", "pretrained_ddae"],
    ["modeling_ddae", "pipeline_ddae"],
    ["backbone_ddae"],
]
EXPERIMENTS = [
    ["arrays", "data_files", "devices", "draws", "libraries", "loading", "metrics", "pieces", "sharing", "stopping"],
    ["classes", "digits", "noisy_networks", "objectives", "online_probes", "outlier_scores", "run_folder", "taps"],
    ["averages", "options"],
    ["features", "image_set", "logistic_regression", "models", "report"],
    ["calibration", "images"],
    ["latent_folder"],
    ["converting", "denoising_report", "encoding", "extractors", "feature_export", "low_rank", "pairs", "told_classes"],
    ["class_errors", "noise_curve", "outlier_report", "run_results"],
    ["results"],
    ["auxiliary", "batches", "plots"],
    ["correspondences", "cross_attention", "generation", "pretraining_data", "publishing", "sharding", "teachers"],
    ["terms", "trainer", "training"],
    ["alignment", "evaluation", "new_networks", "training_options"],
    ["pretraining_options", "probing", "rebuilding", "vae_training"],
    ["pretraining"],
    ["finetuning_options", "fusing"],
    ["finetuning", "sweeping"],
    ["diffusion_classification", "noisy_classification", "training_curve", "transferring"],
    ["outlier_detection"],
]
DEMO = [["nearness", "pictures", "steps", "uploads"], ["maps"], ["views"], ["words"], ["page", "space"]]
FORBIDDEN = {"examples", "benchmarks", "tests"}


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def modules_of(folder):
    return {path.stem: path for path in sorted(folder.glob("[!_]*.py"))}


SHARED = [["parsing"], ["running"], ["main"]]
COMMANDS = [*SHARED, [name for name in modules_of(PACKAGE / "commands") if [name] not in SHARED]]


def imports(path):
    """Every module that a file imports, at its top, inside of a function, or for annotations alone."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name if node.level == 1 else "" for alias in node.names]
            yield from ("." * node.level + name for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def check_order(folder, order, inside):
    """A module imports earlier ones of its folder and, of the package, what `inside` says of a name with two dots."""
    rank = {module: number for number, modules in enumerate(order) for module in modules}
    modules = modules_of(folder)
    assert modules.keys() == rank.keys()
    for name, path in modules.items():
        for imported in imports(path):
            place, module = len(imported) - len(imported.lstrip(".")), imported.lstrip(".")
            if place == 1:
                assert rank[module] < rank[name], f"{name} imports {imported}"
            elif place == 2:
                assert inside(module), f"{name} imports {imported}"
            else:
                assert place == 0 and module.split(".")[0] not in FORBIDDEN | {"ddae_hf"}, f"{name} imports {imported}"


def test_imports_go_one_way():
    check_order(PACKAGE, FLAT, lambda module: False)
    flat = {"", *modules_of(PACKAGE)}
    check_order(PACKAGE / "experiments", EXPERIMENTS, lambda module: module in flat)
    rooms = {f"experiments.{name}" for name in modules_of(PACKAGE / "experiments")}
    check_order(PACKAGE / "demo", DEMO, lambda module: module in flat | rooms)
    rooms |= {"experiments", *(f"demo.{name}" for name in modules_of(PACKAGE / "demo"))}
    check_order(PACKAGE / "commands", COMMANDS, lambda module: module in flat | rooms)


def test_only_commands_know_of_command_lines_and_only_they_print():
    """The flat package also knows no accelerate, and its modules are what travels with a checkpoint."""
    for folder, unknown in (
        (PACKAGE, {"accelerate", "argparse", "tqdm", "datasets"}),
        (PACKAGE / "experiments", {"argparse"}),
        (PACKAGE / "demo", {"argparse"}),
    ):
        for path in folder.glob("*.py"):
            assert not unknown & {module.split(".")[0] for module in imports(path)}, path.name
            used = {ast.unparse(node) for node in ast.walk(tree(path)) if isinstance(node, (ast.Name, ast.Attribute))}
            assert not used & {"print", "input", "SystemExit", "sys.exit", "exit", "quit", "argparse"}, path.name


SEEDING = """seed_by torch.manual_seed torch.random.manual_seed torch.cuda.manual_seed torch.cuda.manual_seed_all
    random.seed np.random.seed numpy.random.seed set_seed accelerate.utils.set_seed transformers.set_seed""".split()
# Functions that seed inside of their caller's `separate_randomness`, and where that stands.
SEEDED_BY_CALLERS = {
    "training.steps": "training",
    "trainer.compute_loss": "finetuning",
    "finetuning.build_classifier": "finetuning",
    "noisy_classification.train_mlp": "noisy_classification",
    "noisy_classification.train_wide_resnet": "noisy_classification",
}


def test_experiments_seed_nothing_globally():
    """But where `separate_randomness` brings the global generators back; and they ask these only by torch."""
    allowed = set()
    for name, path in modules_of(PACKAGE / "experiments").items():
        if name == "draws":  # which has `separate_randomness` itself
            continue
        nodes = list(ast.walk(tree(path)))
        inside = {
            inner
            for node in nodes
            if isinstance(node, ast.With) and any("separate_randomness" in ast.unparse(i) for i in node.items)
            for inner in ast.walk(node)
        }
        for function in (node for node in nodes if isinstance(node, ast.FunctionDef)):
            for node in ast.walk(function):
                called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                global_draw = re.fullmatch(r"(np\.)?random\.[a-z_]+", called) and called != "np.random.default_rng"
                if node not in inside and (called in SEEDING or global_draw):
                    place = f"{name}.{function.name}"
                    assert place in SEEDED_BY_CALLERS, f"{place} calls {called}"
                    allowed.add(place)
    assert allowed == SEEDED_BY_CALLERS.keys()
    for module in SEEDED_BY_CALLERS.values():
        assert "with separate_randomness(" in (PACKAGE / "experiments" / f"{module}.py").read_text()


def test_no_two_modules_have_one_name_and_none_that_of_a_function_that_is_exported():
    """A lazy import would give the module; a command may be named after its experiment, as its script is."""
    places = [PACKAGE, PACKAGE / "experiments", PACKAGE / "demo"]
    places += [ROOT / "examples", ROOT / "benchmarks", ROOT / "model_cards"]
    names = [path.stem for place in places for path in place.glob("[!_]*.py")]
    assert {name for name in names if names.count(name) > 1} == set()
    rooms = {**modules_of(PACKAGE), **modules_of(PACKAGE / "experiments")}
    assert not {*ddae_hf.__all__, *experiments.__all__} & rooms.keys()


def test_scripts_do_not_call_each_other():
    scripts = modules_of(ROOT / "examples")
    for name, path in scripts.items():
        assert not {module.split(".")[0] for module in imports(path)} & (scripts.keys() | FORBIDDEN), name


def test_experiments_are_imported_when_they_are_first_used():
    for name in experiments.__all__:
        assert getattr(experiments, name).__doc__ and name in dir(experiments)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        experiments.nothing  # noqa: B018
    code = "import sys, ddae_hf.experiments; print(sorted(m for m in sys.modules if 'ddae_hf.' in m))"
    code += (
        "; print({'datasets', 'accelerate', 'evaluate', 'matplotlib', 'sklearn', 'torchmetrics'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    rooms, libraries = done.stdout.splitlines()
    assert [room for room in ast.literal_eval(rooms) if "experiments" in room] == ["ddae_hf.experiments"]
    assert libraries == "set()" or "accelerate" in libraries  # which diffusers imports for itself


@pytest.mark.slow
def test_an_experiment_whose_libraries_are_missing_says_what_to_install():
    code = """import sys
sys.modules.update(dict.fromkeys(["datasets", "sklearn", "evaluate", "matplotlib", "torchmetrics"]))
import ddae_hf.experiments as experiments
for name in ("Images", "sweep", "finetune", "evaluate_generation"):
    try:
        getattr(experiments, name)
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    lines = re.findall(
        r"^ddae_hf\.experiments\.\w+ needs ([\w.]+), which is not installed: (.*)$", done.stdout, re.MULTILINE
    )
    assert lines == [(module, pip_line("experiments", module)) for module, _ in lines], done.stdout + done.stderr
    assert len(lines) == 4 and 'pip install "datasets>=' in lines[0][1]


def test_a_demo_whose_library_is_missing_says_what_to_install():
    code = "import sys; sys.modules['gradio'] = None; from ddae_hf.commands.main import main; main(['demo'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == not_installed("ddae demo", "gradio", "demo") + "\n" and '"gradio>=' in done.stderr


def test_every_public_name_is_there_and_no_other_is():
    assert sorted(ddae_hf.__all__) == sorted(
        [
            "DIGITS_CHECKPOINT",
            "DDAEBackbone",
            "DDAEConfig",
            "DDAEModel",
            "DDAEForImageClassification",
            "DDAEImageProcessor",
            "DDAEPipeline",
        ]
        + [
            "add_noise",
            "sigma_to_timestep",
            "timestep_to_sigma",
            "embed_prompts",
            "layer_names",
            "collect_hidden_states",
            "pool_hidden_states",
        ]
    )
    for name in ddae_hf.__all__:
        assert getattr(ddae_hf, name).__doc__ and name in dir(ddae_hf)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ddae_hf.nothing  # noqa: B018


def test_what_is_promised_is_held_by_tests_that_there_are():
    promised = re.findall(r"`(test_\w+)::(test_\w+)`", (ROOT / "docs" / "guides" / "untrusted_files.md").read_text())
    assert len(promised) > 50
    for file, name in promised:
        assert f"\ndef {name}(" in (ROOT / "tests" / f"{file}.py").read_text(), f"{file}::{name}"


# What only some schedulers, or some networks, have.
OF_SCHEDULERS = {"alphas_cumprod", "scale_model_input", "init_noise_sigma", "set_timesteps"}
OF_NETWORKS = """down_blocks up_blocks mid_block transformer_blocks class_embedding time_embedding time_proj pos_embed
    conv_norm_out inner_dim num_class_embeds class_embed_type num_embeds_ada_norm time_embedding_type patch_size
    down_block_types up_block_types UNet2DModel DiTTransformer2DModel Transformer2DModel""".split()
# Where networks are described, and where the files of others become networks of one class.
DESCRIBE_NETWORKS = {f"ddae_hf/{name}.py" for name in
    ("network_class", "unets", "dits", "self_conditioned", "texts", "conditional_unets", "pixart", "networks",
     "conversion")}  # fmt: skip
OF_VISION_MODELS = {"ddae_hf/experiments/teachers.py": {"patch_size"}}  # words that are asked of no denoiser there
FOLDERS = [ROOT / name for name in ("ddae_hf", "examples", "benchmarks")]
FILES = {path.relative_to(ROOT).as_posix(): path for folder in FOLDERS for path in folder.rglob("*.py")}


def code(path):
    """Every node of a file's syntax tree but docstrings and annotations."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    left_out = [node.value for node in nodes if isinstance(node, ast.Expr)]
    left_out += [n for node in nodes if getattr(node, "annotation", None) for n in ast.walk(node.annotation)]
    hidden = set(left_out)
    return [node for node in nodes if node not in hidden]


def words(nodes):
    """Names, attributes and strings."""
    for node in nodes:
        found = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "value", None)
        if isinstance(found, str):
            yield found


def calls(nodes, *names):
    return [n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in names]


def tables(nodes):
    """The nodes inside tables, whose keys and values describe what is built."""
    return {n for table in nodes if isinstance(table, ast.Dict) for n in ast.walk(table)}


def scheduler_branches(path):
    """Words that tell one scheduler from another; what stands in a table is only built."""
    nodes = code(path)
    built = tables(nodes)
    used = words(n for n in nodes if n not in built)
    yield from (word for word in used if re.search("EDMEuler|EDMDPM|FlowMatch", word))
    compared = [n for n in nodes if isinstance(n, ast.Compare)] + calls(nodes, "isinstance", "issubclass")
    yield from (word for node in compared for word in words(ast.walk(node)) if word.endswith("Scheduler"))
    probed = calls(nodes, "hasattr", "getattr")
    yield from (word for node in probed for word in words(ast.walk(node)) if word in OF_SCHEDULERS)


def test_nobody_but_families_branches_on_a_scheduler():
    found = {name: set(scheduler_branches(path)) for name, path in FILES.items() if name != "ddae_hf/noise.py"}
    assert not {name: telling for name, telling in found.items() if telling}
    package = [path for name, path in FILES.items() if name.startswith("ddae_hf/")]
    assert sum("EDMEulerScheduler" in word for path in package for word in words(code(path))) == 1


def test_nobody_but_its_description_branches_on_a_network():
    """No class is named, no part of a network and no option of one class is asked for; tables may build a network."""
    found = {}
    for name, path in FILES.items():
        nodes = code(path)
        built = tables(nodes)
        found[name] = {word for word in words(n for n in nodes if n not in built) if word in OF_NETWORKS}
        found[name] -= OF_VISION_MODELS.get(name, set())
    assert {name: found[name] for name in found.keys() - DESCRIBE_NETWORKS if found[name]} == {}


def test_families_are_told_by_their_methods_alone():
    for name in ("noise", "families"):
        nodes = code(ROOT / "ddae_hf" / f"{name}.py")
        assert {ast.unparse(call.args[1]) for call in calls(nodes, "isinstance", "issubclass")} <= {"int | float"}
        named = [node.value for node in nodes if isinstance(node, ast.Attribute) and node.attr == "__name__"]
        assert all(call in named for call in calls(nodes, "type"))  # a class is asked for its name alone
        tables = [node for node in nodes if isinstance(node, ast.Dict)]
        assert not any(isinstance(key, ast.Name) for table in tables for key in table.keys)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of the installed wheel, which is built of a copy: `build/` of the clone may hold what is gone."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(PACKAGE, source / "ddae_hf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", folder, source], check=True, capture_output=True)
    (wheel,) = folder.glob("ddae_hf-*.whl")
    target = folder / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run(install, check=True, capture_output=True)
    return target


def outside_the_clone(target, folder, *words):
    """What a process prints, and what it says beside that, in a folder where only the installed wheel is to be had."""
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(), done.stderr.decode()  # with the carriage returns of progress bars


def test_the_wheel_works_outside_the_clone(installed, tmp_path):
    code = "import ddae_hf; from ddae_hf.experiments import Images, make_card; from ddae_hf.commands import parsing; "
    code += "c = ddae_hf.DDAEConfig(); print(ddae_hf.__file__, ddae_hf.__version__, c.layer)"
    said, _ = outside_the_clone(installed, tmp_path, "-c", code)
    assert said.split() == [
        str(installed / "ddae_hf" / "__init__.py"),
        ddae_hf.__version__,
        "up_blocks.1.resnets.2",
    ]


def test_the_wheel_has_every_file_of_the_package_and_no_other(installed):
    def files(folder):
        return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}

    assert files(installed / "ddae_hf") == files(PACKAGE)
    known = ("py.typed", "experiments/model_card_template.md", "commands/configs/digits.yaml", "demo/template/app.py")
    for name in known:
        assert (installed / "ddae_hf" / name).is_file()
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"bin", "ddae_hf"}
    (entries,) = installed.glob("ddae_hf-*.dist-info/entry_points.txt")
    assert entries.read_text().split("\n")[:2] == ["[console_scripts]", "ddae = ddae_hf.commands.main:run"]


AS_IN_PYTHON = """
from ddae_hf.experiments import Images, sweep
images = Images.open("runs/quickstart/digits")
options = {"max_train_samples": 100, "max_test_samples": 20, "num_noise_seeds": 1}
result = sweep("runs/quickstart/checkpoint", images, layers=["decoder"], sigmas=[0.1, 0.2], **options)
print(result.table())
result.heat_map().savefig("runs/heat_map.png")
print("best:", result.best.layer)
result.save("runs/classifier")
"""


@pytest.mark.slow
def test_all_that_is_installed_is_at_work_outside_the_clone(installed, tmp_path):
    """And says nothing that is not this package's own, in processes whose output is read from files."""

    def ddae(*words):
        said, log = outside_the_clone(installed, tmp_path, "-m", "ddae_hf", *words)
        assert not re.search(r"LOAD REPORT|Warning|RANK|not passed|Traceback|Loading", log), log
        assert "\n\n" not in re.sub(r"[^\n]*\r", "", log), log  # no empty lines, as bars inside of bars leave them
        return said

    few = ("--max_train_samples", "100", "--max_test_samples", "20")
    made = ("--model_name_or_path", "runs/quickstart/checkpoint")
    digits = ("--dataset_name", "runs/quickstart/digits")
    assert re.search(r"^It prints: \d$", ddae("quickstart", "--max_train_steps", "3"), re.MULTILINE)
    ddae("sweep", *made, *digits, *few, "--sigmas", "0.1", "0.2", "--layers", "decoder")
    assert (tmp_path / "runs" / "sweep" / "heat_map.png").is_file()
    ddae("generate", *made, "--num_images", "2", "--num_inference_steps", "2")
    assert (tmp_path / "runs" / "samples" / "00001.png").is_file()
    ddae("finetune", *made, *digits, *few, "--max_train_steps", "1")
    assert (tmp_path / "runs" / "finetuned" / "eval_results.json").is_file()
    assert "digits_flow_dit" in ddae("configs") and "DiTTransformer2DModel" in ddae("configs", "digits_flow_dit")
    ddae("pretrain", "--config", "digits_flow_dit", *digits, "--max_train_steps", "1", "--sample_steps", "0")
    assert "DiTTransformer2DModel" in (tmp_path / "runs" / "pretrain" / "model_index.json").read_text()
    said, _ = outside_the_clone(installed, tmp_path, "-c", AS_IN_PYTHON)
    best = re.search(r"^best: (\S+)$", said, re.MULTILINE)[1]
    assert best in said.partition("best:")[0] and (tmp_path / "runs" / "heat_map.png").is_file()
    assert json.loads((tmp_path / "runs" / "classifier" / "config.json").read_text())["layer"] == best
    console, _ = outside_the_clone(installed, tmp_path, str(installed / "bin" / "ddae"), "--version")
    assert console == f"ddae_hf {ddae_hf.__version__}\n"


def test_modules_and_functions_are_read_in_one_sitting():
    for path in PACKAGE.rglob("*.py"):
        assert path.read_text().count("\n") <= 420, path.name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                documented = node.body[0] if ast.get_docstring(node) else None
                lines = node.end_lineno - node.lineno + 1
                lines -= documented.end_lineno - documented.lineno + 1 if documented else 0
                assert lines <= 60, f"{path.name}: {node.name} has {lines} lines"
