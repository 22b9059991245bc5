"""What compiled programs compute and move, against counts made by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from plan_programs import CHIP, PLACES, TPU, compiled, cost_of, roofline_seconds

from kdrl_jax.models.decoder import make_model
from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.models.head import head_logits
from kdrl_jax.plan import hlo, model_flops
from kdrl_jax.plan.chips import CHIPS
from kdrl_jax.plan.collectives import KINDS
from kdrl_jax.plan.cost import analyse
from kdrl_jax.plan.topology import make_topology
from kdrl_jax.plan.walk import KERNEL_SHARE, OTHER, Given, KernelWork

# The cache that tests share keeps no programs for topologies, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
MESHES = ["cpu", pytest.param("v5e:2x4", marks=TPU)]
f32, bf16 = jnp.float32, jnp.bfloat16


def make_mesh(place):
    devices = jax.devices() if place == "cpu" else make_topology(place)[1]
    return Mesh(np.array(devices), "x", axis_types=(AxisType.Auto,))


# Operations


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("equation", "left", "right", "operations"),
    [
        ("ij,jk->ik", (64, 96), (96, 160), 2 * 64 * 96 * 160),
        ("bij,bjk->bik", (6, 64, 96), (6, 96, 160), 2 * 6 * 64 * 96 * 160),
        ("btkgh,bskh->bkgts", (3, 48, 2, 3, 64), (3, 80, 2, 64), 2 * 3 * 2 * 3 * 48 * 80 * 64),
        ("bkgts,bskh->btkgh", (3, 2, 3, 48, 80), (3, 80, 2, 64), 2 * 3 * 2 * 3 * 48 * 80 * 64),
        ("i,ij->j", (96,), (96, 160), 2 * 96 * 160),
        ("bnd,dnh->bnh", (16, 5, 40), (40, 5, 24), 2 * 16 * 5 * 40 * 24),
    ],
)
def test_operations_of_products(equation, left, right, operations, place):
    # Summed in float32 out of bfloat16 each is one product; a vector may become a sum, which is none.
    cost = cost_of(functools.partial(jnp.einsum, equation), (left, f32), (right, f32), place=place)
    assert cost.flops in ((operations, 0) if equation.startswith("i,") else (operations,))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [(0, 0), (2, 1), (-1, 5)])
@pytest.mark.parametrize("dilations", [(1, 1), (3, 1), (1, 2), (2, 3)])
def test_operations_of_convolutions_leave_out_padding(stride, padding, dilations):
    def f(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride,),
            (padding,),
            lhs_dilation=dilations[:1],
            rhs_dilation=dilations[1:],
            dimension_numbers=("NWC", "WIO", "NWC"),
        )

    # Of ones, each product adds one.
    meetings = f(jnp.ones((1, 24, 1)), jnp.ones((5, 1, 1))).sum()
    cost = cost_of(f, ((4, 24, 8), f32), ((5, 8, 16), f32))
    assert cost.flops == 2 * 4 * 8 * 16 * meetings


DECODER = DecoderConfig(1024, 128, 384, 5, 4, 2, 128, qkv_bias=True)
ROWS, TOKENS, HEAD_TOKENS = 2, 128, 64


@functools.cache
def decoder_text(place, grad, remat):
    model = make_model(DECODER, bf16)

    def loss(params, tokens):
        module = model.bind(params)
        with jax.named_scope("layers"):
            states = module.hidden(tokens, remat=remat)
        with jax.named_scope("head"):
            logits = head_logits(
                states[:, -HEAD_TOKENS:], module.output_head(), num_tokens=1024, temperature=1.0
            )
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

    f = jax.value_and_grad(loss) if grad else loss
    return compiled(f, model.abstract(), ((ROWS, TOKENS), jnp.int32), place=place).as_text()


@functools.cache
def decoder_cost(place, grad, remat):
    return analyse(decoder_text(place, grad, remat), CHIP, scopes=("layers", "head"))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("grad", "remat"), [(False, "none"), (True, "none"), (True, "full")])
def test_operations_of_a_decoder(place, grad, remat):
    tokens = ROWS * TOKENS
    # The plain attention multiplies with all keys and masks those that are not seen.
    seen = model_flops.KeysSeen(TOKENS, TOKENS)
    count = model_flops.training_flops if grad else model_flops.forward_flops
    expected = count(DECODER, tokens, ROWS * HEAD_TOKENS, seen)
    if remat == "full":
        # Layers again, but not the last product of each, whose result no gradient needs.
        last = 2 * DECODER.embed_dim * DECODER.mlp_dim * DECODER.num_layers
        expected += model_flops.forward_flops(DECODER, tokens, 0, seen) - tokens * last
    assert decoder_cost(place, grad, remat).flops == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("place", PLACES)
def test_seconds_are_told_apart(place):
    cost = decoder_cost(place, True, "full")
    assert cost.seconds >= roofline_seconds(decoder_text(place, True, "full")) > 0
    assert sum(cost.seconds_by_scope.values()) == pytest.approx(cost.seconds)
    assert sum(cost.seconds_by_kind.values()) == pytest.approx(cost.seconds)
    assert cost.seconds_by_scope["layers"] > cost.seconds_by_scope["head"] > 0
    assert set(cost.seconds_by_scope) <= {"layers", "head", OTHER}


# Memory


@pytest.mark.parametrize(("place", "most"), [("cpu", 4), pytest.param("v5e:1x1", 1.3, marks=TPU)])
def test_a_scanned_stack_is_read_once(place, most):
    layers, width = 32, 512

    def f(stack, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    stack = layers * width * width * 4
    cost = cost_of(f, ((layers, width, width), f32), ((8, width), f32), place=place)
    assert stack <= cost.bytes < most * stack


@pytest.mark.parametrize(("place", "most"), [("cpu", 4), pytest.param("v5e:1x1", 2, marks=TPU)])
@pytest.mark.parametrize("how", ["slice", "scatter"])
def test_an_update_in_place_writes_what_it_changes(place, most, how):
    rows, positions, width = 16, 4096, 128

    def f(cache, x):
        def body(at, cache):
            if how == "slice":
                return jax.lax.dynamic_update_slice(cache, x[:, None] + at, (0, at, 0))
            where = (jnp.arange(rows), jnp.full((rows,), at))
            return cache.at[where].set(x + at, unique_indices=True, mode="promise_in_bounds")

        return jax.lax.fori_loop(0, 64, body, cache)

    # A column of a row fills eight, the rows of a tile, in the layout of TPUs.
    written = 64 * rows * 8 * width * 4
    cost = cost_of(f, ((rows, positions, width), f32), ((rows, width), f32), place=place, donate_argnums=0)
    whole = rows * positions * width * 4
    assert cost.bytes < (most * written if place != "cpu" else whole * 3)


@TPU
def test_parameters_are_as_large_as_the_compiler_says():
    shapes = [((3, 5), f32), ((9, 200), bf16), ((28, 12, 64), bf16), ((1000,), jnp.int8), ((), f32)]
    program = compiled(lambda *x: [a + a for a in x], *shapes, place="v5e:1x1")
    entry = hlo.parse(program.as_text()).entry
    total = sum(s.bytes for p in entry.parameters.values() for s in p.shapes)
    # Each argument begins at a multiple of 512 bytes.
    assert total <= program.memory_analysis().argument_size_in_bytes <= total + 512 * len(shapes)


@TPU
def test_a_copied_array_is_read_and_written_once():
    size = 64 * 2**20
    cost = cost_of(lambda x: x + 1, ((size // 4096, 1024), f32), place="v5e:1x1")
    assert cost.bytes == 2 * size
    assert cost.seconds == pytest.approx(2 * size / CHIP.bandwidth)
    assert cost.seconds_by_kind == {"memory": cost.seconds}
    transposed = cost_of(lambda x: x.T, ((size // 4096, 1024), f32), place="v5e:1x1")
    assert transposed.bytes == 2 * size


@TPU
def test_large_products_are_near_the_peak():
    n = 8192
    text = compiled(lambda x, y: x @ y, ((n, n), bf16), ((n, n), bf16), place="v5e:1x1").as_text()
    assert roofline_seconds(text) == pytest.approx(2 * n**3 / CHIP.flops)
    assert 1 <= analyse(text, CHIP).seconds / roofline_seconds(text) < 1.2
    eight = compiled(
        functools.partial(jnp.matmul, preferred_element_type=jnp.int32),
        ((n, n), jnp.int8),
        ((n, n), jnp.int8),
        place="v5e:1x1",
    )
    assert roofline_seconds(eight.as_text()) == pytest.approx(2 * n**3 / CHIP.int8_ops, rel=0.05)


# Collectives


@pytest.mark.parametrize("place", MESHES)
@pytest.mark.parametrize(
    ("kind", "operation", "size"),
    [
        ("all-gather", lambda x: jax.lax.all_gather(x, "x", tiled=True), 8 * 64 * 256 * 4),
        ("all-reduce", lambda x: jax.lax.psum(x, "x"), 64 * 256 * 4),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "x", tiled=True), 64 * 256 * 4),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "x", 0, 0, tiled=True), 64 * 256 * 4),
        (
            "collective-permute",
            lambda x: jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]),
            64 * 256 * 4,
        ),
    ],
)
def test_kinds_and_bytes_of_collectives(place, kind, operation, size):
    mesh = make_mesh(place)
    spec = PartitionSpec("x")

    def f(x):
        def body(x, _):
            return jnp.tanh(operation(jnp.sin(x)))[:64] if kind != "reduce-scatter" else x + jnp.tile(
                operation(jnp.sin(x)), (8, 1)
            ), None

        return jax.lax.scan(body, x, None, length=3)[0]

    on_mesh = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((8 * 64, 256), f32, sharding=NamedSharding(mesh, spec))
    cost = analyse(jax.jit(on_mesh).lower(x).compile().as_text(), CHIP)
    (found,) = cost.collectives
    assert (found.kind, found.count, found.bytes) == (kind, 3, 3 * size)
    assert found.group_size == (2 if kind == "collective-permute" else 8)
    assert 0 < cost.seconds_by_kind["collective"] <= found.seconds


@TPU
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_gathered_layers_are_counted_once(topology):
    """Weights divided over chips, as in training: all are gathered for the pass and again for its gradient,
    and the gradient is divided, however the compiler spreads that over fusions."""
    layers, width, wide = 12, 1024, 4096
    mesh = make_mesh(topology)

    def loss(params, x):
        def body(x, w):
            up, down = (m.astype(bf16) for m in w)
            return x + jnp.tanh(x @ up) @ down, None

        return jnp.sum(jax.lax.scan(jax.checkpoint(body), x, params)[0].astype(f32))

    def put(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    params = (put((layers, width, wide), f32, None, "x"), put((layers, wide, width), f32, None, None, "x"))
    out = (NamedSharding(mesh, PartitionSpec()), tuple(p.sharding for p in params))
    x = put((8192, width), bf16, "x")
    text = jax.jit(jax.value_and_grad(loss), out_shardings=out).lower(params, x).compile().as_text()
    cost = analyse(text, CHIPS[topology.partition(":")[0]])
    weights = 2 * layers * width * wide
    sizes = {kind: sum(c.bytes for c in cost.collectives if c.kind == kind) for kind in KINDS}
    assert sizes["all-gather"] == pytest.approx(2 * weights * 2, rel=0.05)
    # In bfloat16, as the products give it, and a little more where the parts are laid out anew.
    assert sizes["reduce-scatter"] == pytest.approx(weights * 2, rel=0.1)
    # The pass, all of it again but the last product, and two products for each gradient.
    assert cost.flops == pytest.approx((1 + 1 / 2 + 2) * 2 * 2048 * weights, rel=0.01)
    assert cost.uncounted_loops == ()


# Pallas kernels


def kernel_program(estimate):
    def double(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    block = pl.BlockSpec((256, 512), lambda i: (i, 0))

    def f(x):
        call = pl.pallas_call(
            double,
            grid=(8,),
            in_specs=[block],
            out_specs=block,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            cost_estimate=estimate,
            name="doubling",
        )
        return jax.lax.scan(lambda x, _: (call(x), None), x, None, length=3)[0]

    return f


@TPU
def test_work_of_kernels():
    shape = ((2048, 512), f32)
    size = 2048 * 512 * 4
    estimate = pl.CostEstimate(flops=10**12, bytes_accessed=10**6, transcendentals=0)
    told = cost_of(kernel_program(estimate), shape, place="v5e:1x1")
    assert (told.kernel_flops, told.flops, told.notes) == (3e12, 0, ())
    assert told.seconds_by_kind["pallas"] == pytest.approx(3e12 / (KERNEL_SHARE * CHIP.flops))
    given = Given(kernels={"doubling": KernelWork(flops=1e6, bytes=1e9)})
    better = cost_of(kernel_program(estimate), shape, place="v5e:1x1", given=given)
    assert better.kernel_flops == 3e6
    assert better.seconds_by_kind["pallas"] == pytest.approx(3e9 / CHIP.bandwidth)
    silent = cost_of(kernel_program(None), shape, place="v5e:1x1")
    assert silent.kernel_flops == 0
    # What is in the vector memory already is not read from the main memory.
    assert silent.bytes <= 3 * 2 * size
    assert len(silent.notes) == 1
    assert "doubling" in silent.notes[0]
