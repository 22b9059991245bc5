"""What the processes of a job, one on each host, tell each other, and which rows each answers for.

All run the same program over one mesh and reach the same lines in the same order; what they decide must
therefore be the same on all. Whatever a host alone knows (a signal, a file, a verdict on an answer) goes
through here before anything depends on it. With one process nothing is exchanged.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from kdrl_jax import sharding


@dataclasses.dataclass(frozen=True)
class Share:
    """The rows of a batch that lie on this process's devices."""

    num_rows: int
    """Of the whole batch."""
    held: np.ndarray
    """int [rows here]: which these are, ascending."""
    owned: np.ndarray
    """bool [rows here]: whether this process answers for a row. Where `tensor` crosses hosts, several hold
    the row, and one of them owns it."""

    @property
    def owned_rows(self) -> np.ndarray:
        """int: the rows that this process answers for."""
        return self.held[self.owned]

    def repeated(self, times: int) -> "Share":
        """Of a batch in which each row is followed by its repetitions: completions of prompts."""
        rows = (self.held[:, None] * times + np.arange(times)).ravel()
        return Share(self.num_rows * times, rows, np.repeat(self.owned, times))


def share(mesh: Mesh, num_rows: int) -> Share:
    """This process's rows of a batch that lies over `data` and `fsdp`."""
    places = sharding.rows(mesh).devices_indices_map((num_rows,))
    owner: dict[int, int] = {}
    here: set[int] = set()
    for device, (part,) in places.items():
        process = int(device.process_index)  # type: ignore[attr-defined]
        for row in range(*part.indices(num_rows)):
            owner[row] = min(owner.get(row, process), process)
            if process == jax.process_index():
                here.add(row)
    held = np.array(sorted(here), np.int64)
    return Share(num_rows, held, np.array([owner[r] == jax.process_index() for r in held], bool))


def rows_of_first(mesh: Mesh, num_rows: int) -> np.ndarray:
    """int: the rows of a batch over `data` and `fsdp` that the first process answers for, ascending; known to
    all."""
    places = sharding.rows(mesh).devices_indices_map((num_rows,))
    rows = {
        row
        for device, (part,) in places.items()
        if int(device.process_index) == 0  # type: ignore[attr-defined]
        for row in range(*part.indices(num_rows))
    }
    return np.array(sorted(rows), np.int64)


def num_processes() -> int:
    return jax.process_count()


def is_first() -> bool:
    """Whether this process writes the run's files and speaks to its user."""
    return jax.process_index() == 0


def put(values: np.ndarray, rows: Share, mesh: Mesh) -> jax.Array:
    """The rows that each process holds, [rows here, ...], as one array over `data` and `fsdp`."""
    shape = (rows.num_rows, *values.shape[1:])

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(rows.num_rows)
        first = int(np.searchsorted(rows.held, start))
        return values[first : first + stop - start]

    return jax.make_array_from_callback(shape, sharding.rows(mesh), part)


def spread(values: np.ndarray, place: Sharding) -> jax.Array:
    """What every process has whole, laid out over the devices."""
    return jax.make_array_from_callback(values.shape, place, lambda index: values[index])


def held(x: jax.Array) -> np.ndarray:
    """The rows [rows here, ...] of an array over `data` and `fsdp` that this process's devices have, as its
    `Share` counts them."""
    if x.is_fully_addressable:
        return np.asarray(x)
    mesh = getattr(x.sharding, "mesh", None)
    assert isinstance(mesh, Mesh)
    assert x.sharding.is_equivalent_to(sharding.rows(mesh), x.ndim), x.sharding
    parts = {shard.index[0].indices(len(x))[0]: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def put_back(values: np.ndarray, like: jax.Array) -> jax.Array:
    """What `held` gave of an array, changed, in its place."""
    parts = {shard.index[0].indices(len(like))[0]: len(shard.data) for shard in like.addressable_shards}
    starts = sorted(parts)
    first = dict(zip(starts, np.cumsum([0, *(parts[start] for start in starts)]), strict=False))

    def part(index: Any) -> np.ndarray:
        start = index[0].indices(len(like))[0]
        return values[first[start] : first[start] + parts[start]]

    return jax.make_array_from_callback(like.shape, like.sharding, part)


def whole(tree: Any) -> Any:
    """Arrays of devices, wherever their parts lie, whole on every process."""

    def fetch(x: jax.Array) -> np.ndarray:
        if not (x.is_fully_addressable or x.is_fully_replicated):
            assert isinstance(x.sharding, NamedSharding)
            x = jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))
        return np.asarray(x)

    return jax.tree.map(fetch, tree)


def gather(values: np.ndarray, rows: Share) -> np.ndarray:
    """What the owner of each row knows of it, [rows here, ...], whole on every process.

    Args:
        values: bool, or a number of at most 32 bits; rows that are not owned are not read.
    """
    if jax.process_count() == 1:
        return values
    mine = np.zeros((rows.num_rows, *values.shape[1:]), values.dtype)
    mine[rows.owned_rows] = values[rows.owned]
    # Each row is zero on all processes but one.
    return multihost_utils.process_allgather(mine).sum(axis=0).astype(values.dtype)


def total(counts: np.ndarray) -> np.ndarray:
    """The sum over processes of counts from 0 to below 2**62, on every process."""
    if jax.process_count() == 1:
        return counts
    high, low = np.moveaxis(_gathered(counts), 1, 0).sum(axis=1)
    return (high << 31) + low


def agreed(question: Callable[[], bool]) -> Callable[[], bool]:
    """The question put to every process, answered yes by all as soon as one of them says so."""
    if jax.process_count() == 1:
        return question
    return lambda: bool(multihost_utils.process_allgather(np.array(question())).any())


def least(number: int) -> int:
    """The smallest of the processes' numbers, from 0 to below 2**62."""
    if jax.process_count() == 1:
        return number
    return min((int(high) << 31) + int(low) for high, low in _gathered(np.array(number)))


def _gathered(numbers: np.ndarray) -> np.ndarray:
    """int64 [processes, 2, ...]: of each, what is above the lowest 31 bits, and these; arrays have 32."""
    numbers = numbers.astype(np.int64)
    halves = np.stack([numbers >> 31, numbers & 0x7FFFFFFF]).astype(np.int32)
    return np.asarray(multihost_utils.process_allgather(halves)).astype(np.int64)


def of_first(answer: bool) -> bool:
    """What the first process says: the others may see a shared file earlier or later than it does."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.array(answer)))


def text_of_first(text: str) -> str:
    """What the first process says.

    Raises:
        ValueError: more than 256 bytes of UTF-8.
    """
    if len(text.encode()) > 256:
        raise ValueError(f"{text[:60]}… is too long to be told to other processes")
    if jax.process_count() == 1:
        return text
    said = multihost_utils.broadcast_one_to_all(np.frombuffer(text.encode().ljust(256), np.uint8))
    return bytes(said).decode().rstrip()


def wait_for_all(name: str) -> None:
    """Goes on once every process has come here.

    Args:
        name: of this place, for the error of one that has not.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
