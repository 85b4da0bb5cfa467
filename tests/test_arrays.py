"""Arrays on disk: what is damaged is never used, and processes that share a folder get what one alone would."""

import errno
import itertools
import json
import logging
import multiprocessing
import os
import resource
import signal
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddae_hf.experiments import arrays
from ddae_hf.experiments.arrays import (
    described_folder,
    fill,
    locked,
    open_array,
    read_json,
    rows_done,
    write_array,
    written_whole,
)

from .conftest import together

COUNT, WIDTH = 7, 3
VALUES = {name: np.random.default_rng(seed).normal(size=(COUNT, WIDTH)).astype("f4") for seed, name in enumerate("ab")}


class Rows:
    """Rows of both arrays, in twos, which stop after some batches or take their time; `read` are those asked for."""

    def __init__(self, stop_after=None, seconds=0.0):
        self.stop_after, self.seconds, self.read = stop_after, seconds, []

    def __call__(self, start, names):
        for batch, first in enumerate(range(start, COUNT, 2)):
            if batch == self.stop_after:
                raise KeyboardInterrupt
            time.sleep(self.seconds)
            rows = slice(first, min(first + 2, COUNT))
            self.read += [(name, row) for name in names for row in range(COUNT)[rows]]
            yield {name: torch.from_numpy(VALUES[name][rows]) for name in names}


def get(folder, rows=None, names="ab", **options):
    return fill(folder, {name: (WIDTH,) for name in names}, COUNT, rows or Rows(), **options)


def check(found, names="ab"):
    assert list(found) == list(names)
    assert all(np.array_equal(found[name], VALUES[name]) for name in names)


def change(path, position, data):
    content = bytearray(path.read_bytes())
    content[position : position + len(data)] = data
    path.write_bytes(content)


def swap(first, second):
    first.rename(first.with_suffix(".other"))
    second.rename(first)
    first.with_suffix(".other").rename(second)


DAMAGES = {
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a row of zeros": lambda path: change(path, path.stat().st_size - 4 * WIDTH, bytes(4 * WIDTH)),
    "one bit": lambda path: change(path, 140, bytes([path.read_bytes()[140] ^ 1])),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 5),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "swapped": lambda path: swap(path, path.with_name("b.npy")),
    "text": lambda path: path.write_text("Not found"),
    "another type": lambda path: np.save(path, VALUES["a"].astype("f8")),
    "another order": lambda path: np.save(path, np.asfortranarray(VALUES["a"])),
    "pickled": lambda path: np.save(path, np.array([{}, None]), allow_pickle=True),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_array_is_never_used(damage, tmp_path):
    check(get(tmp_path))
    DAMAGES[damage](tmp_path / "a.npy")
    rows = Rows()
    with pytest.raises(ValueError, match=r"a\.npy is damaged \(.*delete this folder") as error:
        get(tmp_path, rows)
    assert "allow_pickle" not in str(error.value) and not rows.read
    (tmp_path / "a.npy").unlink()  # as the message says
    if damage == "swapped":
        (tmp_path / "b.npy").unlink()
    check(get(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"a": "7"}',
        '{"a": {"rows": 7}}',
        '{"a": {"count": -1, "crc32": 0}}',
        '{"a": {"count": 7, "crc32": "1"}}',
        "\0" * 40,
    ],
)
def test_damaged_notes_are_never_used(content, tmp_path):
    get(tmp_path)
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(ValueError, match=r"rows\.json is damaged \(.*delete this folder"):
        get(tmp_path)


def test_a_description_that_is_not_that_of_its_folder_is_never_used(tmp_path):
    folder = described_folder(tmp_path, {"weights": "abc"})
    assert described_folder(tmp_path, {"weights": "abc"}) == folder != described_folder(tmp_path, {"weights": "abd"})
    assert read_json(folder / "identity.json") == {"weights": "abc"}
    for content in ("", '{"weights": "abd"}'):
        (folder / "identity.json").write_text(content)
        with pytest.raises(ValueError, match=r"identity\.json is damaged \(.*delete this folder"):
            described_folder(tmp_path, {"weights": "abc"})


def test_an_array_is_read_through_once_a_process_and_state(tmp_path, monkeypatch):
    get(tmp_path)
    read = []
    original = zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda data, *rest: (read.append(data.nbytes), original(data, *rest))[1])
    get(tmp_path)
    assert not read  # written by this process
    os.utime(tmp_path / "a.npy")
    get(tmp_path), get(tmp_path)
    assert read == [VALUES["a"].nbytes]


