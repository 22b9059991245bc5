"""How runs are asked to end: signals while the main thread cannot listen, limits, notices of the platform."""

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kdrl_jax import preemption
from kdrl_jax.main import main
from kdrl_jax.signals import Ended, StopRequest, end_on_signals

ROOT = Path(__file__).parents[1]
# A main thread that is away in compiled code, as in XLA's compiler, where no signal can reach Python.
BUSY = """
import hashlib, sys
from kdrl_jax.signals import Ended, StopRequest, end_on_signals
stop = StopRequest(within_s={within_s})
stop.install()
print("ready", flush=True)
for _ in range({times}):
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", {rounds})
    if stop():
        print("saved", flush=True)
        stop.close()
        sys.exit(stop.status)
"""


FOR_EVER = 2**31 - 1


def busy(within_s, times=1, rounds=FOR_EVER):
    code = BUSY.format(within_s=within_s, times=times, rounds=rounds)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "ready\n"
    return process


def end(process, *numbers, after=0.2):
    start = time.monotonic()
    for number in numbers:
        process.send_signal(number)
        time.sleep(after)
    out, err = process.communicate(timeout=30)
    return out, err, process.returncode, time.monotonic() - start


def test_sigterm_is_heard_at_once_and_has_its_limit():
    out, err, status, seconds = end(busy(within_s=1.0), signal.SIGTERM)
    assert (out, status) == ("", 128 + signal.SIGTERM)
    assert 1.0 <= seconds < 4
    assert "SIGTERM: saving after what is running now, within 1 s; once more ends at once" in err
    assert "1 s are over" in err
    assert "goes on from the newest checkpoint" in err


def test_what_comes_to_its_place_in_time_is_saved():
    out, err, status, _ = end(busy(within_s=20.0, times=1000, rounds=300_000), signal.SIGTERM)
    assert (out, status) == ("saved\n", 128 + signal.SIGTERM)
    assert "are over" not in err


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once_even_while_compiling(second):
    out, err, status, seconds = end(busy(within_s=None), signal.SIGINT, second)
    assert (out, status) == ("", 128 + second)
    assert seconds < 4
    assert "SIGINT: saving after what is running now; once more ends at once" in err


def test_ctrl_c_has_no_limit():
    out, _, status, seconds = end(busy(within_s=0.5, rounds=8_000_000), signal.SIGINT)
    assert (out, status) == ("saved\n", 128 + signal.SIGINT)
    assert seconds > 1


def asked(*calls):
    """Whether a request was heard, and whether the process would have been ended."""
    code = f"""
from kdrl_jax.signals import Ended, StopRequest, end_on_signals
stop = StopRequest()
for notice in {calls}:
    stop.ask(15, notice=notice)
print("goes on")
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize(
    ("calls", "ends"),
    [
        ((True, False), False),
        ((False, True), False),
        ((True, True, False), False),
        ((True, False, False), True),
        ((False, False), True),
    ],
)
def test_a_notice_and_its_signal_are_one_request(calls, ends):
    out = asked(*calls)
    assert (out.stdout == "") == ends
    assert out.returncode == (143 if ends else 0)


def test_the_limit_holds_where_nobody_listens():
    process = busy(within_s=0.5)
    process.stderr.close()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM
    process.stdout.close()


def test_other_signals_are_no_request():
    stop, before = StopRequest(), signal.signal(signal.SIGUSR1, lambda *_: None)
    stop.install()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.3)
        assert not stop()
    finally:
        stop.close()
        signal.signal(signal.SIGUSR1, before)


def test_signals_mean_again_what_they_meant():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    pipe = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(pipe)
    stop = StopRequest()
    stop.install()
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + 10
    while not stop():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    stop.close()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(pipe) == pipe


def test_a_command_ends_on_a_signal_and_what_follows_does_not():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], sys.unraisablehook

    @end_on_signals()
    def wait():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    with pytest.raises(Ended) as ended:
        wait()
    assert ended.value.signal == signal.SIGTERM
    assert ([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], sys.unraisablehook) == before


def test_a_pipe_of_another_library_is_found_out():
    """Who takes the place where signals are written does not make them unheard."""
    stop = StopRequest()
    stop.install()
    receive, send = os.pipe()
    os.set_blocking(send, False)
    try:
        signal.set_wakeup_fd(send)
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not stop():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        stop.close()
        os.close(receive)
        os.close(send)


class Metadata(http.server.BaseHTTPRequestHandler):
    answers: dict[str, str]

    def do_GET(self):
        assert self.headers["Metadata-Flavor"] == "Google"
        answer = self.answers[self.path.removeprefix("/computeMetadata/v1/instance/")].encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata(monkeypatch):
    """A metadata server, and what it answers."""
    monkeypatch.setattr(preemption, "POLL_S", 0.05)
    answers = {"preempted": "FALSE", "maintenance-event": "NONE"}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("M", (Metadata,), {"answers": answers}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", answers
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "answer"), [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")]
)
def test_the_platform_s_notice_counts_as_sigterm(metadata, name, answer):
    server, answers = metadata
    asked = []
    notice = preemption.GoogleNotice(asked.append, server)
    time.sleep(0.3)
    assert asked == []
    answers[name] = answer
    deadline = time.monotonic() + 10
    while not asked:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    notice.close()
    assert asked == [signal.SIGTERM]


def test_a_notice_ends_a_run_that_asks_for_them(metadata, tmp_path, monkeypatch, capfd):
    from tiny_runs import config_file

    server, answers = metadata
    answers["preempted"] = "TRUE"
    path = config_file(
        tmp_path, checkpoint={"preemption_notice": "google"}, log={"dir": str(tmp_path / "run")}
    )
    monkeypatch.setenv("GCE_METADATA_HOST", server)
    assert main(["--config", str(path)]) == 128 + signal.SIGTERM
    said = capfd.readouterr()
    assert "stopped and saved at step 0" in " ".join(said.out.split())
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    assert main(["--config", str(path)]) == 2
    assert "preemption_notice=google: 127.0.0.1:9 does not answer" in capfd.readouterr().err
