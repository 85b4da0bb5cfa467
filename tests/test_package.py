"""The package as a whole: who imports whom, what is public, the wheel outside the clone."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ddae_hf

ROOT = Path(__file__).parent.parent
# A module imports only modules of earlier lines.
ORDER = [
    ["arrays", "cut", "draws", "families", "latents", "lbfgs", "pickles", "remote_code"],
    ["augment", "labels", "noise", "weights"],
    ["network_class", "sampling"],
    ["dits", "unets"],
    ["networks"],
    ["checkpoints", "conversion", "hidden_states"],
    ["configuration_ddae", "diffusion", "heads"],
    ["image_processing_ddae", "pretrained_ddae"],
    ["modeling_ddae", "pipeline_ddae"],
    ["backbone_ddae"],
    ["features", "probing", "generation_metrics", "run_results"],
    ["latent_folder", "model_card"],
    ["__init__"],
]
RANK = {module: rank for rank, modules in enumerate(ORDER) for module in modules}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield ("." * node.level) + (node.module or "")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_go_one_way():
    modules = {path.stem: path for path in (ROOT / "ddae_hf").glob("*.py")}
    assert modules.keys() == RANK.keys()
    for name, path in modules.items():
        for imported in imports(path):
            if imported.startswith("."):
                assert RANK[imported[1:]] < RANK[name], f"{name} imports {imported}"
            assert imported.split(".")[0] not in {"accelerate", "argparse", "examples", "tests"}, f"{name}: {imported}"


def test_every_public_name_is_there_and_no_other_is():
    assert ddae_hf.__all__ == sorted(
        ["DDAEBackbone", "DDAEConfig", "DDAEModel", "DDAEForImageClassification", "DDAEImageProcessor", "DDAEPipeline"]
        + [
            "add_noise",
            "sigma_to_timestep",
            "timestep_to_sigma",
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
    promised = re.findall(r"`(test_\w+)::(test_\w+)`", (ROOT / "docs" / "trust.md").read_text())
    assert len(promised) > 50
    for file, name in promised:
        assert f"\ndef {name}(" in (ROOT / "tests" / f"{file}.py").read_text(), f"{file}::{name}"


def test_the_library_never_prints():
    for path in (ROOT / "ddae_hf").glob("*.py"):
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not any(isinstance(f, ast.Name) and f.id == "print" for f in calls), path.name


# What only some schedulers, or some networks, have.
OF_SCHEDULERS = {"alphas_cumprod", "scale_model_input", "init_noise_sigma", "set_timesteps"}
OF_NETWORKS = """down_blocks up_blocks mid_block transformer_blocks class_embedding time_embedding time_proj pos_embed
    conv_norm_out inner_dim num_class_embeds class_embed_type num_embeds_ada_norm time_embedding_type patch_size
    down_block_types up_block_types UNet2DModel DiTTransformer2DModel Transformer2DModel""".split()
# Where networks are described, and where the files of others become networks of one class.
DESCRIBE_NETWORKS = {f"ddae_hf/{name}.py" for name in ("network_class", "unets", "dits", "networks", "conversion")}
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
    assert {name: found[name] for name in found.keys() - DESCRIBE_NETWORKS if found[name]} == {}


def test_families_are_told_by_their_methods_alone():
    for name in ("noise", "families"):
        nodes = code(ROOT / "ddae_hf" / f"{name}.py")
        assert {ast.unparse(call.args[1]) for call in calls(nodes, "isinstance", "issubclass")} <= {"int | float"}
        named = [node.value for node in nodes if isinstance(node, ast.Attribute) and node.attr == "__name__"]
        assert all(call in named for call in calls(nodes, "type"))  # a class is asked for its name alone
        tables = [node for node in nodes if isinstance(node, ast.Dict)]
        assert not any(isinstance(key, ast.Name) for table in tables for key in table.keys)


def test_the_wheel_works_outside_the_clone(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("ddae_hf-*.whl")
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run(install, check=True, capture_output=True)
    code = "import ddae_hf; c = ddae_hf.DDAEConfig(); print(ddae_hf.__file__, ddae_hf.__version__, c.layer)"
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [
        str(target / "ddae_hf" / "__init__.py"),
        ddae_hf.__version__,
        "up_blocks.1.resnets.2",
    ]
    assert (target / "ddae_hf" / "py.typed").exists()


def test_modules_and_functions_are_read_in_one_sitting():
    for path in (ROOT / "ddae_hf").glob("*.py"):
        assert path.read_text().count("\n") <= 420, path.name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                documented = node.body[0] if ast.get_docstring(node) else None
                lines = node.end_lineno - node.lineno + 1
                lines -= documented.end_lineno - documented.lineno + 1 if documented else 0
                assert lines <= 60, f"{path.name}: {node.name} has {lines} lines"
