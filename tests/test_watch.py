"""The watch over a job's processes, without JAX: threads in place of processes."""

import socket
import threading
import time

import pytest

from kdrl_jax.watch import Watch


class Processes:
    """Watches of one job, each in a thread; what ended them, by process."""

    def __init__(self, num, timeout_s=5.0, strangers=0, silent=False):
        self.ended, self.status = {}, {}
        self.watches = [None] * num
        self._address, self._known = "", threading.Event()
        self._strangers, self._said = strangers, b"" if silent else b"GET / HTTP/1.1\r\n\r\n"
        self._open = []
        threads = [threading.Thread(target=self._start, args=(i, num, timeout_s)) for i in range(num)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)

    def _start(self, i, num, timeout_s):
        def meet(text):
            if i == 0:
                self._address = text
                for _ in range(self._strangers):
                    host, _, port = text.rpartition(":")
                    self._open.append(socket.create_connection((host, int(port))))
                    self._open[-1].sendall(self._said)
                self._known.set()
            assert self._known.wait(10)
            return self._address

        def end(why, status):
            self.ended[i], self.status[i] = why, status

        self.watches[i] = Watch(i, num, meet, host="localhost", timeout_s=timeout_s, end=end)

    def wait(self, num, limit_s=10.0):
        """What ended them, once so many are."""
        last = time.monotonic() + limit_s
        while len(self.ended) < num:
            assert time.monotonic() < last, self.ended
            time.sleep(0.01)
        return self.ended

    def cut(self, i):
        """As if the process were killed."""
        self.watches[i]._over = True
        for peer in self.watches[i]._peers:
            peer.close()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_reaches_all_others_with_its_reason(failing):
    job = Processes(3)
    job.watches[failing].failed("no such file: x", 2)
    ended = job.wait(2)
    assert set(job.status.values()) == {2}, "the others end as the one that failed"
    assert set(ended) == {0, 1, 2} - {failing}
    assert all(f"process {failing} (" in why and "no such file: x" in why for why in ended.values())


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_a_process_that_is_gone_is_named_at_once(killed):
    job = Processes(3, timeout_s=1000.0)
    job.cut(killed)
    ended = job.wait(2)
    assert set(ended) == {0, 1, 2} - {killed}
    assert all(f"process {killed} (" in why and "killed" in why for why in ended.values())
    assert set(job.status.values()) == {1}


@pytest.mark.parametrize("silent", [0, 2])
def test_silence_is_a_failure_after_the_limit(silent):
    job = Processes(3, timeout_s=1.0)
    for peer in job.watches[silent]._peers:
        peer.send = lambda message: None
    ended = job.wait(2)
    others = {i: why for i, why in ended.items() if i != silent}
    assert others.keys() == {0, 1, 2} - {silent}
    assert any("not been heard from for 1 s" in why for why in others.values())


def test_the_end_is_no_failure():
    job = Processes(3)
    threads = [threading.Thread(target=watch.done) for watch in job.watches]
    for thread in threads:
        thread.start()
        time.sleep(0.1)  # one after another: the first ones wait
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    for i in range(3):
        job.cut(i)
    time.sleep(0.3)
    assert job.ended == {}


def test_the_first_failure_is_the_one_that_is_told():
    """What follows from it elsewhere, a broken connection, is no news."""
    job = Processes(3)
    second = threading.Thread(target=job.watches[1].failed, args=("connection reset by peer", 2))
    second.start()
    job.cut(2)
    ended = job.wait(2)
    second.join(10)
    assert "process 2 (" in ended[0]
    assert "process 2 (" in ended[1], "before its own error was told"


def test_strangers_are_not_let_in():
    job = Processes(2, strangers=3)
    assert all(job.watches)
    assert [len(watch._peers) for watch in job.watches] == [1, 1]
    job.watches[1].failed("x", 1)
    assert set(job.wait(1)) == {0}


def test_strangers_that_say_nothing_hold_nobody_up():
    began = time.monotonic()
    job = Processes(2, strangers=1, silent=True)
    assert all(job.watches)
    assert time.monotonic() - began < 5
    time.sleep(0.5)
    assert job.ended == {}


def test_a_process_alone_ends_at_once():
    watch = Watch(0, 1, lambda text: text, host="localhost", timeout_s=100.0)
    began = time.monotonic()
    watch.done()
    assert time.monotonic() - began < 1


def test_processes_that_do_not_come_are_counted():
    with pytest.raises(TimeoutError, match=r"0 of 2 other processes came within 0\.5 s"):
        Watch(0, 3, lambda text: text, host="localhost", timeout_s=0.5)
