"""Ends a job on all its hosts when one of them fails, and says why.

The devices of a job wait for each other in every step: one that is gone leaves the others in a collective
that never ends, and JAX's own watch says neither who failed nor why. So each process keeps a connection to
the first, over which it hears at once when another one raises an error or ends, and after a limit when one
falls silent. Whoever hears of a failure says so on stderr and ends its process: nothing else can interrupt
a wait for devices.

A message is a line of JSON: `{}` (still there), `{"done": true}`, or `{"failed": why, "status": status}`.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

GONE = 1
"""Exit status of the others when a process has ended without a word; one that fails says which."""
_LINGER_S = 1.0
_HELLO_S = 2.0
_BEATS = 6
"""Within the limit after which silence is a failure: a few may be late."""


def _end(why: str, status: int) -> None:
    again = " (the same command resumes)" if status == GONE else ""
    # os.write, since the main thread may hold the lock of a print.
    os.write(2, f"error: {why}; ending here too{again}\n".encode())
    os._exit(status)


class _Peer:
    """The other end of a connection."""

    def __init__(self, connection: socket.socket, name: str = ""):
        self.name = name
        self.heard = time.monotonic()
        self.done = False
        self._connection = connection
        self._sending = threading.Lock()
        self._lines = connection.makefile("rb")
        self.gone = threading.Event()

    def send(self, message: dict[str, Any]) -> None:
        """Does nothing if the other end is gone, which `receive` finds out."""
        with contextlib.suppress(OSError), self._sending:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message, or None at the end of the connection."""
        try:
            line = self._lines.readline()
        except OSError:
            return None
        self.heard = time.monotonic()
        return json.loads(line) if line.endswith(b"\n") else None

    def wait_for_hello(self, timeout_s: float) -> None:
        """Learns the other's name. Raises OSError or ValueError if it says something else, or nothing."""
        self._connection.settimeout(timeout_s)
        hello = json.loads(self._lines.readline())
        self._connection.settimeout(None)
        self.name = f"process {hello['process']} ({hello['host']})"

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)


class Watch:
    """One process's part. It begins to watch when it is made, and ends with `done` or `failed`."""

    def __init__(
        self,
        process: int,
        num_processes: int,
        meet: Callable[[str], str],
        *,
        host: str,
        timeout_s: float,
        end: Callable[[str, int], None] = _end,
    ):
        """Connects this process with the first one.

        Args:
            meet: called on every process, gives each the text that the first one passes.
            host: name or address by which the others reach this host, if it is the first.
            timeout_s: silence after which a process has failed; also the time that all have to connect.
            end: called with why and the exit status, when another process has failed; not expected to return.

        Raises:
            OSError: the first process cannot be reached, or not all others have come.
        """
        self._process, self._timeout_s, self._end = process, timeout_s, end
        self._lock = threading.Lock()
        self._over = False
        self._peers: list[_Peer] = []
        self._all_done = threading.Event()
        if process == 0:
            with socket.create_server(("", 0)) as server:
                meet(f"{host}:{server.getsockname()[1]}")
                self._accept(server, num_processes - 1)
        else:
            self._join(meet(""))
        for peer in self._peers:
            peer.heard = time.monotonic()  # some have waited for the others since they came
            threading.Thread(target=self._listen, args=(peer,), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def _accept(self, server: socket.socket, num: int) -> None:
        last = time.monotonic() + self._timeout_s
        while len(self._peers) < num:
            server.settimeout(max(last - time.monotonic(), 0.001))
            try:
                peer = _Peer(server.accept()[0])
            except TimeoutError:
                here = ", ".join(peer.name for peer in self._peers) or "none"
                raise TimeoutError(
                    f"{len(self._peers)} of {num} other processes came within {self._timeout_s:g} s: {here}"
                ) from None
            try:
                peer.wait_for_hello(_HELLO_S)
            except (OSError, ValueError, LookupError, TypeError):
                peer.close()  # a stranger: whatever tries all ports of a network
            else:
                self._peers.append(peer)

    def _join(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        try:
            connection = socket.create_connection((host, int(port)), self._timeout_s)
        except OSError as error:
            raise OSError(
                f"process 0 at {address} cannot be reached ({error}); the hosts of a job must reach each "
                "other on all ports"
            ) from error
        connection.settimeout(None)
        peer = _Peer(connection, f"process 0 ({host})")
        peer.send({"process": self._process, "host": socket.gethostname()})
        self._peers.append(peer)

    def _listen(self, peer: _Peer) -> None:
        while (message := peer.receive()) is not None:
            if "failed" in message:
                self._fail(message["failed"], message["status"], besides=peer)
            if "done" in message:
                peer.done = True
                if all(p.done for p in self._peers):
                    self._all_done.set()
        peer.gone.set()
        if not peer.done:
            why = f"{peer.name} ended without a word: it was killed, or its host is gone"
            self._fail(why, GONE, besides=peer)

    def _beat(self) -> None:
        while not self._over:
            for peer in self._peers:
                peer.send({})
                silent = time.monotonic() - peer.heard
                if silent > self._timeout_s and not peer.done:
                    self._fail(f"{peer.name} has not been heard from for {silent:.0f} s", GONE, besides=peer)
            time.sleep(self._timeout_s / _BEATS)

    def _fail(self, why: str, status: int, besides: _Peer) -> None:
        """Tells all others and ends; once."""
        with self._lock:
            if self._over:
                return
            self._over = True
            self._tell([peer for peer in self._peers if peer is not besides], why, status)
            self._end(why, status)

    def _tell(self, peers: list[_Peer], why: str, status: int) -> None:
        """Says why, and stays until the others have gone: once the first process is gone, JAX ends the others
        with words of its own."""
        for peer in peers:
            peer.send({"failed": why, "status": status})
        last = time.monotonic() + _LINGER_S
        for peer in peers:
            peer.gone.wait(max(last - time.monotonic(), 0.0))

    def failed(self, why: str, status: int) -> None:
        """Tells the others that this process has failed and ends with this status, as they then do. If
        another's failure was the cause, which shows a little later, that one is what is said, and this does
        not return."""
        time.sleep(_LINGER_S)
        with self._lock:
            if self._over:
                return
            self._over = True
            said = f"process {self._process} ({socket.gethostname()}) failed: {why}"
            self._tell(self._peers, said, status)

    def done(self) -> None:
        """Says that this process has come to its end, and waits until all have."""
        for peer in self._peers:
            peer.send({"done": True})
        if self._peers:
            self._all_done.wait(self._timeout_s)
        with self._lock:
            self._over = True