@pytest.mark.parametrize("damage", ["zeroed", "cut", "empty", "text"])
def test_a_damaged_start_is_not_continued(damage, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        get(tmp_path, Rows(stop_after=2))
    assert rows_done(tmp_path) == {"a": 4, "b": 4} and not list(tmp_path.glob("*.npy"))
    DAMAGES[damage](tmp_path / "a.npy.partial")
    with pytest.raises(ValueError, match=r"a\.npy\.partial is damaged \(.*delete this folder"):
        get(tmp_path)


@pytest.mark.parametrize("killed", ["before a note", "in a write", "before its name"])
def test_a_killed_process_leaves_what_can_be_continued(killed, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        get(tmp_path, Rows(stop_after=2))
    if killed == "before its name":
        get(tmp_path)
        (tmp_path / "a.npy").rename(tmp_path / "a.npy.partial")
    else:  # rows, or a part of one, of which no note was taken
        with (tmp_path / "a.npy.partial").open("ab") as file:
            file.write(bytes(4 * WIDTH if killed == "before a note" else 5))
    rows = Rows()
    check(get(tmp_path, rows))
    assert rows.read == [] if killed == "before its name" else [row for _, row in rows.read] == [4, 5, 4, 5, 6, 6]


@pytest.mark.parametrize(("seconds", "lost"), [(0.0, 0), (3600.0, COUNT)])
def test_a_process_that_is_killed_loses_what_came_after_its_last_note(seconds, lost, tmp_path, monkeypatch):
    """And its lock is free."""
    monkeypatch.setattr(arrays, "_NOTE_SECONDS", seconds)

    def is_killed(start, names):
        yield from Rows()(start, names)
        os.kill(os.getpid(), signal.SIGKILL)

    assert together(lambda: get(tmp_path, is_killed)) == [-signal.SIGKILL]
    assert all((tmp_path / f"{name}.npy.partial").stat().st_size > VALUES[name].nbytes for name in "ab")
    rows = Rows()
    check(get(tmp_path, rows))
    assert len(rows.read) == 2 * lost


@pytest.mark.parametrize("seconds", [0.0, 0.005, 3600.0])
def test_a_process_that_is_killed_at_any_moment_leaves_what_can_be_continued(seconds, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_NOTE_SECONDS", seconds)
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        process = multiprocessing.get_context("fork").Process(target=lambda to=folder: get(to, Rows(seconds=0.002)))
        process.start()
        time.sleep(0.003 * attempt)
        process.kill()
        process.join(60)
        check(get(folder))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_what_came_before_an_exception_is_kept(error, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_NOTE_SECONDS", 3600.0)

    def fails(start, names):
        yield from itertools.islice(Rows()(start, names), 2)
        raise error("of its own")

    with pytest.raises(error, match="^of its own$"):
        get(tmp_path, fails)
    assert rows_done(tmp_path) == {"a": 4, "b": 4}
    rows = Rows()
    check(get(tmp_path, rows))
    assert [row for _, row in rows.read] == [4, 5, 4, 5, 6, 6]


def test_where_the_last_note_fails_too_the_first_error_is_told_and_the_note_before_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_NOTE_SECONDS", 0.0)
    original = os.fsync

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fails(start, names):
        yield from itertools.islice(Rows()(start, names), 2)
        monkeypatch.setattr(os, "fsync", full)
        raise RuntimeError("the network fails")

    with pytest.raises(RuntimeError, match="the network fails"):
        get(tmp_path, fails)
    monkeypatch.setattr(os, "fsync", original)
    assert rows_done(tmp_path) == {"a": 4, "b": 4}
    check(get(tmp_path))


def test_the_disk_is_waited_for_every_few_seconds_and_at_the_end(tmp_path, monkeypatch):
    """With a clock on which every look takes a second: a note is taken each third batch at most."""
    clock = itertools.count()
    monkeypatch.setattr(arrays, "_NOTE_SECONDS", 3.0)
    monkeypatch.setattr(arrays, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    synced = []
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.readlink(f"/proc/self/fd/{file}")), original(file)))
    check(get(tmp_path))  # in four batches
    assert [Path(path).name for path in synced] == ["a.npy.partial", "b.npy.partial"] * 2
    assert all(path.startswith(str(tmp_path)) for path in synced)


@pytest.mark.parametrize("stop_after", [None, 2])
def test_a_batch_on_its_way_from_a_gpu_is_written_when_the_next_one_has_come(stop_after, tmp_path, monkeypatch):
    """Copies that are empty until their event is waited for; the last one is waited for at the end, however it ends."""
    waits = []

    class Event:
        def __init__(self, batch, copies):
            self.batch, self.copies = batch, copies

        def synchronize(self):
            waits.append(len(sent))
            for name, values in self.batch.items():
                self.copies[name].copy_(values)

    sent = []

    def send(batch):
        copies = {name: torch.zeros_like(values) for name, values in batch.items()}
        sent.append(batch)
        return copies, Event(batch, copies)

    monkeypatch.setattr(arrays, "_sent_to_host", send)
    if stop_after is None:
        check(get(tmp_path))
        assert waits == [2, 3, 4, 4]
        return
    with pytest.raises(KeyboardInterrupt):
        get(tmp_path, Rows(stop_after=stop_after))
    assert waits == [2, 2] and rows_done(tmp_path) == {"a": 4, "b": 4}
    check(get(tmp_path))


@pytest.mark.gpu
def test_batches_on_a_gpu_are_written_as_those_in_memory(tmp_path):
    def on_gpu(start, names):
        for batch in Rows()(start, names):
            yield {name: values.cuda() for name, values in batch.items()}

    check(get(tmp_path, on_gpu))


def test_what_one_array_has_already_is_not_written_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        get(tmp_path, Rows(stop_after=2), names="a")
    with pytest.raises(KeyboardInterrupt):
        get(tmp_path, Rows(stop_after=1), names="b")
    rows = Rows()
    check(get(tmp_path, rows))
    assert rows.read[0] == ("a", 2) and rows_done(tmp_path) == {"a": COUNT, "b": COUNT}


@pytest.mark.parametrize("values", [torch.zeros(7, WIDTH + 1), torch.zeros(7, WIDTH, dtype=torch.float64)])
def test_rows_of_another_shape_or_type_are_refused(values, tmp_path):
    with pytest.raises(ValueError, match="but \\(3,\\) and float32 were announced"):
        get(tmp_path, lambda start, names: [{"a": values}], names="a")


def as_before(folder, values, count=COUNT):
    """As version 0.1.0 left an array: whole from the start on, without a checksum."""
    np.save(folder / "a.npy", values)
    (folder / "rows.json").write_text(json.dumps({"a": count}))


def test_a_full_disk_is_told_with_the_file_and_what_is_done_is_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        get(tmp_path, Rows(stop_after=2))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = max(path.stat().st_size for path in tmp_path.glob("*.partial"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # no file can become larger
    try:
        with pytest.raises(OSError, match=f"^{tmp_path}/.*partial could not be written: File too large. Make room"):
            get(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    rows = Rows()
    check(get(tmp_path, rows))
    assert min(row for _, row in rows.read) == 4


def test_arrays_without_a_checksum_are_computed_again(tmp_path, caplog):
    as_before(tmp_path, np.zeros((COUNT, WIDTH), "f4"))
    check(get(tmp_path, names="a"), "a")
    assert caplog.messages == [
        f"{tmp_path / 'a.npy'} has no checksum, because version 0.1.0 wrote none: it is computed again."
    ]
    (tmp_path / "rows.json").unlink()
    np.save(tmp_path / "a.npy", np.zeros((COUNT, WIDTH), "f4"))
    check(get(tmp_path, names="a"), "a")


def test_a_written_array_is_read_back_or_refused(tmp_path):
    labels = np.arange(COUNT) % 3
    write_array(tmp_path, "labels", labels)
    written = (tmp_path / "labels.npy").stat().st_mtime_ns
    write_array(tmp_path, "labels", labels.copy())
    assert (tmp_path / "labels.npy").stat().st_mtime_ns == written
    assert np.array_equal(open_array(tmp_path, "labels", (COUNT,), "int64"), labels)
    write_array(tmp_path, "labels", labels[::-1])
    assert np.array_equal(open_array(tmp_path, "labels", (COUNT,), "int64"), labels[::-1])
    change(tmp_path / "labels.npy", 128, bytes(8 * COUNT))
    with pytest.raises(ValueError, match=r"labels\.npy is damaged"):
        open_array(tmp_path, "labels", (COUNT,), "int64")


# --- Several processes ---


@pytest.mark.parametrize(("first", "second"), [("ab", "ba"), ("ba", "ab"), ("a", "b"), ("a", "ab"), ("ab", "ab")])
def test_processes_that_share_a_folder_compute_every_row_once(first, second, tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()

    def work(number, names):
        rows = Rows(seconds=0.01)
        check(get(folder, rows, names), names)
        (tmp_path / f"{number}.json").write_text(json.dumps(rows.read))

    assert together(lambda: work(0, first), lambda: work(1, second)) == [0, 0]
    read = [tuple(row) for i in range(2) for row in json.loads((tmp_path / f"{i}.json").read_text())]
    assert sorted(read) == [(name, row) for name in "ab" for row in range(COUNT)]
    assert {path.name for path in folder.iterdir()} == {"a.npy", "b.npy", "rows.json", "rows.lock"}
    check(get(folder))


def test_a_process_that_waits_says_so_and_one_that_only_reads_does_not_wait(tmp_path, caplog):
    get(tmp_path, names="a")
    with locked(tmp_path):
        check(get(tmp_path, names="a"), "a")
        assert not caplog.messages
        other = threading.Thread(target=lambda: get(tmp_path, names="b"))
        with caplog.at_level(logging.WARNING):
            other.start()
            other.join(0.3)
        assert other.is_alive()
        assert caplog.messages == [f"Another process is filling {tmp_path}: waiting until it is done."]
    other.join(10)
    check(get(tmp_path))


def test_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "note.json"
    with written_whole(path) as first:
        first.write_text("first")
        with written_whole(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    with pytest.raises(KeyboardInterrupt), written_whole(path) as third:
        third.write_text("thi")
        assert third.name.endswith(".partial")  # which is never pushed
        raise KeyboardInterrupt
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
    plain = tmp_path / "plain"
    plain.write_text("")
    assert path.stat().st_mode == plain.stat().st_mode  # others may read it


def test_no_file_has_a_temporary_name_that_processes_share():
    root = Path(__file__).parent.parent
    for path in [*root.glob("ddae_hf/*.py"), *root.glob("examples/**/*.py")]:
        assert 'with_suffix(".partial")' not in path.read_text(), path
