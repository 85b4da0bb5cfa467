"""A trust harness: commands are killed, starved of space and given damaged files, and must end as if nothing happened.

    python -m tests.faults --moments 20 --seed 7

`moments` draws when something happens and makes it happen, `processes` runs commands, `jobs` says which commands and
what they leave behind, `trials` puts one command through one fault, and `__main__` draws them all from one seed.
"""
