"""The `export` command: the student as a Hugging Face folder, which transformers and others load."""

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from kdrl_jax.config import Config, ExportOptions
from kdrl_jax.data.tokenizer import Tokenizer
from kdrl_jax.models import tensors
from kdrl_jax.models.hf import read_json
from kdrl_jax.models.hf_write import DTYPES, stored_dtype, write_json, write_tensors
from kdrl_jax.paths import as_path, is_remote
from kdrl_jax.setup import SingleModel, make_single

_GIB = 1 << 30


def export(config: Config, options: ExportOptions, console: Console, *, is_run: bool) -> Path:
    """Writes config.json, generation_config.json, safetensors and the tokenizer's files, all or nothing.

    Args:
        is_run: the newest checkpoint (or `options.step`) of the config's run, instead of the student as
            the config starts it.

    Returns:
        The folder.

    Raises:
        ValueError: an `out` that holds something, no such checkpoint, or numbers that the type cannot hold.
    """
    if is_remote(options.out):
        raise ValueError(f"out={options.out} is in a bucket; export to a local folder and copy it there")
    out = as_path(options.out)
    _check_free(out)
    if options.step is not None and not is_run:
        raise ValueError(f"step={options.step} names a checkpoint of a run; give the run's directory")
    single = make_single(config, "student")
    dtype = options.dtype or _default_dtype(single)
    table, decoder = single.source.family.tensors, single.model.config
    shapes = tensors.shapes(table, decoder)
    count = sum(math.prod(shape) for shape in shapes.values())
    num_bytes = count * np.dtype(DTYPES[dtype][1]).itemsize
    with _whole_or_nothing(out) as folder:
        _write_texts(folder, single, dtype)
        with console.status("loading"):
            # In float32: casting is the writer's, which sees what does not fit.
            params = single.params(config.run_dir if is_run else None, options.step)
        with _progress(console) as progress:
            task = progress.add_task("writing", total=num_bytes)
            num_files = write_tensors(
                folder,
                shapes,
                tensors.export(table, decoder, params),
                dtype=dtype,
                max_bytes=options.max_shard_gib * _GIB,
                on_tensor=lambda size: progress.advance(task, size),
            )
    files = "1 file" if num_files == 1 else f"{num_files} files"
    console.print(
        f"{out}: {count:,} parameters, {dtype}, {num_bytes / _GIB:.2f} GiB in {files}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return out


def _default_dtype(single: SingleModel) -> str:
    folder = _source_folder(single)
    return (folder and stored_dtype(folder)) or "float32"


def _source_folder(single: SingleModel) -> Path | None:
    """The Hugging Face folder the student began from, if it was one."""
    path = single.source.tokenizer_path
    return Path(path) if path is not None and Path(path).is_dir() else None


def _write_texts(folder: Path, single: SingleModel, dtype: str) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    ids = token_ids(single.tokenizer)
    config = single.source.family.config_to_hf(single.model.config) | ids | {"dtype": dtype}
    generation: dict[str, Any] = {}
    source = _source_folder(single)
    if source is not None and (source / "generation_config.json").is_file():
        generation = read_json(source / "generation_config.json")
    single.tokenizer.save(folder)
    # After the tokenizer's files: these two are not its own to write.
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation | ids)


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """`bos_token_id`, `eos_token_id` (all end ids, a list if there are several) and `pad_token_id`.

    Of a tokenizer that names no BOS it is null: left out, transformers would take the family's.
    """
    ends = list(tokenizer.end_ids)
    ids = {"eos_token_id": ends if len(ends) > 1 else ends[0], "pad_token_id": tokenizer.pad_id}
    bos, name = tokenizer.bos_id, tokenizer.template_tokens.get("bos_token")
    if bos is None and name is not None:
        # Named, but no text begins with it.
        strings = tokenizer.token_strings()
        bos = strings.index(name) if name in strings else None
    return ids | {"bos_token_id": bos}


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _check_free(out: Path) -> None:
    """Raises ValueError unless `out` is absent or an empty folder."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise ValueError(f"out={out} exists and is no folder; name another")
    if any(out.iterdir()):
        raise ValueError(f"out={out} exists and is not empty; name another folder, or remove it")
    if out.is_symlink() or out.is_mount():
        raise ValueError(f"out={out} is a link or a mount, which no folder replaces; name one inside it")


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` at the end, and vanishes if there is no end."""
    absent = [parent for parent in out.absolute().parents if not parent.exists()]
    partial = out.absolute().with_name(f".{out.absolute().name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in absent:
            with suppress(OSError):
                parent.rmdir()
        raise
