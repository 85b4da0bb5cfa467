"""Open a page on which one network generates and classifies images.

    python examples/demo/app.py

This is `ddae demo`, as a script, and takes the same options.
"""

import sys

from ddae_hf.commands.main import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
