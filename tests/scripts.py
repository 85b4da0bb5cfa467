"""The scripts as their users start them: the one place that knows how."""

import importlib


def run(name, *options):
    """Run a script in this process, with options of any type as the command line would give them."""
    importlib.import_module(name).main([str(option) for option in options])
