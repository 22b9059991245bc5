"""Jobs of several processes on this machine: one CPU taken apart, and gloo between them."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


class Job:
    """Processes that were started together."""

    def __init__(self, commands, folder):
        # The devices are those that each process is told to have.
        flags = [x for x in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in x]
        path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "XLA_FLAGS": " ".join(flags), "PYTHONPATH": path}
        self.logs = [Path(folder) / f"process_{i}_{time.monotonic_ns()}.log" for i in range(len(commands))]
        self.processes = []
        for command, log in zip(commands, self.logs, strict=True):
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command], env=env, cwd=folder, stdout=file, stderr=subprocess.STDOUT
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def wait(self, limit_s=400):
        """The exit statuses."""
        end = time.monotonic() + limit_s
        return [p.wait(max(end - time.monotonic(), 0.1)) for p in self.processes]

    def said(self, process=None):
        logs = self.logs if process is None else [self.logs[process]]
        return "\n".join(log.read_text() for log in logs)


def train(config_file, folder, *overrides, num=2, devices=2, command="train"):
    """A job of a command."""
    address = free_address()
    common = ["-m", "kdrl_jax.main", command, "--config", str(config_file)]
    settings = [f"mesh.cpu_devices={devices}", *overrides]
    if num == 1:
        return Job([[*common, *settings]], folder)
    join = ["--coordinator", address, "--num-processes", str(num), "--process-id"]
    return Job([[*common, *join, str(i), *settings] for i in range(num)], folder)
