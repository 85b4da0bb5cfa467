"""Commands: options from the command line, an experiment, its results as a table and files."""
