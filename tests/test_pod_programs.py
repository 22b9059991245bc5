"""The programs of a pod, compiled for one that is not here, and read: what lies where, and what moves."""

import math

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from plan_programs import TPU
from test_plan import _no_cache  # noqa: F401  (a fixture)

from kdrl_jax.config import load_config
from kdrl_jax.plan import hlo
from kdrl_jax.plan.chips import CHIPS
from kdrl_jax.plan.collectives import transfers
from kdrl_jax.plan.fit import mean_lengths
from kdrl_jax.plan.programs import ROLLOUT, UPDATE, RunPrograms, bytes_on_chip
from kdrl_jax.plan.shapes import Ids, model_shapes
from kdrl_jax.plan.topology import make_topology
from kdrl_jax.plan.work import Reader
from kdrl_jax.setup import check_mesh
from kdrl_jax.setup.run import abstract_setup

pytestmark = [TPU, pytest.mark.slow, pytest.mark.usefixtures("_no_cache")]

LAYERS = 8
PAPER = [
    # The published widths; fewer layers, which are scanned and change no program but their count.
    f"student.keep_layers=[0-{LAYERS - 1}]",
    f"teacher.keep_layers=[0-{LAYERS - 1}]",
    "train.diagnostics_every=0",
]
PODS = {
    "v5e:4x4": ("mesh.fsdp=16",),
    "v5p:4x4x4": ("mesh.data=4", "mesh.fsdp=16"),
    "v5e:4x4 with tensor": ("mesh.fsdp=8", "mesh.tensor=2"),
}


class Pod:
    """A run's programs on the devices of a slice."""

    def __init__(self, topology, overrides, devices=None):
        chip, found = make_topology(topology)
        config = load_config("configs/paper/kdrl_anneal.yaml", [*PAPER, *overrides])
        shapes = model_shapes(config)
        self.mesh = check_mesh(config, found if devices is None else devices)
        setup = abstract_setup(config, self.mesh, shapes.of_role, Ids(shapes.num_tokens))
        self.run = RunPrograms(setup, CHIPS[chip.kind].memory * 0.9, mean_lengths(config))
        self._lowered = {p.name: p.lowered for p in self.run.lower([ROLLOUT, UPDATE])}
        self._compiled = {}

    def compiled(self, name):
        if name not in self._compiled:
            self._compiled[name] = self._lowered[name].compile()
        return self._compiled[name]

    def transfers(self, name):
        """(computation, transfer) of all collectives of a program."""
        module = hlo.parse(self.compiled(name).as_text())
        reader = Reader(module)
        return module, [
            (computation.name, transfer)
            for computation in module.computations.values()
            for instruction in computation
            for transfer in transfers(reader, computation, instruction)
            if not is_fused(module, computation)
        ]


def is_fused(module, computation):
    """Whether `transfers` finds its instructions through the fusion that holds it."""
    return any(
        instruction.opcode in ("fusion", "async-start") and instruction.called == computation.name
        for other in module.computations.values()
        for instruction in other
    )


def reachable(module, start):
    """Names of the computations that run when `start` does."""
    seen, left = set(), [start]
    while left:
        name = left.pop()
        if name in seen or name not in module.computations:
            continue
        seen.add(name)
        for x in module.computations[name]:
            left += [x.called, *x.branches, x.attribute("body"), x.attribute("condition")]
        left = [y.lstrip("%") for y in left if y]
    return seen


