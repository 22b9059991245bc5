"""Programs for tests of `plan`: compiled on CPU, and for TPUs where libtpu is installed."""

import importlib.util

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from kdrl_jax.plan.chips import CHIPS
from kdrl_jax.plan.cost import analyse
from kdrl_jax.plan.hlo import parse
from kdrl_jax.plan.topology import make_topology
from kdrl_jax.plan.walk import NOTHING, Walk, roofline

CHIP = CHIPS["v5e"]
TPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu to compile with")
PLACES = ["cpu", pytest.param("v5e:1x1", marks=TPU)]


def compiled(f, *arguments, place, **options):
    """The program for one device; arguments are (shape, type), or trees of what has both."""
    sharding = None if place == "cpu" else SingleDeviceSharding(make_topology(place)[1][0])

    def put(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def abstract(x):
        return put(jax.ShapeDtypeStruct(*x)) if isinstance(x, tuple) else jax.tree.map(put, x)

    return jax.jit(f, **options).lower(*map(abstract, arguments)).compile()


def cost_of(f, *arguments, place="cpu", given=NOTHING, scopes=(), **options):
    text = compiled(f, *arguments, place=place, **options).as_text()
    return analyse(text, CHIP, given, scopes)


def roofline_seconds(text):
    """Where products run at peak: no schedule of these instructions is quicker."""
    return Walk(parse(text), CHIP, NOTHING, ()).program(roofline).total
