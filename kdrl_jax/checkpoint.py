"""Exact save and resume: the state, and where the data stood, in one orbax checkpoint.

The teacher's parameters are never in a checkpoint. Keys are not either: they follow from the seed and
the step.
"""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from kdrl_jax import hosts
from kdrl_jax.checkpoint_copies import Copies
from kdrl_jax.paths import absolute
from kdrl_jax.types import Params, TrainState


class Checkpoints:
    """The `checkpoints/` of a run. A save is whole on disk when it returns."""

    def __init__(self, run_dir: str | Path, *, keep: int | None = None, write: bool = False):
        """Opens the folder.

        Args:
            keep: newest checkpoints kept; None keeps all.
            write: make the folder if it is not there.

        Raises:
            ValueError: it is not there; or several hosts would write to a bucket that orbax does not reach.
        """
        self.directory = absolute(run_dir) / "checkpoints"
        if not write and not self.directory.is_dir():
            raise ValueError(f"{self.directory} does not exist; train the run first")
        self._keep = keep
        is_s3 = str(self.directory).startswith("s3://")
        if is_s3 and hosts.num_processes() > 1:
            raise ValueError(
                f"{self.directory}: checkpoints of several hosts go to gs:// or a shared file system, not s3://"
            )
        self._copies = Copies(self.directory) if is_s3 else None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep if self._copies is None else 1, create=write, enable_async_checkpointing=False
        )
        folder = self.directory if self._copies is None else self._copies.local
        self._manager = ocp.CheckpointManager(folder, options=options)

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint, or None."""
        return max(self.steps, default=None)

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        return sorted(self._manager.all_steps()) if self._copies is None else self._copies.steps()

    def save(self, step: int, state: TrainState, host: dict[str, Any]) -> None:
        """Saves, unless this step is there already. Arrays may be donated afterwards.

        Args:
            step: optimizer steps done.
            host: JSON-able: the position in the data and the counters of the host.
        """
        if step == self.latest_step:
            return
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            rest=ocp.args.StandardSave(_rest(state)),
            host=ocp.args.JsonSave(host),
        )
        self._manager.save(step, args=args)
        if self._copies is not None:
            self._copies.push(step, self._keep)

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint, laid out as `abstract` (shapes, types, shardings) says."""
        step = self._require()
        if self._copies is not None:
            self._copies.fetch(step)
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            rest=ocp.args.StandardRestore(_rest(abstract)),
            host=ocp.args.JsonRestore(),
        )
        found = self._manager.restore(step, args=args)
        return TrainState(params=found.params, **found.rest), found.host

    def restore_params(self, abstract: Params, step: int | None = None) -> Params:
        """Only the parameters, laid out and cast as `abstract` says.

        Args:
            step: which checkpoint; None is the newest.

        Raises:
            ValueError: there is none, or not at that step; it names those there.
        """
        newest = self._require()
        if step is not None and step not in self.steps:
            there = ", ".join(map(str, self.steps))
            raise ValueError(f"step={step}: {self.directory} holds no such checkpoint; there are {there}")
        step = newest if step is None else step
        if self._copies is not None:
            self._copies.fetch(step, "params")
        args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        return self._manager.restore(step, args=args).params

    def _require(self) -> int:
        if self.latest_step is None:
            raise ValueError(f"{self.directory} holds no complete checkpoint; train the run first")
        return self.latest_step

    def close(self) -> None:
        self._manager.close()
        if self._copies is not None:
            self._copies.close()


def _rest(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "opt_state": state.opt_state,
        "skipped": state.skipped,
        "skipped_total": state.skipped_total,
    }
