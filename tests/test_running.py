"""How commands end."""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from ddae_hf.commands import configs, running
from ddae_hf.commands.running import run_command, sentences, show_log, usable_cores
from ddae_hf.experiments.stopping import Interrupted, Stopping

from .test_sweeping import save_checkpoint

ROOT = Path(__file__).parent.parent


def test_what_a_user_can_mend_is_a_sentence_and_the_rest_a_traceback():
    for error in (ValueError("a is 1: give 2."), OSError("no space"), FileNotFoundError("gone")):
        with pytest.raises(SystemExit) as stopped, sentences():
            raise error
        assert stopped.value.code == str(error)
    with pytest.raises(TypeError), sentences():
        raise TypeError("a fault of ours")
    with sentences():
        pass


def test_a_process_that_lost_another_says_so_and_other_errors_stay(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    gloo = "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]: Connection reset by peer."
    for error in (RuntimeError(gloo), torch.distributed.DistNetworkError("The client socket has timed out.")):
        with (
            pytest.raises(SystemExit, match="^Process 1 stops, .* latest .*torch says: .*(reset|timed out)"),
            sentences(),
        ):
            raise error
    with pytest.raises(RuntimeError, match="size mismatch"), sentences():
        raise RuntimeError("size mismatch")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_interrupted_ends_with_the_status_of_its_signal(number, capsys):
    with pytest.raises(SystemExit) as stopped, sentences():
        raise Interrupted("checkpoint-3 is saved: resume it.", number)
    assert stopped.value.code == 128 + number
    assert capsys.readouterr().err == "checkpoint-3 is saved: resume it.\n"


def test_what_keeps_nothing_of_its_own_is_interrupted_with_a_sentence_too(capsys):
    with pytest.raises(SystemExit) as stopped, sentences():
        raise KeyboardInterrupt
    assert stopped.value.code == 130 and "starts again if nothing was" in capsys.readouterr().err


def test_sigterm_ends_as_ctrl_c_does_and_temporary_folders_go(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped, sentences(), tempfile.TemporaryDirectory() as folder:
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL  # which would end these tests
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)  # as launchers repeat it
    assert stopped.value.code == 143 and "starts again if nothing was" in capsys.readouterr().err
    assert not Path(folder).exists() and signal.getsignal(signal.SIGTERM) == before


def test_who_takes_sigterm_already_gets_it():
    with sentences(), Stopping() as stopping:
        signal.raise_signal(signal.SIGTERM)
        assert stopping.requested == signal.SIGTERM
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with sentences():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux says which cores are this process's")
@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        ("max 100000\n", 8),
        ("150000 100000\n", 2),
        ("400000 100000\n", 4),
        ("20000 100000\n", 1),
        ("1600000 100000\n", 8),
        (None, 8),
    ],
)
def test_a_container_can_have_fewer_cores_than_its_machine(limit, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(running, "CPU_LIMIT", tmp_path / "cpu.max")
    if limit is not None:
        running.CPU_LIMIT.write_text(limit)
    assert usable_cores() == cores


def test_a_command_takes_no_more_threads_than_cores_unless_its_user_says_how_many(monkeypatch, capsys):
    threads = []
    monkeypatch.setattr(running, "usable_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    run_command(configs, [])
    assert threads == []  # as the environment of these tests says
    monkeypatch.delenv("OMP_NUM_THREADS")
    run_command(configs, [])
    assert threads == [2]


@contextlib.contextmanager
def root_logger():
    """Give the root logger without handlers, as a new process has it, and leave it as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    root.handlers = []
    try:
        yield root
    finally:
        root.handlers = handlers
        root.setLevel(level)


def test_a_line_of_the_log_stands_by_itself_beside_a_progress_bar(capsys):
    class Command:
        """Opens a file as libraries do, and logs in the middle of long work."""

        __name__ = "ddae_hf.commands.working"
        KINDS = configs.KINDS

        @staticmethod
        def main(*options):
            for library in (diffusers_logging, transformers_logging):
                list(library.tqdm(range(3), desc="Loading"))
            for _ in tqdm(range(2), desc="Training", miniters=1, mininterval=0):
                logging.getLogger("ddae_hf.experiments").info("Saved it.")

    with root_logger():
        run_command(Command, [])
    # Beside a bar that another test has left behind, tqdm also moves the cursor up.
    said = re.split(r"(?:[\r\n]|\x1b\[A)+", capsys.readouterr().err)
    assert sum(re.fullmatch(r"\d\d:\d\d:\d\d Saved it\.", line) is not None for line in said) == 2
    assert any("Training" in line for line in said) and not any("Loading" in line for line in said)


OTHERS = ("LOAD REPORT", "values were not passed", "[RANK 0]", "UserWarning", "FutureWarning")


def test_commands_show_bars_and_their_own_log_and_nothing_of_others(digits, tmp_path):
    """In a new process, as a user starts it: libraries warn when they are imported and where nobody has warned yet."""
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    given = ["--model_name_or_path", checkpoint, "--dataset_name", str(digits), "--max_train_samples", "60"]
    given += ["--max_test_samples", "20", "--output_dir"]
    lines = [["probe", *given, str(tmp_path / "probed")]]
    lines += [["finetune", *given, str(tmp_path / "finetuned"), "--max_train_steps", "1"]]
    code = f"from ddae_hf.commands.main import main\nfor words in {lines!r}:\n    main(words)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "finetuned" / "eval_results.json").is_file(), done.stderr
    assert [words for words in OTHERS if words in done.stderr + done.stdout] == []
    bar, log = r".*(\d+%\|| \d+ examples ).*", r"\d\d:\d\d:\d\d .+"
    said = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]
    assert [line for line in said if not re.fullmatch(f"{bar}|{log}", line)] == []
    assert sum(re.fullmatch(bar, line) is not None for line in said) >= 4


@pytest.mark.parametrize(("first", "level"), [(True, logging.INFO), (False, logging.ERROR)])
def test_of_several_processes_one_shows_the_log(first, level):
    with root_logger() as root:
        show_log(first)
        assert root.level == level
