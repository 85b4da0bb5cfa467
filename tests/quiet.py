"""What no experiment may do, whoever calls it: print, or draw from the global generators."""

import contextlib
import random

import numpy as np
import torch


@contextlib.contextmanager
def quiet(capsys):
    """Check that what is done inside leaves the standard output and the global generators alone."""
    random.seed(11)
    np.random.seed(12)
    torch.manual_seed(13)
    capsys.readouterr()
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    python, numpy, state = before
    assert capsys.readouterr().out == ""
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), state)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy, strict=True))
