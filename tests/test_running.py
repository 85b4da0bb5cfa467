"""How commands end."""

import signal
import tempfile
from pathlib import Path

import pytest

from ddae_hf.commands.running import sentences
from ddae_hf.experiments.stopping import Interrupted, Stopping


def test_what_a_user_can_mend_is_a_sentence_and_the_rest_a_traceback():
    for error in (ValueError("a is 1: give 2."), OSError("no space"), FileNotFoundError("gone")):
        with pytest.raises(SystemExit) as stopped, sentences():
            raise error
        assert stopped.value.code == str(error)
    with pytest.raises(TypeError), sentences():
        raise TypeError("a fault of ours")
    with sentences():
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_interrupted_ends_with_the_status_of_its_signal(number, capsys):
    with pytest.raises(SystemExit) as stopped, sentences():
        raise Interrupted("checkpoint-3 is saved: resume it.", number)
    assert stopped.value.code == 128 + number
    assert capsys.readouterr().err == "checkpoint-3 is saved: resume it.\n"


def test_what_keeps_nothing_of_its_own_is_interrupted_with_a_sentence_too(capsys):
    with pytest.raises(SystemExit) as stopped, sentences():
        raise KeyboardInterrupt
    assert stopped.value.code == 130 and "starts again where nothing is" in capsys.readouterr().err


def test_sigterm_ends_as_ctrl_c_does_and_temporary_folders_go(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped, sentences(), tempfile.TemporaryDirectory() as folder:
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL  # which would end these tests
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)  # as launchers repeat it
    assert stopped.value.code == 143 and "starts again where nothing is" in capsys.readouterr().err
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
