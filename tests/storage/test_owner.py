"""Two commands in one folder: the second is refused and the first is never disturbed, here and in a bucket."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from solar_jax.errors import UserError
from solar_jax.storage import bucket_folder, owner
from solar_jax.storage.owner import OWNER, owned

HOLD = """
import pathlib, sys, time
from etils import epath
from solar_jax.storage import owner
from solar_jax.storage.owner import owned
owner.HEARTBEAT = 0.1
with owned(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder) -> subprocess.Popen:
    """Another process that owns a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def refusal(folder, **how) -> str:
    with pytest.raises(UserError) as e, owned(folder, **how):
        pass
    return str(e.value)


def test_a_second_start_names_host_process_and_when_the_first_last_moved(tmp_path):
    folder = tmp_path / "run"
    first = hold(folder)
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("{}")
    os.utime(folder / "metrics.jsonl", (time.time() - 90,) * 2)
    text = refusal(folder)
    assert text.startswith(f"{folder}: is in use by process {first.pid} on {socket.gethostname()}, which last moved 9")
    first.kill()
    first.wait()
    with owned(folder):  # a lock ends with its process, however that ended
        assert "is in use by process" in refusal(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_folders_beside_each_other_have_owners_of_their_own(tmp_path):
    with owned(tmp_path / "a"), owned(tmp_path / "b"):
        pass


@pytest.fixture
def lease(bucket, request):
    """A folder in the bucket, apart from other tests'."""
    return epath.Path(f"{bucket}/{request.node.name}")


def test_a_lease_in_a_bucket_is_held_renewed_and_given_back(lease, monkeypatch):
    first = hold(lease)
    beats = []
    for _ in range(2):
        beats.append(json.loads((lease / OWNER).read_text())["beat"])
        time.sleep(0.5)
    assert beats[0] < beats[1]
    text = refusal(lease)
    assert f"is in use by process {first.pid} on {socket.gethostname()}, since 20" in text
    assert "If it is gone already, --take_over starts in its place once it has not moved for 60 s." in text
    monkeypatch.setattr(owner, "STALE", 1.0)
    assert "; it lives, so it is not taken over." in refusal(lease, take_over=True)
    first.send_signal(signal.SIGINT)  # ends its `with` block
    first.wait()
    with owned(lease):
        assert bucket_folder.names(lease) == set()  # the owner's record is no content
    assert not (lease / OWNER).exists()


def test_after_a_kill_the_same_machine_goes_on_at_once(lease):
    first = hold(lease)
    first.kill()
    first.wait()
    with owned(lease):
        assert json.loads((lease / OWNER).read_text())["process"] == os.getpid()


def test_a_lease_without_a_sign_of_life_is_taken_over_when_asked_and_its_holder_ends(lease, monkeypatch):
    first = hold(lease)
    first.send_signal(signal.SIGSTOP)  # hangs, as after a preemption that never came
    monkeypatch.setattr(owner, "STALE", 1.0)
    assert "--take_over starts in its place" in refusal(lease)
    with owned(lease, take_over=True):
        first.send_signal(signal.SIGCONT)  # it was not gone
        _, err = first.communicate(timeout=30)
        assert first.returncode == 2
        assert err.splitlines()[-1].startswith(f"error: {lease}: was taken over by process {os.getpid()} on ")
        assert json.loads((lease / OWNER).read_text())["process"] == os.getpid()


def test_of_two_that_start_at_once_one_is_refused(lease, monkeypatch):
    both, outcomes = threading.Barrier(2), []
    read = owner._Lease._read

    def read_together(self):
        found = read(self)
        both.wait(timeout=20)
        return found

    monkeypatch.setattr(owner._Lease, "_read", read_together)

    def start():
        try:
            with owned(lease):
                time.sleep(1)
            outcomes.append("ran")
        except UserError as e:
            outcomes.append(str(e))

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == sorted(["ran", f"{lease}: another process has just started there."])


def test_a_renewal_that_is_late_for_its_own_end_does_not_end_the_process(emulated, monkeypatch):
    """While a renewal waits for the bucket, the lease is given back; the renewal then finds nobody's lease."""
    monkeypatch.setattr(owner, "HEARTBEAT", 0.05)
    monkeypatch.setattr(owner, "PATIENCE", 0.1)
    monkeypatch.setattr(owner.os, "_exit", lambda status: left.append(status))
    write, waits, goes, left = owner._Lease._write, threading.Event(), threading.Event(), []

    def slow(lease, expected):
        if threading.current_thread() is not threading.main_thread():
            waits.set()
            goes.wait(20)
        return write(lease, expected)

    monkeypatch.setattr(owner._Lease, "_write", slow)
    before = set(threading.enumerate())
    with owned(epath.Path(f"{emulated[0]}/late")):
        assert waits.wait(20)
        (renewing,) = set(threading.enumerate()) - before
    goes.set()
    renewing.join(20)
    assert left == []
    assert not bucket_folder.names(epath.Path(f"{emulated[0]}/late"))
