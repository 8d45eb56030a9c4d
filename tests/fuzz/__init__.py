"""Random calls and sequences of calls, each made from its number: `python -m fuzz --help`."""
