"""Write the cards of the checkpoints that this project trained, from the files that their runs left in `runs`.

    python model_cards/render.py

A checkpoint's own folder gets its card (`save_card`), and this folder a copy of it with smaller pictures. Checkpoints
that are not there keep the card that they have.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from PIL import Image

from ddae_hf.experiments import save_card

HERE = Path(__file__).parent
# A card's name: the checkpoint, other folders with its results, the name of the data.
CARDS = {
    "digits": ("quickstart/checkpoint", ["quickstart/classifier", "quickstart/sweep"], "scikit-learn's digits"),
    "digits_classifier": ("quickstart/classifier", ["quickstart/checkpoint"], "scikit-learn's digits"),
    "cifar10_cpu": ("cifar10_cpu", ["cifar10_cpu_classifier", "cifar10_cpu_sweep"], "CIFAR-10 (JPEG copy)"),
    "cifar10_cpu_classifier": (
        "cifar10_cpu_sweep/classifier",
        ["cifar10_cpu_sweep", "cifar10_cpu"],
        "CIFAR-10 (JPEG copy)",
    ),
    "cifar10_latent_dit": ("cifar10_latent_dit", ["cifar10_latent_transfer"], "CIFAR-10 (JPEG copy)"),
}
LONGEST_SIDE = 640


def save_picture(source: Path, target: Path) -> None:
    """Write a picture small enough for a repository of code."""
    target.parent.mkdir(exist_ok=True)
    with Image.open(source) as image:
        picture = image.convert("RGB")
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    picture.quantize(256).save(target, optimize=True)


def copy_card(card: Path, name: str) -> Path:
    """Write a card and its pictures into this folder."""
    text = card.read_text(encoding="utf-8")
    for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        # The cards of a generator and of its classifier share their pictures; those of a sweep have their own.
        checkpoint = name.removesuffix("_classifier")
        kind = re.sub(rf"^({checkpoint}_)?((classifier|checkpoint)-)?", "", Path(link).name)
        target = Path("images") / f"{checkpoint}-{kind}"
        save_picture(card.parent / link, HERE / target)
        text = text.replace(f"]({link})", f"]({target.as_posix()})")
    path = HERE / f"{name}.md"
    path.write_text(text, encoding="utf-8")
    return path


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"), help="Folder of the runs.")
    args = parser.parse_args(argv)
    for name, (checkpoint, others, dataset_name) in CARDS.items():
        folder, results = args.runs_dir / checkpoint, [args.runs_dir / other for other in others]
        if not folder.is_dir():
            print(f"{name}: {folder} is not there.")
            continue
        results = [other for other in results if other.is_dir()]
        card = save_card(folder, results=results, model_name=name, dataset_name=dataset_name)
        print(f"{name}: {copy_card(card, name).name}")


if __name__ == "__main__":
    main()
