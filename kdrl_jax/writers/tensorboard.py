"""TensorBoard: event files in the run directory, `tensorboard --logdir RUN_DIR` (or a folder of runs)."""

import io
import json
import platform
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from kdrl_jax.paths import is_remote, make_folder, write_whole
from kdrl_jax.writers.base import ROLLOUT_COLUMNS, About, Status, rollout_cells

_FLUSH_S, _REWRITE_S = 5.0, 60.0
"""Seconds until a reader sees what was written; in a bucket, where the file is then written anew."""


class TensorBoardWriter:
    """Writes event files by TensorBoard's own formats, without its thread: a full disk is heard of here."""

    rewrites = True

    def open(self, about: About) -> str:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = about.run_dir / "tensorboard"
        make_folder(folder)
        # Readers take files in the order of their names: nanoseconds have as many digits for centuries.
        host = "".join(x if x.isalnum() else "-" for x in platform.node())
        self._path = folder / f"events.out.tfevents.{time.time_ns()}.{host}"
        self._file: IO[bytes] = io.BytesIO() if is_remote(self._path) else self._path.open("wb")
        self._records = RecordWriter(self._file)
        self._flushed = time.monotonic()
        self._event(file_version="brain.Event:2")
        # By this, readers drop what earlier files have of this step and of later ones.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._event(about.first_step, session_log=start)
        self._texts("config", about.first_step, [[_verbatim(json.dumps(about.config, indent=2))]])
        self._flush()
        return "tensorboard"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        numbers = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._event(step, summary=Summary(value=numbers))

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        cells = [["" if x is None else _verbatim(str(x)) for x in row] for row in rollout_cells(rows)]
        self._texts("rollouts", step, [list(ROLLOUT_COLUMNS), *cells])

    def alarm(self, step: int, name: str, says: str) -> None:
        self._texts(f"alarm/{name}", step, [[_verbatim(says)]])

    def close(self, status: Status) -> None:
        self._flush()
        self._file.close()

    def _texts(self, tag: str, step: int, cells: list[list[str]]) -> None:
        """A table of Markdown, one row after the other."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING
        from tensorboard.plugins.text import metadata

        sizes = [TensorShapeProto.Dim(size=size) for size in (len(cells), len(cells[0]))]
        tensor = TensorProto(
            dtype=DT_STRING,
            tensor_shape=TensorShapeProto(dim=sizes),
            string_val=[cell.encode("utf-8", "replace") for row in cells for cell in row],
        )
        about = metadata.create_summary_metadata(tag, "")
        self._event(step, summary=Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=tensor)]))

    def _event(self, step: int = 0, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), step=step, **what).SerializeToString())
        every = _REWRITE_S if isinstance(self._file, io.BytesIO) else _FLUSH_S
        if time.monotonic() - self._flushed >= every:
            self._flush()

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        if isinstance(self._file, io.BytesIO):
            write_whole(self._path, self._file.getvalue())
        else:
            self._file.flush()


def _verbatim(text: str) -> str:
    """As it is, where Markdown is read."""
    return "".join(f"    {line}\n" for line in text.split("\n"))
