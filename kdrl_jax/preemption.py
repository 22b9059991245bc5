"""Notices of a platform that it will take the machine away, for runs that ask for them."""

import contextlib
import http.client
import signal
import threading
import urllib.request
from collections.abc import Callable

GOOGLE = "metadata.google.internal"
POLL_S = 2.0
_ANSWER_WITHIN_S = 2.0
# What a Google Cloud machine is told about itself, and the answers that mean its end:
# https://cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption
# https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice
_ENDS = {
    "preempted": ("TRUE",),
    "maintenance-event": ("TERMINATE_ON_HOST_MAINTENANCE",),
}


class GoogleNotice:
    """Asks Google Cloud's metadata server, which each machine has, every `POLL_S` seconds."""

    def __init__(self, ask: Callable[[int], None], server: str = GOOGLE):
        """Begins.

        Args:
            ask: called once with SIGTERM's number when the machine is going to be taken away.
            server: its host name, or HOST:PORT.

        Raises:
            ValueError: there is no such server here.
        """
        self._ask, self._server = ask, server
        self._ended = threading.Event()
        try:
            self._is_ending()
        except OSError as error:
            raise ValueError(
                f"checkpoint.preemption_notice=google: {server} does not answer ({error}); it does on Google "
                "Cloud's machines alone, elsewhere write null"
            ) from error
        self._thread = threading.Thread(target=self._watch, name="preemption", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(POLL_S):
            # It answered at the start: where it does not, it is asked again.
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self._is_ending():
                    self._ask(signal.SIGTERM)
                    return

    def _is_ending(self) -> bool:
        return any(self._get(name) in answers for name, answers in _ENDS.items())

    def _get(self, name: str) -> str:
        url = f"http://{self._server}/computeMetadata/v1/instance/{name}"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        # Never by way of a proxy: it is this machine's own server.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=_ANSWER_WITHIN_S) as answer:
            return str(answer.read(256).decode(errors="replace")).strip()

    def close(self) -> None:
        self._ended.set()
