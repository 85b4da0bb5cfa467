"""The page of this Space: `python app.py` is `ddae demo` with the options of `demo.yaml`, and takes the same options.

Variables of the Space name other things to show, such as checkpoints on the Hub.
"""

import os
import sys
from pathlib import Path

from ddae_hf.commands.main import run

VARIABLES = {
    "DDAE_CHECKPOINT": "model_name_or_path",
    "DDAE_CLASSIFIER": "classifier",
    "DDAE_SWEEP": "sweep",
    "DDAE_FEATURES_DIR": "features_dir",
    "DDAE_DATASET_NAME": "dataset_name",
}

if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent)
    named = [f"--{option}={os.environ[variable]}" for variable, option in VARIABLES.items() if variable in os.environ]
    run(["demo", "--config", "demo.yaml", *named, *sys.argv[1:]])
