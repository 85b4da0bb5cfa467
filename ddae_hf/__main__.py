"""`python -m ddae_hf NAME` is `ddae NAME`."""

from .commands.main import run

if __name__ == "__main__":
    run()
