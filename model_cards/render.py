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

from ddae_hf import DIGITS_CHECKPOINT
from ddae_hf.experiments import save_card

HERE = Path(__file__).parent
CIFAR = "CIFAR-10 (JPEG copy)"
# A card's name: the checkpoint, other folders with its results, the name of the data.
CARDS = {
    "cifar10_cpu": ("cifar10_cpu", ["cifar10_cpu_classifier", "cifar10_cpu_sweep"], CIFAR),
    "cifar10_cpu_classifier": ("cifar10_cpu_sweep/classifier", ["cifar10_cpu_sweep", "cifar10_cpu"], CIFAR),
    "cifar10_latent_dit": ("cifar10_latent_dit", ["cifar10_latent_transfer"], CIFAR),
}
LONGEST_SIDE = 640  # of pictures, in pixels


def copy_card(card: Path, name: str) -> None:
    """Write a card and its pictures, small enough for a repository of code, into this folder."""
    text = card.read_text(encoding="utf-8")
    for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        # The cards of a generator and of its classifier share their pictures; those of a sweep have their own.
        checkpoint = name.removesuffix("_classifier")
        kind = re.sub(rf"^({checkpoint}_)?((classifier|checkpoint)-)?", "", Path(link).name)
        target = f"images/{checkpoint}-{kind}"
        picture = Image.open(card.parent / link).convert("RGB")
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
        picture.quantize(256).save(HERE / target, optimize=True)
        text = text.replace(f"]({link})", f"]({target})")
    (HERE / f"{name}.md").write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description="Write the cards of the checkpoints that this project trained.")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"), help="Folder of the runs.")
    runs = parser.parse_args(argv).runs_dir
    copy_card(Path(DIGITS_CHECKPOINT) / "README.md", "digits")  # which ship.py wrote
    for name, (checkpoint, others, dataset_name) in CARDS.items():
        if not (runs / checkpoint).is_dir():
            print(f"{name}: {runs / checkpoint} is not there.")
            continue
        results = [runs / other for other in others if (runs / other).is_dir()]
        copy_card(save_card(runs / checkpoint, results=results, model_name=name, dataset_name=dataset_name), name)
        print(f"{name}: {name}.md")


if __name__ == "__main__":
    main()
