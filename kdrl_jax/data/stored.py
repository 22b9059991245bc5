"""Rows that are stored: files of JSON Lines, Parquet and ArrayRecord, and data sets of the Hugging Face hub.

A source is read whole, once, when it is opened: of each row the texts that are used stay in memory (about
1 GB for a million rows of 400 characters), so that rows are counted, filtered and shuffled exactly.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from kdrl_jax.config.data import (
    ArrayRecordSourceConfig,
    HubSourceConfig,
    JsonlSourceConfig,
    ParquetSourceConfig,
    StoredConfig,
)
from kdrl_jax.data.rows import BadRows, Row, RowReader, parse_object
from kdrl_jax.paths import absolute, as_path, check_bucket, is_remote, open_bytes

Record = tuple[int, Any]
"""A row's number, and the row as it is stored."""
Parse = Callable[[int, Any], dict[str, Any]]
"""Its fields; ValueError, without the place, if it has none."""
_ONE_OBJECT = "expected one JSON object per"


class StoredSource:
    """Rows of one file or several, or of a data set, in memory."""

    in_memory = True
    may_change = True

    def __init__(
        self,
        name: str,
        parts: Iterable[tuple[str, Iterable[Record]]],
        config: StoredConfig,
        *,
        address: str,
        row: str,
        expected: str,
        parse: Parse | None = None,
    ):
        """Reads all rows.

        Args:
            parts: the files, each with how rows of it are placed in messages, and its records.
            config: which fields are what, and how many rows.
            address: as the config gives it.
            row: what comes between a file and a row's number: `:`, ` row `.
            expected: what a file should hold.
            parse: None for records that are fields already.

        Raises:
            ValueError: as `open_source`.
        """
        self.name = name
        self.bad = BadRows(config.max_bad_rows)
        self._rows: list[Row] = []
        self._places: list[tuple[str, int]] = []
        self._row = row
        read = RowReader(config)
        self.left_out = read.left_out
        every = ((part, number, record) for part, records in parts for number, record in records)
        for part, number, record in every:
            try:
                found = read(record if parse is None else parse(number, record), name)
            except ValueError as error:
                self.bad.add(f"{part}{row}{number}: {error}")
                continue
            if found is not None:
                self._rows.append(found)
                self._places.append((part, number))
            if len(self._rows) == config.first:
                break  # before the next file is opened, which may have to be fetched
        if not self._rows and self.left_out:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
            raise ValueError(f"{address}: all rows are left out ({reasons}); loosen where or solve_rate")
        if not self._rows:
            raise ValueError(f"{address}: holds no rows; {expected}")
        self.num_checked = len(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        if index < 0:
            raise IndexError(f"row {index} of {len(self)}")
        return dataclasses.replace(self._rows[index], source=self.name)

    def place(self, index: int) -> str:
        """See `Source.place`."""
        part, number = self._places[index]
        return f"{part}{self._row}{number}"


def open_jsonl(config: JsonlSourceConfig) -> StoredSource:
    """A JSON Lines file. Fields other than the named ones are ignored."""
    path = _check_path(config.path)
    if not path.is_file():
        raise _no_such_file(config.path, path)

    def records() -> Iterator[Record]:
        with open_bytes(path) as file:
            for number, line in enumerate(file, 1):
                # Blank lines are what is left at the end of many files.
                if line.strip():
                    yield number, line

    return StoredSource(
        path.name,
        [(config.path, records())],
        config,
        address=config.path,
        row=":",
        expected=f"{_ONE_OBJECT} line",
        parse=_parse_line,
    )


def _parse_line(number: int, line: bytes) -> dict[str, Any]:
    cut_off = "" if line.endswith(b"\n") else "; it is the last, so the file may be cut off"
    # A byte order mark at the start, as some editors write it, is no part of the text.
    encoding = "utf-8-sig" if number == 1 else "utf-8"
    return parse_object(line, f"{_ONE_OBJECT} line", encoding=encoding, hint=cut_off)


def open_parquet(config: ParquetSourceConfig) -> StoredSource:
    """Parquet files; only the columns that the config names are read."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError(
            f"{config.path}: for kind=parquet, pip install 'kdrl_jax[parquet]' (pyarrow)"
        ) from None
    fields = [config.question_field, config.answer_field, *config.where]
    fields += [config.completion_field] if config.completion_field else []
    fields += [config.solve_rate_field] if config.solve_rate and config.solve_rate_field else []

    def records(path: Path, address: str) -> Iterator[Record]:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open_bytes(path))
            try:
                table = pq.ParquetFile(file)
                names = table.schema_arrow.names
                columns = {f if f in names else f.split(".")[0] for f in fields}
                # A column that is missing is told of with the first row, by all names of the file.
                wanted = sorted(columns) if columns <= set(names) else None
                number = 0
                for batch in table.iter_batches(batch_size=1024, columns=wanted):
                    for record in batch.to_pylist():
                        yield number, record
                        number += 1
            except (OSError, ValueError, NotImplementedError) as error:  # of pyarrow
                raise _UnreadableError(
                    f"{address}: cannot be read as Parquet ({_line(error)}); fetch it again"
                ) from error

    return _of_files(config, (".parquet",), records, " row ", "expected a Parquet file with rows")


def open_array_record(config: ArrayRecordSourceConfig) -> StoredSource:
    """ArrayRecord files of JSON objects."""
    try:
        from array_record.python import array_record_module
    except ImportError:
        raise ImportError(
            f"{config.path}: for kind=array_record, pip install 'kdrl_jax[array_record]' (array_record)"
        ) from None

    def records(path: Path, address: str) -> Iterator[Record]:
        with contextlib.ExitStack() as stack:
            if is_remote(path):
                # Its reader knows files alone.
                copy = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".array_record"))
                copy.write(path.read_bytes())
                copy.flush()
                path = Path(copy.name)
            try:
                reader = array_record_module.ArrayRecordReader(str(path))
                with contextlib.closing(reader):  # which raises what is wrong with the file
                    lines = reader.read_all()
            except (OSError, ValueError, RuntimeError) as error:
                why = _line(error) or type(error).__name__
                raise _UnreadableError(
                    f"{address}: cannot be read as ArrayRecord ({why}); fetch it again"
                ) from error
        yield from enumerate(lines)

    def parse(number: int, record: bytes) -> dict[str, Any]:
        return parse_object(record, expected)

    expected = f"{_ONE_OBJECT} record"
    return _of_files(config, (".array_record", ".arrayrecord"), records, " record ", expected, parse)


def open_hub(config: HubSourceConfig) -> StoredSource:
    """A data set of the Hugging Face hub, fetched once and kept in the library's cache."""
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{config.name}: for kind=hub, pip install 'kdrl_jax[hub]' (datasets)") from None
    whole = config.name if config.config is None else f"{config.name}/{config.config}"
    try:
        # From version 4 on the library runs no code of a data set; requirements hold it there.
        found = datasets.load_dataset(
            config.name, config.config, split=config.split, revision=config.revision
        )
    except Exception as error:
        # Of names, networks, files and rights, in classes of several libraries.
        raise ValueError(
            f"{whole}: the data set cannot be loaded ({type(error).__name__}: {_line(error)}). Check name, "
            "config and split, the network, and, if it is gated, `hf auth login`; or fetch its files and use "
            "kind=parquet or kind=jsonl"
        ) from error

    name = f"{config.name.rstrip('/').split('/')[-1]}/{config.split}"
    return StoredSource(
        name,
        [(f"{whole}/{config.split}", enumerate(found))],
        config,
        address=whole,
        row=" row ",
        expected="check config and split",
    )


class _UnreadableError(Exception):
    """A file that is no such file: no row of it can be left out instead."""


def _of_files(
    config: ParquetSourceConfig | ArrayRecordSourceConfig,
    suffixes: tuple[str, ...],
    records: Callable[[Path, str], Iterator[Record]],
    row: str,
    expected: str,
    parse: Parse | None = None,
) -> StoredSource:
    """The source of a file, or of the files of a folder."""
    path = _check_path(config.path)
    files = [path]
    if path.is_dir():
        files = sorted((p for p in path.iterdir() if p.name.endswith(suffixes)), key=lambda p: p.name)
        if not files:
            raise FileNotFoundError(f"data folder {config.path}: no {' or '.join(suffixes)} file in it")
    elif not path.is_file():
        raise _no_such_file(config.path, path)
    addresses = [config.path if p is path else f"{config.path.rstrip('/')}/{p.name}" for p in files]
    parts = [(a, records(p, a)) for a, p in zip(addresses, files, strict=True)]
    try:
        return StoredSource(
            path.name, parts, config, address=config.path, row=row, expected=expected, parse=parse
        )
    except _UnreadableError as error:
        raise ValueError(str(error)) from error.__cause__


def _check_path(address: str) -> Path:
    check_bucket(address)
    return as_path(address)


def _no_such_file(address: str, path: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"data file {address}: no such file (looked at {absolute(path)}); paths in "
        "data.train and data.eval are relative to the working directory"
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
