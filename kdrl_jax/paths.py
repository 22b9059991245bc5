"""Paths on this machine and in buckets (`gs://…`, `s3://…`), used alike.

A bucket's path is etils' (the one that orbax takes), which speaks through fsspec. What differs there: a
folder is there once something is in it, an object is written whole or not at all, and nothing is appended.
"""

import errno
import importlib.util
import io
import logging
import os
import posixpath
import re
from pathlib import Path
from typing import IO, Any, cast

_BACKENDS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
"""Scheme -> the module that speaks to it, and the extra of this package that installs it."""

_CREDENTIALS = {
    "gs": "the credentials (gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS)",
    "s3": "the credentials (AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)",
}


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether it is in a bucket."""
    return _scheme(path) is not None


def as_path(path: str | os.PathLike[str]) -> Path:
    """The path, with pathlib's methods, wherever it is.

    Raises:
        ImportError: what speaks to such buckets is not installed; it says how to.
        ValueError: no bucket is named, or another scheme.
    """
    scheme = _scheme(path)
    if scheme is None:
        if found := re.match(r"([a-z0-9]+)://", os.fspath(path)):
            raise ValueError(f"{path}: {found[0]} is not supported; give gs://, s3:// or a local path")
        return _at_home(path)
    if not re.match(r"\w+://[^/]", os.fspath(path)):
        raise ValueError(f"{path}: names no bucket; write {scheme}://BUCKET/PATH")
    module, extra = _BACKENDS[scheme]
    if not _is_installed(module):
        raise ImportError(f"{path}: for {scheme}:// paths, pip install 'kdrl_jax[{extra}]' ({module})")
    # Here, since most runs need neither.
    import fsspec
    from etils import epath

    for protocol in ("gs", "gcs", "s3"):
        # Other hosts write there too: what a listing said a while ago is no longer so.
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    # It prints the traceback of what it raises, too.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return cast(Path, epath.Path(path))


def _at_home(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}; there is no such user here") from error


def absolute(path: str | os.PathLike[str]) -> Path:
    """The path from the root: two names of one file become one, as far as that can be seen."""
    return as_path(path) if is_remote(path) else as_path(path).resolve()


def join(folder: Path, name: str) -> Path:
    """What a file in `folder` means by a name: one beside it, unless it is absolute or in a bucket."""
    if is_remote(name) or os.path.isabs(name):
        return as_path(name)
    if not is_remote(folder):
        return folder / name
    # A bucket knows no `..`.
    scheme, _, place = os.fspath(folder).partition("://")
    found = posixpath.normpath(posixpath.join(place, name))
    return folder / name if found.startswith(".") else as_path(f"{scheme}://{found}")


def check_bucket(path: str | os.PathLike[str]) -> None:
    """That the bucket of a path is there, if it is in one; libraries would make a misspelt one.

    Raises:
        FileNotFoundError: there is no such bucket.
        PermissionError: no credentials, or none that may read it.
        OSError: it cannot be asked now.
    """
    scheme = _scheme(path)
    if scheme is None:
        return
    bucket = "/".join(os.fspath(as_path(path)).split("/")[:3])
    reason = "there is no such bucket"
    try:
        # Listing it takes fewer rights than asking for the bucket itself.
        filesystem(path).ls(bucket, detail=False)
        return
    except FileNotFoundError:
        kind: type[OSError] = FileNotFoundError
    except Exception as error:  # each library has errors of its own
        kind = PermissionError if _is_refusal(error) else OSError
        reason = f"it cannot be read ({' '.join(str(error).split())[:200]})"
    raise kind(f"{path}: bucket {bucket}: {reason}; check its name, and {_CREDENTIALS[scheme]}")


def check_writable(folder: Path) -> None:
    """That files can be written to a folder, which may not be there yet; nothing stays behind.

    Raises:
        PermissionError: they may not.
        OSError: they cannot.
    """
    check_bucket(folder)
    if is_remote(folder):
        probe = folder / ".writable"
        try:
            probe.write_bytes(b".")
            probe.unlink()
        except Exception as error:  # each library has errors of its own
            line = " ".join(str(error).split())[:200]
            kind = PermissionError if _is_refusal(error) else OSError
            raise kind(f"{folder} cannot be written ({line}); check what the credentials may do") from error
        return
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{folder} can be no folder: {there} is a file; name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: {there} may not be written; name another folder, or allow it")


def filesystem(path: str | os.PathLike[str]) -> Any:
    """fsspec's file system of the bucket that a path is in."""
    import fsspec

    as_path(path)
    return fsspec.filesystem(_scheme(path))


def is_outage(error: BaseException) -> bool:
    """Whether a disk, a network or a bucket has failed."""
    # What speaks to buckets raises errors of its own.
    library = type(error).__module__.split(".")[0]
    return isinstance(error, OSError) or library in ("gcsfs", "google", "botocore", "aiobotocore", "s3fs")


def _is_refusal(error: BaseException) -> bool:
    words = r"credential|forbidden|denied|unauthori[sz]ed|does not have"
    return isinstance(error, PermissionError) or re.search(words, f"{type(error)} {error}", re.I) is not None


_WRONG_NAMES = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)
_WRONG = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


def is_passing(error: BaseException) -> bool:
    """Whether it is an outage that may be over at the next try: no wrong name, no missing right."""
    if isinstance(error, _WRONG_NAMES) or getattr(error, "errno", None) in _WRONG:
        return False
    return is_outage(error) and not _is_refusal(error)


def make_folder(path: Path) -> None:
    """Makes a folder and those around it; in a bucket there is nothing to make."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def move_folder(folder: Path, to: Path, *, first: str) -> None:
    """Moves a folder with all that is in it, to a place where nothing is.

    Args:
        first: the file without which the folder counts for nothing. In a bucket, where files are copied and
            then removed, it is removed first, and not copied.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not is_remote(folder):
        folder.rename(to)
        return
    # Not etils' `rename`: on gs:// it moves nothing, and says that there is nothing.
    bucket = filesystem(folder)
    start = os.fspath(folder).partition("://")[2]
    files = bucket.find(os.fspath(folder))
    if not files:
        raise FileNotFoundError(os.fspath(folder))
    for file in files:
        name = file.removeprefix(f"{start}/")
        if name != first:
            bucket.copy(file, f"{to}/{name}")
    remove_folder(folder, first=first)


def remove_folder(folder: Path, *, first: str) -> None:
    """Removes a folder in a bucket, beginning with the file without which it counts for nothing.

    Raises:
        FileNotFoundError: that file is not there.
    """
    bucket = filesystem(folder)
    bucket.rm_file(f"{folder}/{first}")
    bucket.rm(os.fspath(folder), recursive=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all; text in UTF-8."""
    content = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(content)
        return
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def open_bytes(path: Path) -> IO[bytes]:
    """To read; from a bucket at once."""
    return io.BytesIO(path.read_bytes()) if is_remote(path) else path.open("rb")


def size_of(path: Path) -> int:
    """Of a file, in bytes."""
    found: Any = path.stat()
    return int(found.length if is_remote(path) else found.st_size)


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _scheme(path: str | os.PathLike[str]) -> str | None:
    scheme, mark, _ = os.fspath(path).partition("://")
    return scheme if mark and scheme in _BACKENDS else None
