"""The harness of `make test-faults` kills when it says, and sees what is wrong."""

import json
import os
import signal
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from benchmarks.soak import Sample, growths

from .faults.jobs import CLOSE, differences, files_of
from .faults.moments import Counted, Moment, draw
from .faults.processes import Fault, watched


def ten_files():
    """Write files as experiments do: an array, then a file that takes another one's place, and so on."""
    Path("out").mkdir()
    for number in range(5):
        torch.save({"number": number}, f"out/{number}.pt")
        Path("out/new").write_text(str(number))
        Path("out/new").replace(f"out/{number}.txt")


def test_a_seed_draws_the_same_moments_again_and_parts_cover_the_whole():
    first, again = ([draw(Random(f"7 {part}"), part, 10) for part in range(10)] for _ in range(2))
    assert first == again and {moment.kind for moment in first} == {"changes", "seconds"}
    assert [int(10 * moment.share) for moment in first] == list(range(10))


def test_a_process_is_killed_before_the_change_that_the_moment_names(tmp_path):
    whole = watched(ten_files, tmp_path)
    (counted,) = whole.counted
    assert whole.well and counted.changes == 1 + 5 * 4
    for tears in (False, True):
        folder = tmp_path / f"killed-{tears}"
        folder.mkdir()
        ended = watched(ten_files, folder, Fault(Moment("changes", 0.5, tears), counted))
        assert ended.statuses == [-signal.SIGKILL] and ended.killed and not ended.well
        there = {path.name: path.stat().st_size for path in (folder / "out").iterdir()}
        assert {"0.pt", "0.txt", "1.pt", "1.txt"} <= set(there) and "2.txt" not in there and "3.pt" not in there
        sizes = [(tmp_path / "out" / "2.pt").stat().st_size, there.get("2.pt")]
        assert sizes[1] == (sizes[0] // 2 if tears else sizes[0])  # the 11th of 21: the archive is there


def test_a_process_is_killed_after_so_many_seconds_and_a_file_ends_at_the_limit(tmp_path):
    def waits():
        Path("out").mkdir()
        signal.pause()

    def writes():
        Path("out").write_bytes(bytes(2000))

    ended = watched(waits, tmp_path, Fault(Moment("seconds", 0.5), Counted(0, 1.0)))
    assert ended.killed and 0.4 < ended.seconds and ended.survived < ended.seconds
    (tmp_path / "limited").mkdir()
    ended = watched(writes, tmp_path / "limited", Fault(bytes=1000))
    assert ended.statuses == [1] and ended.sentence is None and "File too large" in ended.text


@pytest.mark.parametrize("change", ["flipped", "cut", "missing", "larger"])
def test_a_result_that_differs_is_seen(tmp_path, change):
    for name in ("whole", "found"):
        (tmp_path / name / "deep").mkdir(parents=True)
        save_file({"weight": np.arange(8.0)}, tmp_path / name / "deep" / "model.safetensors")
        (tmp_path / name / "results.json").write_text(json.dumps({"loss": 0.5, "seconds": os.times().elapsed}))
        np.save(tmp_path / name / "rows.npy", np.arange(4.0))
    expected, found = tmp_path / "whole", tmp_path / "found"
    names = list(files_of(expected))
    assert len(names) == 3 and not list(differences(expected, found, names, 0.0))
    path = found / "deep" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if change == "missing":
        path.unlink()
    elif change == "larger":
        np.save(found / "rows.npy", np.arange(4.0) * (1 + 3 * CLOSE))
    else:
        path.write_bytes(content if change == "flipped" else content[:-1])
    (problem,) = differences(expected, found, names, CLOSE)
    words = {"flipped": "differs by", "cut": "cannot be read", "missing": "is missing", "larger": "differs by"}
    assert words[change] in problem


def test_growth_is_that_of_the_second_half_and_beyond_the_bound_it_is_too_much():
    steady = [Sample(10.0 * n, 500 + 200 * (n < 10) * n / 10 + 0.07 * n, 9, 7) for n in range(40)]
    assert [growth.too_much for growth in growths(steady)] == [False] * 3
    leaks = [Sample(10.0 * n, 500 + 0.13 * n, 9 + n // 10, 7) for n in range(40)]
    assert [growth.too_much for growth in growths(leaks)] == [True, True, False]
    assert growths(leaks)[0].growth == pytest.approx(0.13 * 19)
    with pytest.raises(ValueError, match="1 rounds came in the second half, and 4 are needed"):
        growths(steady[:2])
