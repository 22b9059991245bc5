"""What each optimizer takes, without a TPU: bytes of its state, and of an update compiled for TPUs.

    python benchmarks/optimizer_memory.py [KIND ...]

Per kind: bytes of moments per parameter, then for each mesh of a v5e:2x4 the GiB of a chip for parameters,
gradients and moments, the GiB of temporaries, and the collectives of the update (computing the gradient is no
part of it). Needs libtpu (`pip install 'jax[tpu]'`) and no TPU. The model is Qwen2.5-1.5B, in float32.
"""

import collections
import os
import re
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from kdrl_jax import sharding
from kdrl_jax.config import MeshConfig, OptimizerConfig
from kdrl_jax.models.decoder import DecoderConfig, make_model
from kdrl_jax.optim import make_optimizer, opt_state_shardings
from kdrl_jax.setup.parameters import abstract_params
from kdrl_jax.types import Params

MODEL = make_model(DecoderConfig(151_936, 1536, 8960, 28, 12, 2, 128, qkv_bias=True, tie_embeddings=True))
KINDS = ("adamw", "adamw_bf16", "adafactor", "muon")
MESHES = ((8, 1), (4, 2))
COLLECTIVES = r" (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("


def num_bytes(tree: Params) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compiled_update(kind: str, mesh: Mesh) -> jax.stages.Compiled:
    """The optimizer's part of an update, its arguments donated as in training."""
    params = abstract_params(MODEL, mesh, jnp.float32)
    optimizer = make_optimizer(OptimizerConfig(kind=kind), MODEL.dims)
    shardings = opt_state_shardings(optimizer, params, MODEL.dims, sharding.replicated(mesh))
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(optimizer.init, params),
        shardings,
    )

    def update(grads: Params, state: Params, params: Params) -> tuple[Params, Params]:
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda p, u: p - 1e-6 * u, params, updates), state

    places = (jax.tree.map(lambda x: x.sharding, params), shardings)
    with jax.set_mesh(mesh):
        return (
            jax.jit(update, donate_argnums=(1, 2), out_shardings=places)
            .lower(params, state, params)
            .compile()
        )


def main() -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    abstract = MODEL.abstract()
    for kind in sys.argv[1:] or KINDS:
        state = jax.eval_shape(make_optimizer(OptimizerConfig(kind=kind), MODEL.dims).init, abstract)
        print(f"{kind}: {4 * num_bytes(state) / num_bytes(abstract):.2f} bytes of moments per parameter")
        for fsdp, tensor in MESHES:
            compiled = compiled_update(
                kind, sharding.make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor), devices)
            )
            memory = compiled.memory_analysis()
            held, extra = (n / 2**30 for n in (memory.argument_size_in_bytes, memory.temp_size_in_bytes))
            counts = collections.Counter(re.findall(COLLECTIVES, compiled.as_text()))
            print(f"  fsdp={fsdp} tensor={tensor}: {held:.2f} + {extra:.2f} GiB, {dict(counts)}", flush=True)


if __name__ == "__main__":
    main()
