from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlexit.interrupts import Diverged, StopFlag, Stopped, stop_on_signals

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_raises_a_flag_and_nothing_else(number):
    with stop_on_signals() as stop:
        assert not stop()
        assert stop.signum is None
        signal.raise_signal(number)
        assert stop()
        assert stop.signum == number


def test_handlers_are_given_back_even_after_an_error():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyError), stop_on_signals():
        raise KeyError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_every_use_has_a_flag_of_its_own():
    with stop_on_signals():
        signal.raise_signal(signal.SIGTERM)
    with stop_on_signals() as stop:
        assert not stop()
    assert not StopFlag()()


@pytest.mark.parametrize(("first", "second"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGINT"), ("SIGTERM", "SIGTERM")])
def test_a_second_signal_ends_at_once(first, second):
    program = (
        "import signal, sys\n"
        "from rlexit.interrupts import stop_on_signals\n"
        "with stop_on_signals() as stop:\n"
        f"    signal.raise_signal(signal.{first})\n"
        "    print('still here', stop(), flush=True)\n"
        f"    signal.raise_signal(signal.{second})\n"
        "    print('too late')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout == "still here True\n"
    assert done.stderr == ""
    assert done.returncode == 128 + getattr(signal, second)


def test_divergence_is_bad_input_for_the_command_line_and_a_stop_is_not():
    assert issubclass(Diverged, ValueError)
    assert not issubclass(Stopped, (ValueError, LookupError, OSError))
