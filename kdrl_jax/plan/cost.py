"""What a compiled program computes, moves and waits for on one chip, and about how long it takes.

The program's text is walked from its entry. A loop counts as often as it runs, a conditional as its most
expensive branch (or as the caller weighs the branches), and a fusion as one instruction that reads its
operands and writes its results. Instructions run in the order of the schedule:

- A product takes what the TPU compiler estimates for it (`estimated_cycles`), and never less than its
  operations at peak or its bytes at the memory's bandwidth. Any other instruction takes its bytes at the
  bandwidth. The compiler estimates those too, but not well: `benchmarks/compiler_estimates.py` shows that it
  takes products of large bfloat16 matrices to run at 78 to 94 % of a chip's peak, and an addition in the
  main memory at 36 to 41 % of the bandwidth. The truth is likely between `Cost.seconds` and
  `Cost.compiler_seconds`, which believes it in all.
- A Pallas kernel takes its operations at `KERNEL_SHARE` of the peak, or its bytes at the bandwidth. The
  compiler knows neither. They come from the caller, or from the `cost_estimate` the kernel was given; failing
  both, its bytes are taken to be its operands and results, and `Cost.notes` says so.
- A collective takes what `collectives` says. One that the compiler starts and later waits for runs beside
  what is scheduled in between, one after another on the network; only the wait that is left takes time. So
  do copies from and to the vector memory, on the main memory.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from kdrl_jax.plan.chips import Chip
from kdrl_jax.plan.hlo import parse
from kdrl_jax.plan.walk import NOTHING, Given, Walk, by_compiler, estimate

LEFT_OUT = (
    "the host: dispatch, input, rewards, writing of checkpoints, and its memory, where what is parked lies",
    "evaluation",
    "networks between slices, and between hosts outside of a slice's own",
    "vector work that takes longer than the memory, such as exponentials of what stays in the vector memory",
    "kernels that reach another share of the peak",
    "collectives that another one holds up on a link it shares",
    "loops whose count is known at run time only, beyond once, unless the caller gives it",
)
"""What no estimate here knows of."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind and group size."""

    kind: str
    group_size: int
    count: float
    bytes: float
    """See `collectives.Transfer.bytes`; summed."""
    seconds: float
    """On the network, whether or not the program waits for them."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """One run of a program, on one chip."""

    flops: float
    """Of products outside of Pallas kernels; an addition and a multiplication are two."""
    kernel_flops: float
    """Of Pallas kernels, as far as they say."""
    bytes: float
    """From and to the main memory."""
    collectives: tuple[Collective, ...]
    seconds: float
    """The estimate."""
    compiler_seconds: float
    """The same where all that the compiler estimates takes so long."""
    seconds_by_scope: Mapping[str, float]
    """`seconds`, by the scopes that were asked for and `OTHER`."""
    seconds_by_kind: Mapping[str, float]
    """`seconds`, as compute, memory, collective (what is waited for) and pallas."""
    uncounted_loops: tuple[str, ...]
    """op_names of loops of unknown count, which count once."""
    notes: tuple[str, ...]
    """What had to be assumed, one line each."""


def analyse(text: str, chip: Chip, given: Given = NOTHING, scopes: Sequence[str] = ()) -> Cost:
    """The cost of `compiled.as_text()`.

    Args:
        scopes: names of `jax.named_scope` that `seconds_by_scope` tells apart. What stands in several is of
            the first in this order.

    Raises:
        ValueError: when the text is no program.
    """
    module = parse(text)
    walk = Walk(module, chip, given, tuple(scopes))
    tally = walk.program(estimate)
    scope_seconds: dict[str, float] = collections.defaultdict(float)
    kind_seconds: dict[str, float] = collections.defaultdict(float)
    for (scope, kind), seconds in tally.seconds.items():
        scope_seconds[scope] += seconds
        kind_seconds[kind] += seconds
    return Cost(
        flops=tally.flops,
        kernel_flops=tally.kernel_flops,
        bytes=tally.bytes,
        collectives=tuple(Collective(*key, *sums) for key, sums in sorted(tally.collectives.items())),
        seconds=tally.total,
        compiler_seconds=walk.program(by_compiler).total,
        seconds_by_scope=dict(scope_seconds),
        seconds_by_kind=dict(kind_seconds),
        uncounted_loops=tuple(tally.uncounted),
        notes=tuple(tally.notes),
    )
