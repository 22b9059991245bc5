"""Jobs of several processes, one on each host: what the command line says of them."""

import contextlib
import re
import socket
from dataclasses import dataclass

from kdrl_jax.config.errors import ConfigError


@dataclass(frozen=True)
class Hosts:
    """Where the processes of a job meet."""

    coordinator: str | None
    """HOST:PORT of the first; None is found by JAX, as the other two are."""
    num_processes: int | None
    process_id: int | None

    @property
    def host(self) -> str:
        """The name or address of the first host, asked on it."""
        if self.coordinator is not None:
            return self.coordinator.rpartition(":")[0]
        # The address that the others see: of the interface that leads out. Nothing is sent.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out, contextlib.suppress(OSError):
            out.connect(("192.0.2.1", 9))
            return str(out.getsockname()[0])
        return socket.gethostname()


def read_hosts(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Hosts | None:
    """What the three options say. Raises ConfigError with one line for the user."""
    numbers = {"--num-processes": num_processes, "--process-id": process_id}
    given = [name for name, number in numbers.items() if number is not None]
    if coordinator is None or coordinator == "auto":
        if given:
            raise ConfigError(f"{' and '.join(given)} with no address: give --coordinator HOST:PORT")
        return None if coordinator is None else Hosts(None, None, None)
    if not re.fullmatch(r"[^:\s]+:[1-9]\d{0,4}", coordinator):
        raise ConfigError(f"--coordinator {coordinator}: write auto, or HOST:PORT of the first host")
    if num_processes is None or process_id is None:
        missing = " and ".join(name for name in numbers if name not in given)
        raise ConfigError(f"--coordinator {coordinator} needs {missing} too")
    if not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--process-id {process_id} of --num-processes {num_processes}: ids count from 0 to one less"
        )
    return Hosts(coordinator, num_processes, process_id)
