"""Google Cloud as far as test_tpu_scripts.py needs it: what gcloud, kubectl and xpk are asked, and answer.

`Cloud` is a server in the test's process. The programs that it puts on PATH (and, on the TPU VMs, Python)
send their arguments to it and end as it says. It refuses flags that the real programs do not have, and keeps
one home for each TPU VM, in which what is sent over ssh is really run.

Flags are those of `gcloud compute tpus queued-resources` and `gcloud storage rsync` in
docs.cloud.google.com/sdk/gcloud/reference, and of `xpk workload create --help`, 1.16.0.
"""

import itertools
import os
import re
import shutil
import signal
import socketserver
import subprocess
import threading
import time
from pathlib import Path

PLACE = {"zone", "project", "quiet"}
REACH = PLACE | {"tunnel-through-iap", "node", "worker"}
# Words of a command -> its flags; those that it cannot do without.
COMMANDS = {
    "gcloud compute tpus queued-resources create": (
        PLACE
        | {"accelerator-type", "runtime-version", "node-id", "node-count", "node-prefix", "spot", "reserved"}
        | {"internal-ips", "service-account"},
        {"zone", "accelerator-type", "runtime-version"},
    ),
    "gcloud compute tpus queued-resources describe": (PLACE | {"format"}, {"zone"}),
    "gcloud compute tpus queued-resources delete": (PLACE | {"force", "async"}, {"zone", "quiet"}),
    "gcloud compute tpus queued-resources ssh": (REACH | {"command"}, {"zone", "command", "quiet"}),
    "gcloud compute tpus queued-resources scp": (REACH | {"recurse"}, {"zone", "quiet"}),
    "gcloud storage rsync": ({"recursive", "exclude"}, set()),
    "kubectl create": ({"namespace", "filename"}, {"filename"}),
    "xpk workload create": (
        {"cluster", "workload", "tpu-type", "num-slices", "docker-image", "max-restarts", "zone", "project"}
        | {"termination-grace-period-seconds", "restart-on-exit-codes", "command"},
        {"cluster", "workload", "tpu-type", "command"},
    ),
}

# Sends its pid and arguments, gets a status and a folder with what it is to say; `hang` waits for SIGTERM.
CLIENT = r"""#!/bin/bash
exec 3<>/dev/tcp/127.0.0.1/$STAND_IN_PORT
printf '%s\0' "$$" "${HOST-}" "$PWD" "${0##*/}" "$@" end-of-arguments >&3
read -r status folder <&3
cat "$folder/out"
cat "$folder/err" >&2
[ "$status" = hang ] || exit "$status"
trap 'kill $!; exit 143' TERM
sleep 60 &
wait
"""

PIP = r"""#!/bin/bash
if [ "$2" = pip ]; then echo "$HOST $*" >>"$PIP_LOG"; exit; fi
"""

VENV = r"""#!/bin/bash
if [ "$1" = -m ]; then mkdir -p "$3/bin" && cp "$VENV_PYTHON" "$3/bin/python"; fi
"""


class RefusedError(Exception):
    """What the real program would say before it ends with an error."""


