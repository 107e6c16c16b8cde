"""Processes that share a file system take turns, and files never claim to be complete too early."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dvmsr_jax import files
from dvmsr_jax.errors import UserError


def test_only_one_at_a_time_has_its_turn(tmp_path, locks):
    inside, most = [], []

    def work(i):
        with files.turn(tmp_path / "lock"):
            inside.append(i)
            most.append(len(inside))
            threading.Event().wait(0.02)
            inside.remove(i)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
    assert most == [1] * 16
    assert list(tmp_path.iterdir()) == []


def test_a_turn_ends_with_an_error(tmp_path, locks):
    with pytest.raises(KeyboardInterrupt), files.turn(tmp_path / "lock"):
        raise KeyboardInterrupt
    with files.turn(tmp_path / "lock"):
        assert (tmp_path / "lock").exists()


def test_nobody_waits_for_a_killed_process(tmp_path, capsys):
    (tmp_path / "lock").touch()
    with files.turn(tmp_path / "lock"):
        pass
    assert capsys.readouterr() == ("", "")


def test_without_locks_long_work_does_not_look_like_a_killed_process(
    tmp_path, monkeypatch, no_locks, capsys
):
    path = tmp_path / "lock"
    monkeypatch.setattr(files, "_TOUCH", 0.05)
    monkeypatch.setattr(files, "_PATIENCE", 0.5)

    def wait():
        with files.turn(path):
            return True

    with ThreadPoolExecutor(1) as pool:
        with files.turn(path):
            waits = pool.submit(wait)
            threading.Event().wait(1.5)
            assert not waits.done()
        assert waits.result()
    assert capsys.readouterr().err == f"waiting for the process that holds {path}\n"

    path.touch()
    os.utime(path, (0, 0))
    with pytest.raises(UserError, match=f"{path}: .* has not touched it for .* remove the file"):
        wait()
    assert path.exists()
