"""An iteration's rollouts, cut into minibatches and laid into packed rows."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from kdrl_jax import hosts, sharding
from kdrl_jax.config import Config
from kdrl_jax.models.attend import RowAttention, row_attention
from kdrl_jax.scoring.packing import PackShape, passes_needed, place
from kdrl_jax.scoring.packs import Packs, pack
from kdrl_jax.types import Rollouts

POSITIONS = 2048
"""Of a packed row, if the longest completion needs no more: as many are multiplied well on any device."""

ROWS_OF_A_DEVICE = 8
"""A minibatch of the longest completions fills at least so many packed rows of a device, if it has so many:
with fewer, the last pass would be padding in large part."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """One minibatch of an iteration."""

    rows_B: np.ndarray
    """int32: which rows of the rollouts it has; the packs count these from 0."""
    packs: Packs
    kind_R: np.ndarray
    """int32: of each packed row, the kind that `pack_rollouts` was given."""


def pack_shape(
    num_rows: int,
    longest: int,
    mesh: Mesh,
    attention: RowAttention,
    *,
    length: int | None = None,
    rows_per_pass: int | None = None,
    share_prompts: bool = False,
    num_kinds: int = 1,
) -> PackShape:
    """The shape of packed rows for so many rows of rollouts, whatever their lengths.

    Args:
        longest: a prompt and its completion.
        attention: of the models that take the rows.
        length: of a packed row; None is chosen.
        rows_per_pass: over all devices; None is one a device.
    """
    shards = sharding.batch_shards(mesh)
    if length is None:
        of_device = -(-num_rows // shards)
        count = max(1, min(POSITIONS // longest, of_device // ROWS_OF_A_DEVICE))
        tile = attention.tile(count * longest)
        length = -(-count * longest // tile) * tile
    rows_per_pass = rows_per_pass or shards
    needed = passes_needed(num_rows, longest, length, rows_per_pass, num_kinds)
    return PackShape(length, rows_per_pass, needed, share_prompts)


def config_pack_shape(config: Config, mesh: Mesh, num_rows: int | None = None) -> PackShape:
    """The shape of a minibatch of a run.

    Args:
        num_rows: of the rollouts; None is those of a minibatch.

    Raises:
        ValueError: prompts are to be shared where attention cannot.
    """
    c, t = config, config.train
    if num_rows is None:
        num_rows = c.groups_per_batch * c.rollout.group_size // t.num_minibatches
    longest = c.data.max_prompt_tokens + c.rollout.max_new_tokens
    attention = row_attention(t.attention, mesh)
    takes_prefixes = attention.takes_prefixes
    if t.share_prompts == "always" and not takes_prefixes:
        raise ValueError(
            f"train.share_prompts=always, but train.attention={t.attention} is splash here, which sees one "
            "run of tokens alone; use attention=blockwise, or share_prompts=auto"
        )
    return pack_shape(
        num_rows,
        longest,
        mesh,
        attention,
        length=t.pack_length,
        rows_per_pass=t.microbatch_rows,
        share_prompts=takes_prefixes if t.share_prompts == "auto" else t.share_prompts == "always",
        num_kinds=config.num_kinds,
    )


def minibatch_rows(num_rows: int, group_size: int, num: int) -> list[np.ndarray]:
    """The rows of each of `num` minibatches: every num-th group, whose completions can share their prompt;
    or every num-th row, where groups do not divide."""
    rows = np.arange(num_rows, dtype=np.int32)
    if (num_rows // group_size) % num:
        return [rows[i::num] for i in range(num)]
    groups = rows.reshape(-1, group_size)
    return [groups[i::num].ravel() for i in range(num)]


def pack_rollouts(
    rollouts: Rollouts,
    group_size: int,
    shape: PackShape,
    mesh: Mesh,
    *,
    num_minibatches: int = 1,
    kinds_B: Sequence[int] | None = None,
    num_kinds: int = 1,
) -> list[Packed]:
    """The minibatches of an iteration. Waits for the lengths of the completions.

    Args:
        kinds_B: as in `place`, of all rows.
    """
    prompt_lengths, lengths = hosts.whole((rollouts.prompt_lengths_B, rollouts.completion_lengths_B))
    kinds = np.zeros(len(lengths), int) if kinds_B is None else np.asarray(kinds_B)
    out = []
    for rows in minibatch_rows(len(lengths), group_size, num_minibatches):
        places = place(prompt_lengths[rows], lengths[rows], rows // group_size, shape, kinds[rows], num_kinds)
        of_pass = np.searchsorted(places.bounds[1:], np.arange(shape.max_passes), side="right")
        # A pass takes every max_passes-th row.
        kind_R = np.tile(np.minimum(of_pass, num_kinds - 1), shape.rows_per_pass)
        with jax.set_mesh(mesh):
            packs = pack(
                rollouts.tokens_BT,
                rollouts.prompt_lengths_B,
                rollouts.completion_lengths_B,
                rows,
                places,
                shape,
            )
        out.append(Packed(rows, packs, kind_R.astype(np.int32)))
    return out
