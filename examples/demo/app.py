"""Open a page on which one network generates and classifies images.

    python examples/demo/app.py

This is `ddae demo`, as a script, and takes the same options.
"""

import sys

from ddae_hf.commands.main import run

if __name__ == "__main__":
    run(["demo", *sys.argv[1:]])
