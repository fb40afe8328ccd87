"""The lease that lets one job at a time write to an output in a bucket."""

import os
import threading
import time
from types import SimpleNamespace

import pytest

from ppcl.errors import UserError
from ppcl.storage.lease import LOCK, hold_lease


def test_a_second_job_is_refused_and_a_dead_ones_place_is_taken(store, monkeypatch):
    with hold_lease(store) as check:
        check()
        with pytest.raises(UserError, match="another ppcl job is writing to s3://"), hold_lease(store):
            pass
    assert LOCK not in store.objects()
    with hold_lease(store) as check:
        # By the store's clock: this node's is an hour off.
        monkeypatch.setattr("time.time", lambda real=time.time: real() + 3600)
        with pytest.raises(UserError, match="another ppcl job is writing to"), hold_lease(store):
            pass
        monkeypatch.setattr("ppcl.storage.lease._DEAD_AFTER", -1.0)
        with hold_lease(store), pytest.raises(UserError, match="another ppcl job took over"):
            check()


def test_the_lock_of_a_process_that_died_on_this_machine_is_free_at_once(store, monkeypatch):
    with monkeypatch.context() as patch:
        # A number above those that the kernel gives.
        patch.setattr("ppcl.storage.lease.os", SimpleNamespace(getpid=lambda: 2**22 + 1, readlink=os.readlink))
        patch.setattr("ppcl.storage.lease._Lease.release", lambda self: None)
        with hold_lease(store):
            pass
    with hold_lease(store) as check:
        check()


def test_one_of_many_that_start_together_gets_the_place(store):
    got, ready = [], threading.Barrier(4)

    def start():
        ready.wait()
        try:
            with hold_lease(store):
                got.append(True)
                ready.wait(60)
        except UserError:
            got.append(False)
            ready.wait(60)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False, False, False, True]
