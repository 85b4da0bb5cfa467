"""Commands as their users start them: the one place that knows how."""

from ddae_hf.commands.main import main


def run(name, *options):
    """Run a command in this process, with options of any type as the command line would give them."""
    main([name, *(str(option) for option in options)])
