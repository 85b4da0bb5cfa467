"""Show a denoiser on a page: generate, classify, see layers and noise levels, find nearest neighbours.

    ddae demo
    ddae demo --model_name_or_path runs/quickstart/checkpoint --classifier runs/quickstart/classifier
    ddae demo --space_dir runs/space

By default the page shows the small network of handwritten digits that comes with the package, its sweep, and digits of
MNIST: nothing has to be trained before. With `--space_dir`, what it would show is laid as a folder that is a complete
Space, in place of opening it. The folder runs as it is, with `python app.py`, and
`hf upload NAME/SPACE runs/space . --repo-type space` publishes it.

Of a network that is told a text, such as Stable Diffusion's, the page shows features and where the network looks for
each word of a prompt, on photographs or on images of a data set.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..demo.space import lay_space
from ..demo.views import RUN, Demo, DemoOptions
from ..demo.words import TextDemo, is_told_text
from ..experiments.images import DataOptions
from ..experiments.libraries import not_installed
from ..experiments.options import option


@dataclass(kw_only=True)
class Arguments(DemoOptions):
    """What the page shows, and where."""

    host: str | None = option(None, "Address to listen on; by default only this machine can open the page.")
    port: int | None = option(None, "Port; by default the first free one from 7860 on.")
    space_dir: str | None = option(None, "New or empty folder to write a Space to, in place of opening the page.")


KINDS = (DataOptions, Arguments)


def main(data: DataOptions, options: Arguments) -> None:
    """Run the command."""
    has_images = data.dataset_name is not None or data.train_data_dir is not None
    told_text = is_told_text(options.model_name_or_path, options.cache_dir)
    if told_text and options.space_dir is not None:
        raise ValueError(
            f"space_dir is {options.space_dir}, but {options.model_name_or_path} is told a text: a Space is laid of "
            "networks that generate on it. Leave space_dir out to open the page."
        )
    try:
        if options.space_dir is None:
            from ..demo.page import show  # which a Space that is laid needs not
        if not has_images and not told_text:
            data.dataset_name = str(RUN / "digits")
            if not Path(data.dataset_name).exists():
                from ..experiments.digits import mnist, write_digits  # which a Space that runs needs not

                write_digits(Path(data.dataset_name), mnist())
    except ModuleNotFoundError as error:
        raise ValueError(not_installed("ddae demo", error.name, "demo")) from error
    if told_text:
        images = data.open(options.cache_dir) if has_images else None
        show(TextDemo(options, images), options.host, options.port)
        return
    if options.space_dir is None:
        show(Demo(options, data.open(options.cache_dir)), options.host, options.port)
        return
    folder = Path(options.space_dir)
    missing = lay_space(folder, data, options)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder} is a Space of {size / 1e6:.1f} MB. To try it: cd {folder} && python app.py")
    if missing:
        print(f"It has no sweep. {missing}")
