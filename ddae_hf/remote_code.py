"""The package's own modules in a checkpoint, so that it opens where `ddae_hf` is not installed.

transformers and diffusers run such code only for those who pass `trust_remote_code=True`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

# The class, in a module in the checkpoint's folder, that each of transformers' Auto classes opens; a backbone adds
# itself.
AUTO_MAP = {
    "AutoConfig": "configuration_ddae.DDAEConfig",
    "AutoModel": "modeling_ddae.DDAEModel",
    "AutoModelForImageClassification": "modeling_ddae.DDAEForImageClassification",
}


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
