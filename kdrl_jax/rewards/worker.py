"""A process that scores answers: `python -m kdrl_jax.rewards.worker [--pattern=P] FUNCTION...`.

The pattern is for the function `regex`. Speaks JSON lines. The first line out is {"ready": true}, or
{"error": text} and the process ends with status 2. Then each line in, {"id", "question", "completion",
"answer"}, is answered by one line, {"id", "scores": {function: float}}. A function that fails scores 0, and
the first failure is told in "error", as in "TypeError: ... (in numeric)"; if it is that of the first
function, the verifier, the others are not asked. A request may hold "limit_s": the seconds after which
whoever asked will have given up; "only", the one function that is asked; and "read_by", the function by
whose rules the completion's final answer is found too, as "said" in the answer. The process ends when its
standard input does.
"""

import faulthandler
import json
import math
import numbers
import os
import signal
import sys
from typing import IO, Any

from kdrl_jax.rewards.functions import RewardFunction, resolve
from kdrl_jax.rewards.votes import AnswerReader, answer_reader

MEMORY_LIMIT_BYTES = 2 * 1024**3
"""Address space the functions may take beyond what importing them took."""
MAX_ERROR_CHARS = 500


def _claim_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Takes standard input and output for the protocol; functions then read nothing and print to stderr."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return requests, replies


def _limit_memory() -> None:
    """Turns an answer that would eat the machine's memory into a MemoryError here."""
    try:
        import resource
    except ImportError:  # not a Unix system
        return
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        used = 0
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = used + MEMORY_LIMIT_BYTES
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    except (OSError, ValueError):
        return  # some systems list the limit but do not let it be set; time limits still hold


def _describe(error: BaseException, where: str = "") -> str:
    """One line of bounded length, whatever the exception's own text does."""
    try:
        text = str(error)
    except Exception:
        text = "(its text cannot be read)"
    line = " ".join(f"{type(error).__name__}: {text}".split())[:MAX_ERROR_CHARS]
    return f"{line} (in {where})" if where else line


Readers = dict[str, AnswerReader | None]


def _score(functions: dict[str, RewardFunction], readers: Readers, request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request."""
    names = [request["only"]] if "only" in request else list(functions)
    scores = dict.fromkeys(names, 0.0)
    reply: dict[str, Any] = {"id": request.get("id"), "scores": scores}
    for name in names:
        try:
            score = functions[name](request["question"], request["completion"], request["answer"])
            if not isinstance(score, numbers.Real):
                raise TypeError(f"a score must be a number, got {type(score).__name__} {score!r}")
            if not math.isfinite(float(score)):
                raise ValueError(f"a score must be finite, got {float(score)}")
            scores[name] = float(score)
        except BaseException as error:  # also SystemExit: a function must not end its worker
            reply.setdefault("error", _describe(error, name))
            if name == names[0]:
                return reply
    if (read := readers.get(request.get("read_by", ""))) is not None:
        try:
            reply["said"] = read(request["completion"])
        except Exception as error:
            reply.setdefault("error", _describe(error, "the reading of the final answer"))
    return reply


def _answer(
    functions: dict[str, RewardFunction], readers: Readers, request: dict[str, Any]
) -> dict[str, Any]:
    """`_score`, under a last resort against hanging.

    The parent kills a worker that is late. Should the parent be gone, a hanging function would spin for ever:
    this timer ends the process even then, and even if the function holds the interpreter's lock.
    """
    if "limit_s" in request:
        faulthandler.dump_traceback_later(2 * request["limit_s"] + 1, exit=True, file=2)
    try:
        return _score(functions, readers, request)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _serve(
    functions: dict[str, RewardFunction], readers: Readers, requests: IO[bytes], replies: IO[bytes]
) -> None:
    for line in requests:
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise TypeError(f"a request is a JSON object, got {type(request).__name__}")
        except (TypeError, ValueError) as error:
            reply = {"id": None, "error": _describe(error, "the request")}
        else:
            reply = _answer(functions, readers, request)
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def main(names: list[str]) -> int:
    """Serves until standard input ends; returns the exit status."""
    pattern = None
    if names and names[0].startswith("--pattern="):
        pattern, names = names[0].removeprefix("--pattern="), names[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    requests, replies = _claim_pipes()
    try:
        functions = {name: resolve(name, pattern) for name in names}
        readers = {name: answer_reader(name, pattern) for name in names}
        started: dict[str, Any] = {"ready": True}
    except BaseException as error:
        functions, readers = {}, {}
        text = str(error) if isinstance(error, ValueError) else _describe(error)
        started = {"error": " ".join(text.split())}
    try:
        replies.write(json.dumps(started).encode() + b"\n")
        replies.flush()
        if "error" in started:
            return 2
        _limit_memory()
        _serve(functions, readers, requests, replies)
    except BrokenPipeError:
        pass  # the parent has gone
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # a function may have left threads behind that would keep the process
