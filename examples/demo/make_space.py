"""Lay a folder that is a complete Space: the app, the package, and what the app shows.

    python examples/demo/make_space.py --output_dir runs/space

It runs as it is, with `python app.py`, and needs what its requirements.txt lists. To publish it, push it to a Space:
`hf upload NAME/SPACE runs/space . --repo-type space`.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from ddae_hf import DDAEForImageClassification, DDAEImageProcessor, DDAEPipeline
from ddae_hf.commands.parsing import parse
from ddae_hf.commands.running import sentences
from ddae_hf.experiments.options import Options, option
from ddae_hf.experiments.results import ProbeReport

HERE = Path(__file__).resolve().parent
OWN = ("app.py", "views.py", "denoising.py", "pictures.py", "README.md", "requirements.txt")
RUN = Path("runs/quickstart")


@dataclass(kw_only=True)
class SpaceOptions(Options):
    """What the Space shows."""

    checkpoint: str = option(str(RUN / "checkpoint"), "Generator, folder or Hub id, in any layout.")
    classifier: str = option(str(RUN / "classifier"), "Classifier, folder or Hub id.")
    sweep: str = option(str(RUN / "sweep"), "Folder that sweep.py wrote; left out if it is not there.")
    dataset_name: str = option(str(RUN / "digits"), "Folder of a data set, with splits train and test.")
    output_dir: str = option("runs/space", "Folder to lay, new or empty.")

    def check(self) -> None:
        """Refuse a data set that is no folder, and a folder that has something in it."""
        if not Path(self.dataset_name).is_dir():
            raise ValueError(
                f"There is no folder {self.dataset_name}: `make quickstart` makes it, or give dataset_name another."
            )
        folder = Path(self.output_dir)
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty: give output_dir a new folder.")


def lay(options: SpaceOptions) -> Path:
    """Lay the folder, and return it."""
    folder = Path(options.output_dir)
    generator = DDAEPipeline.from_pretrained(options.checkpoint)
    classifier = DDAEForImageClassification.from_pretrained(options.classifier)
    processor = DDAEImageProcessor.from_pretrained(options.classifier)
    generator.save_pretrained(folder / "checkpoint")
    for part in (classifier, processor):
        part.save_pretrained(folder / "classifier")
    shutil.copytree(options.dataset_name, folder / "digits")
    if (Path(options.sweep) / ProbeReport.file).exists():
        report = ProbeReport.read(options.sweep)
        report.checkpoint, report.options = None, {}  # paths of this machine
        report.write(folder / "sweep")
    package = HERE.parent.parent / "ddae_hf"
    shutil.copytree(package, folder / "ddae_hf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in OWN:
        shutil.copy(HERE / name, folder)
    return folder


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    [options] = parse([SpaceOptions], __doc__, argv)
    with sentences():
        folder = lay(options)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder} is a Space of {size / 1e6:.1f} MB; try it: cd {folder} && python app.py")


if __name__ == "__main__":
    main()
