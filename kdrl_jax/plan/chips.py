"""What a TPU chip has, as far as public pages say.

Sources, unless a row says otherwise: cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e and tpu7x, read in
2026. `memory` is what the compiler gives out and less than what the pages say: it is the limit named in the
RESOURCE_EXHAUSTED of a program that is too large, compiled by libtpu 0.0.42.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a program: a chip, or half of one where each core is a device of its own (TPU7x)."""

    kind: str
    """As users write it before the colon of a topology."""
    topology_kind: str
    """As libtpu wants it there."""
    dims: int
    """Dimensions of the network: 2 or 3."""
    megacore: bool
    """Whether two cores must be asked to be one device."""
    memory: float
    """Bytes that a program can have."""
    flops: float
    """Floating-point operations a second in bfloat16; an addition and a multiplication are two."""
    int8_ops: float
    """The same of 8-bit integers."""
    bandwidth: float
    """Bytes a second of the main memory (HBM)."""
    link: float
    """Bytes a second over one link of the network (ICI), in one direction: the pages' bandwidth of a chip
    over its links (two for each dimension) and both directions."""
    clock: float
    """Cycles a second, in which the compiler estimates."""


_GIB = 2.0**30

CHIPS = {
    chip.kind: chip
    for chip in (
        # Network and clock: arXiv 2304.01433, table 4. 8-bit integers are no faster.
        Chip("v4", "v4", 3, True, 30.75 * _GIB, 275e12, 275e12, 1200e9, 50e9, 1.05e9),
        # Clock: peak over the products a cycle of its four units of 128 x 128.
        Chip("v5e", "v5e", 2, False, 15.75 * _GIB, 197e12, 393e12, 819e9, 50e9, 1.5e9),
        # 8-bit peak: Google's announcement of 6 December 2023. Clock: as v5e, with eight units.
        Chip("v5p", "v5p", 3, False, 95.74 * _GIB, 459e12, 918e12, 2765e9, 100e9, 1.75e9),
        # Clock: not published; the peak, over 2 x 256 x 256 products in each of two units, twice a cycle.
        Chip("v6e", "v6e", 2, False, 31.25 * _GIB, 918e12, 1836e12, 1600e9, 100e9, 1.75e9),
        # Half of a chip's 2307 TFLOP/s and 7380 GB/s. The page gives no integer peak, and the compiler
        # expects no more of 8 bits than of 16. The links are shared by both halves, each counted with half.
        # Clock: as v6e.
        Chip("v7x", "tpu7x", 3, False, 94.75 * _GIB, 1153.5e12, 1153.5e12, 3690e9, 50e9, 2.2e9),
    )
}
"""By kind."""
