"""Checkpoints in buckets that orbax does not write to (`s3://`): it writes to a folder of this machine, and
whole checkpoints are copied.

Orbax knows Google's buckets and disks: of `s3://…` it makes a relative path, and refuses that (0.12.8,
`serialization/tensorstore_utils.py`), though tensorstore below it could write there.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from kdrl_jax.checkpoint.keep import Keep
from kdrl_jax.paths import filesystem, remove_folder

DONE = "commit_success.txt"
"""Written last, and removed first: a checkpoint without it is not there. Named as orbax names its own."""


class Copies:
    """The checkpoints of one run in a bucket, and those of them that were copied to this machine."""

    def __init__(self, directory: Path):
        """Makes an empty folder here, which `close` removes."""
        self._directory, self._bucket = directory, filesystem(directory)
        self._temporary = tempfile.TemporaryDirectory(prefix="kdrl_jax_checkpoints_")
        self.local = Path(self._temporary.name)

    def steps(self) -> list[int]:
        """Of the whole checkpoints in the bucket, in order."""
        names = (Path(place).parent.name for place in self._bucket.glob(f"{self._directory}/*/{DONE}"))
        return sorted(int(name) for name in names if name.isdigit())

    def fetch(self, step: int, item: str = "") -> None:
        """Copies a checkpoint, or one item of it, to this machine."""
        remote, local = self._place(step), self.local / str(step)
        for place in self._bucket.find(f"{remote}/{item}".rstrip("/")):
            file = local / place.removeprefix(remote.partition("://")[2] + "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            self._bucket.get_file(place, str(file))

    def push(self, step: int, keep: Keep | None, accuracies: Mapping[int, float]) -> None:
        """Copies a checkpoint of this machine to the bucket, and removes what is not to be kept there."""
        local, remote = self.local / str(step), self._place(step)
        with contextlib.suppress(FileNotFoundError):  # what a save that was cut off has left
            self._bucket.rm(remote, recursive=True)
        files = [file for file in local.rglob("*") if file.is_file()]
        places = [f"{remote}/{file.relative_to(local).as_posix()}" for file in files]
        self._bucket.put([str(file) for file in files], places)
        self._bucket.pipe_file(f"{remote}/{DONE}", b"")
        steps = self.steps()
        for old in set(steps) - keep(steps, accuracies) if keep else ():
            self._remove(old)

    def forget(self, step: int) -> None:
        """Removes what was copied of a checkpoint to this machine."""
        shutil.rmtree(self.local / str(step), ignore_errors=True)

    def _remove(self, step: int) -> None:
        remove_folder(self._directory / str(step), first=DONE)

    def close(self) -> None:
        self._temporary.cleanup()

    def _place(self, step: int) -> str:
        return f"{self._directory}/{step}"
