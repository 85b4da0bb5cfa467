"""What is said where a library is missing: which one it is, and the pip line that installs it."""

from __future__ import annotations

import re
from importlib import metadata


def not_installed(what: str, module: str | None, extra: str) -> str:
    """Return a sentence that something here needs a module, with the `pip_line` of the extra that brings it."""
    return f"{what} needs {module}, which is not installed: {pip_line(extra, module)}"


def pip_line(extra: str, module: str | None) -> str:
    """Return the line that installs every missing library of this package and one of its extras.

    What they need, with the lowest versions, is read from the metadata of the installed package. Where nothing of it is
    missing, or there is no metadata, the line installs the module's own library.
    """
    needed = requirements(extra)
    missing = [requirement for name, requirement in needed.items() if not is_installed(name)]
    if not missing:
        top = (module or "").partition(".")[0]
        name = metadata.packages_distributions().get(top, [top])[0]
        missing = [needed.get(_normal(name), name)]
    # Names with characters that a shell would interpret, such as `>`, are quoted.
    quoted = [each if re.fullmatch(r"[\w.-]+", each) else f'"{each}"' for each in missing]
    return " ".join(["pip install", *quoted])


def requirements(extra: str) -> dict[str, str]:
    """Return by name what this package and an extra need, such as `datasets>=4.8`; empty without metadata."""
    try:
        lines = metadata.requires("ddae_hf") or []
    except metadata.PackageNotFoundError:
        return {}
    found = {}
    for line in lines:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        extras = re.findall(r"""extra == ["']([\w-]+)["']""", marker)
        if not extras or extra in extras:
            name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
            found[_normal(name)] = requirement
    return found


def is_installed(name: str) -> bool:
    """Return whether a library is installed, in whatever version."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()
