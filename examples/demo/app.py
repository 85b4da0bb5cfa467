"""Open a page on which one network generates and classifies images: this is `ddae demo`, as a script.

python examples/demo/app.py
"""

import sys

from ddae_hf.commands.main import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
