"""Lay a folder that is a complete Space: the app, the package, and what the app shows.

    python examples/demo/make_space.py --output_dir runs/space

It runs as it is, with `python app.py`, and needs what its requirements.txt lists. To publish it, push it to a Space:
`hf upload NAME/SPACE runs/space . --repo-type space`.
"""

from __future__ import annotations

import argparse
import ast
import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from ddae_hf import DDAEForImageClassification, DDAEImageProcessor, DDAEPipeline  # noqa: E402
from ddae_hf.experiments.arrays import write_json  # noqa: E402

OWN = ("app.py", "views.py", "denoising.py", "pictures.py", "README.md", "requirements.txt")
RUN = Path("runs/quickstart")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options; stop at those that cannot work."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkpoint", default=str(RUN / "checkpoint"), help="Generator, folder or Hub id, in any layout.")
    add("--classifier", default=str(RUN / "classifier"), help="Classifier, folder or Hub id.")
    add("--sweep", type=Path, default=RUN / "sweep", help="Folder that sweep.py wrote; left out if it is not there.")
    add("--dataset_name", type=Path, default=RUN / "digits", help="Folder of a data set, with splits train and test.")
    add("--output_dir", type=Path, default=Path("runs/space"), help="Folder to lay, new or empty.")
    args = parser.parse_args(argv)
    if not args.dataset_name.is_dir():
        parser.error(
            f"There is no folder {args.dataset_name}: `make quickstart` makes it, or give --dataset_name another."
        )
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        parser.error(f"{args.output_dir} is not empty: give --output_dir a new folder.")
    return args


def helpers() -> list[Path]:
    """Return the modules of the scripts that the app imports, and those that these import."""
    found: list[Path] = []
    left = [HERE / name for name in OWN if name.endswith(".py")]
    while left:
        for node in ast.walk(ast.parse(left.pop().read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            new = [path for name in names if (path := HERE.parent / f"{name}.py").is_file() and path not in found]
            found = found + new
            left = left + new
    return found


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_arguments(argv)
    folder = args.output_dir
    try:
        generator = DDAEPipeline.from_pretrained(args.checkpoint)
        classifier = DDAEForImageClassification.from_pretrained(args.classifier)
        processor = DDAEImageProcessor.from_pretrained(args.classifier)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    generator.save_pretrained(folder / "checkpoint")
    for part in (classifier, processor):
        part.save_pretrained(folder / "classifier")
    shutil.copytree(args.dataset_name, folder / "digits")
    if (figures := args.sweep / "eval_results.json").exists():
        report = json.loads(figures.read_text(encoding="utf-8"))
        for name in ("checkpoint", "options"):  # paths of this machine
            report.pop(name, None)
        write_json(folder / "sweep" / figures.name, report)
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(HERE.parent.parent / "ddae_hf", folder / "ddae_hf", ignore=without)
    for path in [*(HERE / name for name in OWN), *helpers()]:
        shutil.copy(path, folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder} is a Space of {size / 1e6:.1f} MB; try it: cd {folder} && python app.py")


if __name__ == "__main__":
    main()
