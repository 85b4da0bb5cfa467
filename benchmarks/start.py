r"""How long a start takes: importing `ddae_hf` beyond the classes that it builds on, and the first feature.

    python -m benchmarks.start --model_name_or_path runs/quickstart/checkpoint

Every start is a process of its own, in turn; the first round fills the disk's cache and is not counted. What `ddae_hf`
adds is timed inside a process that has imported those classes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ddae_hf.experiments.arrays import write_json

from . import measure

CLASSES = """\
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.image_processing_backends import PilBackend
from diffusers import DiTTransformer2DModel, UNet2DModel
"""
OURS = """\
import time
started = time.perf_counter()
import ddae_hf
print(time.perf_counter() - started)
"""
FEATURE = """\
from PIL import Image
from ddae_hf import DDAEImageProcessor, DDAEModel
processor, model = (kind.from_pretrained({path!r}) for kind in (DDAEImageProcessor, DDAEModel))
assert model(**processor(Image.new("RGB", (32, 32)), return_tensors="pt")).pooler_output.isfinite().all()
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model_name_or_path", required=True, help="Checkpoint of the first feature.")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/start.json"))
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}: it must be at least 1.")
    programs = [CLASSES, CLASSES + OURS, FEATURE.format(path=args.model_name_or_path)]
    added: list[float] = []

    def start(program: str) -> None:
        run = subprocess.run([sys.executable, "-c", program], check=False, stdout=subprocess.PIPE, text=True)
        if run.returncode:
            raise SystemExit("A process ended with the error above; is --model_name_or_path a checkpoint?")
        added.extend(float(line) for line in run.stdout.splitlines())

    calls = {program: lambda program=program: start(program) for program in programs}
    classes, _, feature = measure.in_turn(calls, args.repeats, "cpu").values()
    seconds = {"process with the classes of transformers and diffusers": classes}
    seconds |= {"import of ddae_hf after them": added[1:], "process with the first feature": feature}
    rows = [
        [name, f"{measure.median(each):.3f}", f"{min(each):.3f}", f"{max(each):.3f}"] for name, each in seconds.items()
    ]
    write_json(args.output, {"seconds": seconds, "facts": measure.facts("cpu")})
    print(measure.table(["start of", "seconds, median", "least", "most"], rows))


if __name__ == "__main__":
    main()