def whole_bytes(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module", params=PODS)
def pod(request):
    return Pod(request.param.split()[0], PODS[request.param])


def test_moments_are_not_replicated(pod):
    """Neither what the update is given nor what it leaves."""
    parts = pod.mesh.shape["fsdp"] * pod.mesh.shape["tensor"]
    state = pod.run.state
    (given, *_), _ = pod.compiled("update").input_shardings
    left, _ = pod.compiled("update").output_shardings
    for shardings in (given, left):
        for tree, places in ((state.opt_state, shardings.opt_state), (state.params, shardings.params)):
            on_chip = sum(
                math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize
                for x, place in zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
            )
            # Vectors of norms and biases are a thousandth.
            assert on_chip < 1.01 * whole_bytes(tree) / parts


def test_the_update_gathers_a_layer_at_a_time(pod):
    """No computation gathers as much as the model: in each loop over layers it is one layer, outside of them
    embedding and head."""
    params = pod.run.state.params
    layer = whole_bytes(params["layers"]) / LAYERS
    outside = {name: whole_bytes(x) for name, x in params.items() if name != "layers"}
    _, found = pod.transfers("update")
    gathered = {}
    for computation, transfer in found:
        if transfer.kind == "all-gather":
            gathered.setdefault(computation, []).append(transfer.bytes)
    assert gathered, "parameters lie over fsdp, and are gathered"
    largest = max(*outside.values(), layer)
    for computation, sizes in gathered.items():
        assert max(sizes) <= largest * 1.01, computation
        assert sum(sizes) <= 1.01 * (sum(outside.values()) + layer), computation
    # A stack of layers is never gathered: with 28 of them, that would be nine tenths of the model.
    in_layers = [sizes for sizes in gathered.values() if sum(sizes) <= 1.01 * layer]
    assert in_layers
    assert sum(outside.values()) + layer < 0.8 * whole_bytes(params)


def test_sampling_gathers_no_parameters(pod):
    """Each device of `data` and `fsdp` steps on its own; with `tensor`, activations of its slots meet."""
    module, found = pod.transfers("decode")
    loops = [x for c in module.computations.values() for x in c if x.opcode == "while"]
    decode = [x for x in loops if x.op_name.endswith("decode_steps/while")]
    assert len(decode) == 1
    body = reachable(module, decode[0].attribute("body").lstrip("%"))
    inside = [transfer for name, transfer in found if name in body]
    if pod.mesh.shape["tensor"] == 1:
        assert inside == []
    config = pod.run.sampled.config
    activations = pod.run.slots * max(config.vocab_size, config.mlp_dim) * 4
    smallest = config.embed_dim * config.num_kv_heads * config.head_dim * 2
    for transfer in inside:
        assert transfer.bytes <= activations
    assert sum(t.bytes for t in inside if t.kind == "all-gather") <= max(activations, smallest)


def test_parameters_are_laid_out_for_sampling_by_a_program_of_its_own(pod):
    """What it moves is the model once, rounded to the type that is multiplied."""
    _, found = pod.transfers("relay")
    # A norm of a few kilobytes may be summed with zeros instead.
    found = [x for x in found if x[1].bytes > 1e5]
    assert {transfer.kind for _, transfer in found} == {"all-gather"}
    moved = sum(transfer.bytes for _, transfer in found)
    bfloat16 = whole_bytes(pod.run.weights) / pod.mesh.shape["tensor"]
    assert 0.95 * bfloat16 <= moved <= 1.05 * bfloat16
    assert bytes_on_chip(pod.run.weights) <= 1.01 * bfloat16


def test_between_slices_lies_data_alone():
    """Two slices of v5e:4x4: all that crosses is what gradients and sums come to."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4", num_slices=2).devices
    pod = Pod("v5e:4x4", ("mesh.data=2", "mesh.fsdp=16"), devices)
    slices = np.vectorize(lambda d: d.slice_index)(pod.mesh.devices)
    assert (slices[0] == 0).all()
    assert (slices[1] == 1).all()
    module, _ = pod.transfers("update")
    sent = sum(
        shape.bytes
        for computation in module.computations.values()
        for x in computation
        if x.opcode == "send"
        for shape in x.shapes
        if shape.dtype != "u32"
    )
    params = bytes_on_chip(pod.run.state.params)
    assert 0 < sent <= 2.2 * params
    config = load_config("configs/paper/kdrl_anneal.yaml", [*PAPER, "mesh.data=1"])
    with pytest.raises(ValueError, match=r"mesh\.data=1 on 2 slices: .* make it 2, or a multiple"):
        check_mesh(config, devices)
