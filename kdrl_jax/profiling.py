"""Traces of some steps, for xprof."""

import shutil
import tempfile
from pathlib import Path

import jax

from kdrl_jax.paths import is_remote


class Profiler:
    """Writes one trace of the iterations that hold steps [first, last) to a folder, which
    `xprof --logdir FOLDER` or TensorBoard opens."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self._folder, self._steps = folder, steps
        self._local: Path | None = None
        self._running = False

    def at(self, step: int, end: int) -> None:
        """Begins or ends the trace, between two iterations of which the next has steps [step, end)."""
        if self._steps is None:
            return
        first, last = self._steps
        if not self._running and step < last and end > first:
            self._running = True
            if is_remote(self._folder):  # traces are written to disks alone
                self._local = Path(tempfile.mkdtemp(prefix="kdrl_jax_profile_"))
            jax.profiler.start_trace(self._local or self._folder)
        elif self._running and step >= last:
            self.close()

    def close(self) -> None:
        """Writes what there is of the trace."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            if self._local is not None:
                for file in filter(Path.is_file, self._local.rglob("*")):
                    (self._folder / file.relative_to(self._local)).write_bytes(file.read_bytes())
                shutil.rmtree(self._local)
