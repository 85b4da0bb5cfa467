"""The package's own modules in a checkpoint, so that it opens where `ddae_hf` is not installed.

transformers and diffusers run such code only for those who pass `trust_remote_code=True`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

# The class, in a module in the checkpoint's folder, that each of transformers' Auto classes opens.
AUTO_MAP = {
    "AutoConfig": "configuration_ddae.DDAEConfig",
    "AutoModel": "modeling_ddae.DDAEModel",
    "AutoModelForImageClassification": "modeling_ddae.DDAEForImageClassification",
}
# Those of modules that travel only with their own checkpoints.
OWN = {
    "AutoBackbone": "backbone_ddae.DDAEBackbone",
    "AutoModelForSemanticSegmentation": "segmentation_ddae.DDAEForSemanticSegmentation",
}


def auto_map(auto_name: str) -> dict[str, str]:
    """Return what the Auto classes open of a checkpoint that was saved by the class that one of them opens."""
    return AUTO_MAP | {name: code for name, code in OWN.items() if name == auto_name}


def module_of(auto_name: str) -> str:
    """Return the module of the class that an Auto class opens."""
    return auto_map(auto_name)[auto_name].partition(".")[0]


def save_code(folder: str | os.PathLike[str], module: str) -> list[str]:
    """Copy a module of this package, and those that it imports, beside each other into a folder; return their names."""
    file = Path(__file__).with_name(f"{module}.py")
    files = sorted({file, *map(Path, get_relative_import_files(file))})
    Path(folder).mkdir(parents=True, exist_ok=True)
    for source in files:
        shutil.copyfile(source, Path(folder) / source.name)
    return [source.stem for source in files]


def save_pipeline_code(folder: str | os.PathLike[str], components: Mapping[str, str]) -> None:
    """Write `pipeline.py`, which diffusers opens as `custom_pipeline="pipeline"`, and the modules that it needs.

    diffusers takes from a folder only the modules that `pipeline.py` itself imports, so it names them all. A component
    with a class of this package has its module in its own folder, too, which is all the code that diffusers takes from
    there: `components` are those modules, by component, or nothing for a class of diffusers.
    """
    for component, own_module in components.items():
        if own_module:
            save_code(Path(folder, component), own_module)
    modules = [name for name in save_code(folder, "pipeline_ddae") if name != "pipeline_ddae"]
    lines = [f"from .{name} import __doc__ as _{name}" for name in modules]
    text = "\n".join(["# Every module is named here: diffusers copies no others.", *lines])
    text += '\nfrom .pipeline_ddae import DDAEPipeline\n\n__all__ = ["DDAEPipeline"]\n'
    (Path(folder) / "pipeline.py").write_text(text, encoding="utf-8")