class Cloud:
    """One queued resource, its TPU VMs, and everything that was asked."""

    name = "kd"

    def __init__(self, folder: Path, repository: Path) -> None:
        """`folder` is for what happens here, `repository` has the scripts in its tpu/."""
        self.folder = folder
        self.repository = repository
        self.states: list[str] = []
        """Of the slice, one for each look (`?` is no answer); the last one stays. None: there is no slice."""
        self.creations = [["ACTIVE"]]
        """The states that follow a request; the last ones for all further requests too."""
        self.refused: list[int] = []
        """Which requests are refused, counted from 0."""
        self.reason = ""
        self.silent = 0
        """Looks at the state that get no answer."""
        self.unreachable = 0
        """Connections to workers that come to nothing."""
        self.workers = 2
        """TPU VMs of a slice."""
        self.jobs: list = [0]
        """What the program does at its first, second, ... start on a host; the last for all further ones too.
        A status to end with, or a name in `_program`; or a dict of these for each host."""
        self.calls: list[list[str]] = []
        self.runs: list[dict] = []
        """host, argv, cwd and pid of each start of the program."""
        self._created = 0
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._server = self._listen()
        for program in ("gcloud", "kubectl", "xpk"):
            self._write_program("bin", program, CLIENT)
        self._write_program("vm", "hostname", '#!/bin/bash\necho "$HOST"\n')
        self._write_program("vm", "python3.12", VENV)
        self._write_program("venv", "python", PIP + CLIENT.partition("\n")[2])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        for run in self.runs:  # those that were made to hang: told from others of that pid by where they are
            try:
                if os.readlink(f"/proc/{run['pid']}/cwd").startswith(str(self.folder)):
                    os.kill(run["pid"], signal.SIGTERM)
            except OSError:
                pass

    # What a test does.

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("KDRL_TPU_")}
        env |= {
            "PATH": f"{self.folder / 'bin'}:{env['PATH']}",
            "STAND_IN_PORT": self.port,
            "KDRL_TPU_NAME": self.name,
            "KDRL_TPU_ZONE": "us-east5-b",
            "KDRL_TPU_POLL_SECONDS": "0",
        } | environment
        command = [str(self.repository / "tpu" / script) if script.endswith(".sh") else script, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, env=env, cwd=self.folder, timeout=60, check=False
        )

    @property
    def port(self) -> str:
        return str(self._server.server_address[1])

    @property
    def verbs(self) -> list[str]:
        """What gcloud was asked for, without looks at the state: create, scp, `ssh start`, ..."""
        verbs = []
        for call in self.calls:
            verb = call[4]
            if verb == "ssh":
                command = next(word for word in call if word.startswith("--command="))
                found = re.search(r"job\.sh (\w+)", command)
                verb = f"ssh {found[1]}" if found else "ssh install"
            if verb not in ("describe", "ssh status"):
                verbs.append(verb)
        return verbs

    def home(self, host: str) -> Path:
        return self.folder / "workers" / host

    def homes(self) -> list[Path]:
        return sorted((self.folder / "workers").iterdir())

    def wait_until_ended(self) -> None:
        for home in self.homes():
            deadline = time.monotonic() + 20
            while not (home / "kdrl_job" / "status").exists():
                assert time.monotonic() < deadline, f"the job of {home.name} does not end"
                time.sleep(0.01)

    # What answers.

    def _write_program(self, folder: str, name: str, text: str) -> None:
        path = self.folder / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def _listen(self) -> socketserver.ThreadingTCPServer:
        cloud = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                received = b""
                while not received.endswith(b"\0end-of-arguments\0"):
                    received += self.request.recv(65536)
                words = received.decode().split("\0")[:-2]
                self.wfile.write(f"{cloud._answer(*words)}\n".encode())

        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    def _answer(self, pid: str, host: str, cwd: str, program: str, *argv: str) -> str:
        folder = self.folder / "answers" / str(next(self._numbers))
        folder.mkdir(parents=True)
        with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
            try:
                if program == "python":
                    out.write(f"step 1 on {host}\n")
                    status = self._program(int(pid), host, cwd, list(argv))
                else:
                    self.calls.append([program, *argv])
                    status = self._command([program, *argv], out, err)
            except RefusedError as refused:
                err.write(f"ERROR: {refused}\n")
                status = 1
        return f"{status} {folder}"

    def _program(self, pid: int, host: str, cwd: str, argv: list[str]) -> int | str:
        with self._lock:
            starts = sum(run["host"] == host for run in self.runs)
            self.runs.append({"host": host, "argv": argv, "cwd": cwd, "pid": pid})
        act = self.jobs[min(starts, len(self.jobs) - 1)]
        act = act[host] if isinstance(act, dict) else act
        if act == "preempted":
            self.states = ["SUSPENDED"]
        elif act == "preempted, and it shows late":
            self.states = ["ACTIVE"] * 5 + ["SUSPENDED"]
        elif act == "unreachable":
            self.unreachable = 20
            return "hang"
        elif act == "gcloud falls silent":
            self.silent = 30
            return 0
        return 143 if isinstance(act, str) and act != "hang" else act

    def _command(self, argv: list[str], out, err) -> int:
        command = next((name for name in COMMANDS if " ".join(argv).startswith(f"{name} ")), None)
        if command is None:
            raise RefusedError(f"invalid choice: {argv}")
        known, needed = COMMANDS[command]
        names, flags = [], {}
        for argument in argv[len(command.split()) :]:
            if argument.startswith("--"):
                name, _, value = argument[2:].partition("=")
                if name not in known:
                    raise RefusedError(f"unrecognized arguments: {argument}")
                flags[name] = value
            else:
                names.append(argument)
        if missing := needed - set(flags):
            raise RefusedError(f"missing, or asking for where nobody answers: {missing}")
        verb = command.split()[-1]
        if command.startswith("gcloud compute"):
            return getattr(self, f"_{verb}")(names, flags, out, err) or 0
        if command.startswith("kubectl"):
            shutil.copy(flags["filename"], self.folder / "manifest.yaml")
        return 0

    def _create(self, names, flags, out, err) -> None:
        if self.states:
            raise RefusedError(f"ALREADY_EXISTS: Resource {names[0]} already exists")
        number, self._created = self._created, self._created + 1
        if number in self.refused:
            raise RefusedError("RESOURCE_EXHAUSTED: Quota limit TPUS_PER_PROJECT has been exceeded")
        several = ("node-count" in flags, "node-prefix" in flags)
        if several not in ((True, True), (False, False)) or ("node-id" in flags) == several[0]:
            raise RefusedError("give --node-id, or --node-count with --node-prefix")
        self.states = list(self.creations[min(number, len(self.creations) - 1)])
        for node in range(int(flags.get("node-count", 1))):
            for worker in range(self.workers):
                self.home(f"node{node}-w{worker}").mkdir(parents=True)

    def _describe(self, names, flags, out, err) -> None:
        if self.silent:
            self.silent -= 1
            raise RefusedError("UNAVAILABLE: The service is currently unavailable.")
        if flags.get("format") == "value(state.failedData.error.message)":
            out.write(f"{self.reason}\n")
        elif flags.get("format") == "value(state.state)":
            if not self.states:
                raise RefusedError(
                    f"NOT_FOUND: Resource 'projects/p/queuedResources/{names[0]}' was not found"
                )
            state = self.states[0]
            if len(self.states) > 1:
                self.states.pop(0)
            if state == "?":
                raise RefusedError("UNAVAILABLE: The service is currently unavailable.")
            out.write(f"{state}\n")
        else:
            out.write("a page of YAML\n")

    def _delete(self, names, flags, out, err) -> None:
        if "force" not in flags and (self.folder / "workers").exists():
            raise RefusedError("FAILED_PRECONDITION: the queued resource still has nodes")
        self.states = []
        shutil.rmtree(self.folder / "workers", ignore_errors=True)

    def _chosen(self, flags) -> list[Path]:
        if self.states[:1] != ["ACTIVE"] or self.unreachable:
            self.unreachable = max(self.unreachable - 1, 0)
            raise RefusedError("[255] ssh: connect to host port 22: Connection timed out")
        chosen = []
        for home in self.homes():
            node, worker = home.name.removeprefix("node").split("-w")
            # 0 is gcloud's own default.
            if flags.get("node", "0") in ("all", node) and flags.get("worker", "0") in ("all", worker):
                chosen.append(home)
        return chosen

    def _ssh(self, names, flags, out, err) -> int:
        statuses = []
        for home in self._chosen(flags):
            env = {
                "PATH": f"{self.folder / 'vm'}:{os.defpath}",
                "HOME": str(home),
                "HOST": home.name,
                "LANG": "C.UTF-8",
                "STAND_IN_PORT": self.port,
                "PIP_LOG": str(self.folder / "pip"),
                "VENV_PYTHON": str(self.folder / "venv" / "python"),
            }
            command = ["bash", "-c", flags["command"]]
            done = subprocess.run(command, cwd=home, env=env, stdout=out, stderr=err, check=False)
            statuses.append(done.returncode)
        return next((status for status in statuses if status), 0)

    def _scp(self, names, flags, out, err) -> None:
        *sources, destination = names
        for home in self._chosen(flags):
            for source in sources:
                if ":" in destination:
                    shutil.copy(source, home / destination.partition(":")[2])
                else:
                    inside = home / source.partition(":")[2]
                    target = self.folder / destination
                    shutil.copytree(inside, target / inside.name if target.exists() else target)
