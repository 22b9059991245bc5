"""The `checkpoints/` of a run."""

import contextlib
import functools
import itertools
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.utils import checkpoint_steps

from kdrl_jax import hosts
from kdrl_jax.checkpoint.copies import DONE, Copies
from kdrl_jax.checkpoint.fingerprint import by_name
from kdrl_jax.checkpoint.keep import Keep
from kdrl_jax.checkpoint.sealed import DamagedError, MisfitError, check, saved_types, seal, unseal
from kdrl_jax.paths import absolute, is_outage, make_folder, move_folder
from kdrl_jax.sharding import move
from kdrl_jax.types import Params, TrainingError, TrainState

UNREADABLE = "unreadable"
"""The folder, in `checkpoints/`, of those that were set aside."""
_HOST = "host"
# What tensorstore, below orbax, says of a place that it cannot reach, and not of what it has read there.
_OUTAGES = ("PERMISSION_DENIED", "UNAVAILABLE", "UNAUTHENTICATED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")


class Checkpoints:
    """The folder. A checkpoint is there once it is whole; arrays are written while the run goes on."""

    def __init__(
        self,
        run_dir: str | Path,
        *,
        keep: Keep | None = None,
        write: bool = False,
    ):
        """Opens the folder.

        Args:
            keep: what is kept; None keeps all.
            write: make the folder if it is not there, and remove what a save that was cut off has left.

        Raises:
            ValueError: it is not there; or several hosts would write to a bucket that orbax does not reach.
        """
        _raise_only()
        self.directory = absolute(run_dir) / "checkpoints"
        if not write and not self.directory.is_dir():
            raise ValueError(f"{self.directory} does not exist; train the run first")
        self._keep = keep
        self.accuracies: dict[int, float] = {}
        """Held-out accuracies by step, for `keep`; who knows them adds them."""
        is_s3 = str(self.directory).startswith("s3://")
        if is_s3 and hosts.num_processes() > 1:
            raise ValueError(
                f"{self.directory}: checkpoints of several hosts go to gs:// or a shared file system, not s3://"
            )
        self._copies = Copies(self.directory) if is_s3 else None
        only_newest = Keep(last=1) if self._copies is not None else keep
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if only_newest is None else _Policy(only_newest, self.accuracies),
            create=write,
            cleanup_tmp_directories=write,
        )
        folder = self.directory if self._copies is None else self._copies.local
        self._manager = ocp.CheckpointManager(folder, options=options)

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint, or None."""
        return max(self.steps, default=None)

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order; what is being written is none."""
        return sorted(checkpoint_steps(self.directory)) if self._copies is None else self._copies.steps()

    def prepare(self, state: TrainState) -> None:
        """Compiles what a save computes, so that no later iteration does."""
        seal(_items(state), {})

    def save(self, step: int, state: TrainState, host: dict[str, Any]) -> None:
        """Begins to save, unless this step is there already. Arrays may be donated afterwards.

        Args:
            step: optimizer steps done.
            host: JSON-able: the position in the data and the counters of the host.

        Raises:
            OSError, ValueError: what kept it from being written; of the one before, if it kept this one too.
        """
        if step in self._manager.all_steps() or step in self.steps:
            return
        again = self._failed()
        items = _items(state)
        sealed = seal(items, host)
        if jax.default_backend() == "cpu":
            # There, what is written is the array's own memory, which the next update may be given.
            items = _copied(items)
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._manager.save(step, args=ocp.args.Composite(**args, **{_HOST: ocp.args.JsonSave(sealed)}))
        if self._copies is not None:
            self._manager.wait_until_finished()
            self._copies.push(step, self._keep, self.accuracies)
        if again:
            self.wait()

    def has_failed(self) -> bool:
        """Whether what was being written last has failed, which is told once; waits for nothing.

        Raises:
            OSError, ValueError: in a job of several hosts, of which the others may know nothing of it.
        """
        return not self._manager.is_saving_in_progress() and self._failed()

    def _failed(self) -> bool:
        """Waits for what is being written: whether it has failed."""
        try:
            self._manager.wait_until_finished()
        except Exception:  # orbax and tensorstore have many for disks and buckets
            if hosts.num_processes() > 1:
                raise
            self._manager.reload()
            return True
        return False

    def wait(self) -> None:
        """Until what was saved is whole on disk. Raises as `save`."""
        self._manager.wait_until_finished()

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any], list[str]]:
        """The newest checkpoint that can be read, laid out as `abstract` (shapes, types, shardings) says.

        Newer ones that are damaged are then set aside, in `UNREADABLE`.

        Returns:
            The state, what the host kept, and a line for each that was set aside.

        Raises:
            MisfitError: the checkpoint is of other settings.
            TrainingError: none can be read, or the place cannot be reached; or one cannot be read in a job of
                several hosts, which is then to be started again.
        """
        items = {"params": abstract.params, "rest": _rest(abstract)}
        self._require()
        damaged: dict[int, DamagedError] = {}
        for step in reversed(self.steps):
            try:
                found, host = self._read(step, items)
            except DamagedError as error:
                damaged[step] = error
                if hosts.num_processes() > 1 and step > min(self.steps):
                    # The other hosts may have read their parts of it well, and wait for this one.
                    line = self._set_aside(step, error)
                    raise TrainingError(f"{line}; start again to go on from the one before") from error
                continue
            state = TrainState(params=found["params"], **found["rest"])
            return state, host, [self._set_aside(step, error) for step, error in damaged.items()]
        reasons = "; ".join(f"{step}: {error}" for step, error in damaged.items())
        raise TrainingError(
            f"{self.directory}: no checkpoint can be read ({reasons}); put a copy of one back, or remove "
            "them to begin anew"
        )

    def restore_params(self, abstract: Params, step: int | None = None) -> Params:
        """Only the parameters, laid out and cast as `abstract` says.

        Args:
            step: which checkpoint; None is the newest.

        Raises:
            ValueError: there is none, or not at that step; it names those there. It is damaged.
            MisfitError: it is of other settings.
        """
        newest = self._require()
        there = ", ".join(map(str, self.steps))
        if step is not None and step not in self.steps:
            raise ValueError(f"step={step}: {self.directory} holds no such checkpoint; there are {there}")
        step = newest if step is None else step
        try:
            return self._read(step, {"params": abstract})[0]["params"]
        except DamagedError as error:
            raise ValueError(f"{self.directory}/{step} is damaged: {error}; there are {there}") from error
        except MisfitError as error:
            raise MisfitError(
                f"{self.directory}/{step} does not fit these settings: {error}; undo what was changed of the "
                "run's student.*, or train another run"
            ) from error

    def _read(self, step: int, abstract: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Some items of a checkpoint, and what the host kept.

        Raises:
            DamagedError: it does not hold what was written.
            ValueError: it is of other settings.
        """
        content = unseal(self._raw(step, {_HOST: ocp.args.JsonRestore()})[_HOST])
        arrays, host = content["arrays"], content["host"]
        saved = {
            name: _roomy(tree, saved_types(by_name(tree), arrays[name])) for name, tree in abstract.items()
        }
        found = self._raw(step, {name: ocp.args.StandardRestore(tree) for name, tree in saved.items()})
        for name in found:
            check(found[name], arrays[name])
        return {name: _as(tree, found[name]) for name, tree in abstract.items()}, host

    def _raw(self, step: int, args: dict[str, Any]) -> dict[str, Any]:
        if self._copies is not None:
            for item in args:
                self._copies.fetch(step, item)
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**args))
        except (ValueError, LookupError, OSError) as error:
            # Orbax, tensorstore and their file formats have no common error for what they cannot read.
            if _is_out_of_reach(error):
                line = " ".join(str(error).split())[:300]
                raise TrainingError(f"{self.directory}/{step} cannot be reached: {line}") from error
            raise DamagedError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
        return {name: found[name] for name in args}

    def _set_aside(self, step: int, error: Exception) -> str:
        """Moves a checkpoint to `UNREADABLE`; returns a line about it."""
        aside = self.directory / UNREADABLE
        make_folder(aside)
        # A step that was damaged before has a number behind it.
        names = (str(step) if not i else f"{step}.{i}" for i in itertools.count())
        name = next(name for name in names if not (aside / name).exists())
        with contextlib.suppress(FileNotFoundError):  # another host was first
            move_folder(self.directory / str(step), aside / name, first=DONE)
        if self._copies is not None:
            self._copies.forget(step)
        self._manager.reload()
        return f"checkpoint {step} cannot be read ({error}); it was set aside in {aside}"

    def _require(self) -> int:
        """The newest step. Raises ValueError: there is none."""
        if self.latest_step is None:
            raise ValueError(f"{self.directory} holds no complete checkpoint; train the run first")
        return self.latest_step

    def close(self) -> None:
        """Waits for what is being saved."""
        self._manager.close()
        if self._copies is not None:
            self._copies.close()


class _Policy:
    """`Keep`, as orbax asks for it."""

    def __init__(self, keep: Keep, accuracies: Mapping[int, float]):
        self._keep, self._accuracies = keep, accuracies

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self._keep([info.step for info in checkpoints], self._accuracies)
        return [info.step in kept for info in checkpoints]


def _is_out_of_reach(error: Exception) -> bool:
    """Whether it is the place that cannot be read, and not what lies there."""
    if is_outage(error):
        return not isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
    return any(word in str(error) for word in _OUTAGES)


@functools.cache
def _raise_only() -> None:
    """Orbax raises what went wrong, and that is enough: its log shows it to the user as a traceback before.
    Where one array cannot be read or written, it also closes its event loop, to which tensorstore's answers
    about the others still come: each would be shown as one more."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def hook(what: "sys.UnraisableHookArgs") -> None:
        if not (isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"):
            before(what)

    sys.unraisablehook = hook


def _copied(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding, may_alias=False), tree)


def _roomy(abstract: Any, saved: dict[str, Any]) -> dict[str, Any]:
    """What is to be cast is read into the hosts' memory: the devices may have no room for both."""
    same = all(x.dtype == to.dtype for x, to in zip(jax.tree.leaves(abstract), saved.values(), strict=True))
    return saved if same else {key: move(x, "pinned_host") for key, x in saved.items()}


def _as(abstract: Any, named: dict[str, jax.Array]) -> Any:
    """Arrays by name as the tree they come from, in the types that it has now."""
    leaves, treedef = jax.tree.flatten(abstract)
    cast = []
    for key, to in zip(by_name(abstract), leaves, strict=True):
        x = named.pop(key)  # so that an array is let go as soon as it is cast
        if x.dtype != to.dtype:
            x = _as_type(to.dtype, to.sharding)(move(x, "device"))
        cast.append(jax.device_put(x, to.sharding))
    return jax.tree.unflatten(treedef, cast)


@functools.cache
def _as_type(dtype: Any, place: jax.sharding.Sharding) -> Any:
    return jax.jit(lambda x: x.astype(dtype), out_shardings=place)


def _items(state: TrainState) -> dict[str, dict[str, jax.Array]]:
    return {"params": by_name(state.params), "rest": by_name(_rest(state))}


def _rest(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "opt_state": state.opt_state,
        "skipped": state.skipped,
        "skipped_total": state.skipped_total,
        "usual": state.usual,
    }
