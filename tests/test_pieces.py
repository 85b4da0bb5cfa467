"""Arrays in pieces: what is read, how often, and that it is the same wherever it is kept."""

import numpy as np
import psutil
import pytest
import torch

from ddae_hf.experiments import pieces
from ddae_hf.experiments.pieces import Pieces

CPU = torch.device("cpu")
ROWS = np.array([7, 1, 2, 9, 4])


class Counted(np.ndarray):
    """An array that notes how many rows each reading of it takes."""

    def __getitem__(self, rows):
        found = np.asarray(self)[rows]
        self.reads.append(len(found))
        return found


def counted(values):
    array = np.asarray(values).view(Counted)
    array.reads = []
    return array


def arrays(seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=(10, 3)).astype(dtype)


def whole(found):
    """What a pass gives, as one tensor (groups, P, rows, C)."""
    parts = [(part, piece.clone()) for part, piece in found]
    ends = [i + 1 for i, (part, _) in enumerate(parts) if part.stop == len(ROWS)]
    starts = [0, *ends[:-1]]
    return torch.stack([torch.cat([piece for _, piece in parts[i:k]], 1) for i, k in zip(starts, ends, strict=True)])


@pytest.mark.parametrize("size", [2, 5, 100])
@pytest.mark.parametrize("keep", [True, False])
def test_every_pass_gives_every_row_once_and_in_order(keep, size):
    groups = [[arrays(0), arrays(1, np.float64)], [arrays(2), arrays(3)]]
    found = Pieces(groups, ROWS, size, CPU, keep=keep)
    expected = torch.from_numpy(np.stack([[array[ROWS].astype("f4") for array in group] for group in groups]))
    for _ in range(3):
        assert torch.equal(whole(found), expected)
        assert all(piece.shape[1] == part.stop - part.start <= size for part, piece in found)
    found.change(lambda piece: piece.mul_(2))
    found.change(lambda piece: piece.add_(1))
    for _ in range(2):
        assert torch.equal(whole(found), 2 * expected + 1)
    assert all(array.flags.writeable for group in groups for array in group)
    assert np.array_equal(groups[0][0], arrays(0))  # what is changed is a copy


@pytest.mark.parametrize(("free", "passes_read"), [(4 * 5 * 3 * 4, 1), (4 * 5 * 3 * 4 - 1, 3)])
def test_what_takes_a_share_of_the_free_memory_is_read_once(free, passes_read, monkeypatch):
    monkeypatch.setattr(pieces, "free_memory", lambda device: free)
    array = counted(arrays())
    found = Pieces([[array]], ROWS, 2, CPU)
    for _ in range(3):
        list(found)
    assert array.reads == [2, 2, 1] * passes_read


def test_a_pass_that_ends_early_keeps_nothing():
    array = counted(arrays())
    found = Pieces([[array]], ROWS, 2, CPU)
    next(iter(found))
    assert whole(found).shape == (1, 1, 5, 3) and array.reads == [2, 2, 2, 1]


def test_free_memory_on_a_processor_is_that_of_the_system():
    assert 0 < pieces.free_memory(CPU) <= psutil.virtual_memory().total


@pytest.mark.gpu
@pytest.mark.parametrize("keep", [True, False])
def test_pieces_on_a_gpu_are_those_in_memory(keep):
    """Of 64 MiB each, so that copies and what is computed meanwhile would meet."""
    device = torch.device("cuda")
    values = np.random.default_rng(0).normal(size=(2**18, 512)).astype(np.float32)
    rows = np.arange(len(values))
    found = Pieces([[values], [values[::-1]]], rows, 2**15, device, keep=keep)
    found.change(lambda piece: piece.mul_(2))
    for _ in range(3):
        sums = [piece.sum((0, 2)) for _, piece in found]
        expected = torch.from_numpy(2 * np.concatenate([values.sum(1), values[::-1].sum(1)]))
        torch.testing.assert_close(torch.cat(sums).cpu(), expected, rtol=1e-4, atol=1e-3)


def test_memory_is_that_of_the_container(monkeypatch, tmp_path):
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(pieces, "CONTAINER", (limit, used))
    everything = pieces.free_memory(torch.device("cpu"))
    assert everything > 2**20
    used.write_text("1000\n")
    for said, expected in (("max", None), ("4000", 3000), ("500", 0)):
        limit.write_text(f"{said}\n")
        found = pieces.free_memory(torch.device("cpu"))
        assert found > 2**20 if expected is None else found == expected
