"""A named slice of TPUs, to compile for on any host that has libtpu.

libtpu asks Google's metadata server about the machine it runs on unless the environment has
TPU_SKIP_MDS_QUERY=1 and TPU_WORKER_HOSTNAMES=localhost; the caller sets both before the first use. Only
`main` touches the environment.
"""

import importlib.util
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from kdrl_jax.plan.chips import CHIPS, Chip

_EXAMPLES = {2: ("1x1", "2x2", "4x4"), 3: ("1x1x1", "2x2x1", "4x4x4")}
_INSTALL = "to compile for TPUs, the library with their compiler is needed: pip install 'jax[tpu]'"


def make_topology(name: str) -> tuple[Chip, Sequence[jax.Device]]:
    """The chip and the devices of a topology such as v5e:4x4 or v5p:2x2x1.

    The devices compile but do not run. A single chip is v5e:1x1 or v5p:1x1x1 (a Colab TPU is v5e:1x1 or
    v6e:1x1); its programs may use a mesh of one device. A v7x chip is two devices.

    Raises:
        ValueError: one line, for an unknown kind or shape, or where libtpu is missing.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        examples = ", ".join(f"{chip.kind}:{_EXAMPLES[chip.dims][-1]}" for chip in CHIPS.values())
        raise ValueError(
            f"topology {name!r}: unknown kind {kind!r}; one of {', '.join(CHIPS)}, as {examples}"
        )
    chip = CHIPS[kind]
    examples = ", ".join(f"{kind}:{x}" for x in _EXAMPLES[chip.dims])
    if not re.fullmatch("x".join([r"[1-9]\d*"] * chip.dims), shape):
        raise ValueError(
            f"topology {name!r}: a {kind} slice has a shape of {chip.dims} sizes; for example {examples}"
        )
    options: dict[str, object] = {"chip_config_name": "megacore"} if chip.megacore else {}
    if all(size == "1" for size in shape.split("x")):
        # Hosts have four chips or eight unless the slice says otherwise.
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        made = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip.topology_kind}:{shape}", **options
        )
    except Exception as error:  # of whatever type jax and libtpu raise
        reason = " ".join(str(error).split())
        if not importlib.util.find_spec("libtpu"):
            raise ValueError(f"topology {name!r}: {_INSTALL}") from error
        raise ValueError(
            f"topology {name!r}: libtpu refuses it ({reason}); for example {examples}"
        ) from error
    return chip, made.devices
