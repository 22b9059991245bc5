"""Says whether compile time grows with depth.

    python benchmarks/compile_time.py [qwen2|gemma3 ...]

Lowers and compiles, from abstract shapes and without caches, the update (forward, backward and Adam) of a
4-layer and a 28-layer decoder of one width, and the sampling engine's decode chunk. Each of 3 rounds takes
both depths in turn; the table holds medians, in CPU seconds of the process (all its threads), which other
work on the machine changes less than the clock. Pass: the update's ratio of 28 layers to 4 is at most 1.5.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kdrl_jax.config import Config, MeshConfig
from kdrl_jax.models.decoder import Model, make_model
from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.models.rope import Rope
from kdrl_jax.optim import make_optimizer
from kdrl_jax.rollout.decode import Call
from kdrl_jax.rollout.engine import Programs
from kdrl_jax.rollout.sampling import SamplerSettings
from kdrl_jax.rollout.settings import EngineSettings
from kdrl_jax.scoring import HeadSettings
from kdrl_jax.setup import abstract_params
from kdrl_jax.sharding import make_mesh
from kdrl_jax.step import Objective, make_update
from kdrl_jax.types import FrozenScores, TrainBatch, TrainState

DEPTHS, ROUNDS = (4, 28), 3
ROWS, LENGTH, NEW = 8, 512, 256
BASE = DecoderConfig(8192, 512, 1408, 4, 8, 2, 64)


def decoder_config(family: str, num_layers: int) -> DecoderConfig:
    """A decoder with the features of a family; the layers differ as gemma3's do, five of six sliding."""
    features: dict[str, Any] = {"qkv_bias": True, "rope": Rope(1e6)}
    if family == "gemma3":
        features = {
            "qk_norm": True,
            "post_norms": True,
            "norm_adds_one": True,
            "scale_embeddings": True,
            "activation": "gelu_tanh",
            "tie_embeddings": True,
            "sliding_window": 128,
            "sliding_layers": tuple((i + 1) % 6 > 0 for i in range(num_layers)),
            "rope": Rope(1e6),
            "sliding_rope": Rope(1e4),
        }
    fields = {f: getattr(BASE, f) for f in BASE.__dataclass_fields__}
    return DecoderConfig(**(fields | {"num_layers": num_layers} | features))


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def lower_update(model: Model, mesh: Mesh) -> Any:
    """The update of training, as `train` compiles it."""
    config = Config.model_validate(
        {
            "name": "compile_time",
            "student": {"path": "none"},
            "teacher": {"path": "none"},
            "data": {"train": [{"kind": "task", "task": "chain_sum"}]},
            "rollout": {"group_size": ROWS, "max_new_tokens": NEW},
            "optimizer": {"learning_rate": 1e-5},
            "kd": {"coef": 0.01},
            "train": {"num_steps": 1, "prompts_per_iteration": 1, "remat": True},
        }
    )
    head = HeadSettings(num_tokens=model.config.vocab_size, chunk=1024, max_new_tokens=NEW)
    optimizer = make_optimizer(config.optimizer, model.dims)
    params = abstract_params(model, mesh, jnp.float32)
    count = array(dtype=jnp.int32)
    state = TrainState(count, params, jax.eval_shape(optimizer.init, params), count, count)
    tokens, mask = array(ROWS, LENGTH, dtype=jnp.int32), array(ROWS, LENGTH, dtype=bool)
    floats, row_ints = array(ROWS, LENGTH), array(ROWS, dtype=jnp.int32)
    batch = TrainBatch(
        tokens_BT=tokens,
        starts_B=row_ints,
        segment_ids_BT=None,
        temperature_B=array(ROWS),
        completion_mask_BT=mask,
        rl_rows_B=array(ROWS, dtype=bool),
        rl_mask_BT=mask,
        kd_mask_BT=mask,
        kd_scale_BT=None,
        advantages_B=array(ROWS),
        correct_B=array(ROWS, dtype=bool),
        sampler_logprobs_BT=floats,
        old_logprobs_BT=None,
        frozen=FrozenScores(teacher_logprobs_BT=floats),
    )
    update = jax.jit(make_update(Objective(config, model, head), optimizer), donate_argnums=0)
    with jax.set_mesh(mesh):
        return update.lower(state, {}, batch, ())


def lower_decode(model: Model, mesh: Mesh) -> Any:
    """The sampling engine's decode chunk."""
    settings = EngineSettings(
        num_prompts=2,
        group_size=ROWS // 2,
        max_prompt_tokens=LENGTH - NEW,
        max_new_tokens=NEW,
        num_tokens=model.config.vocab_size,
        end_ids=(0,),
        pad_id=0,
        decode_chunk=64,
        sampler=SamplerSettings(),
    )
    programs = Programs(model, settings, mesh, ROWS)
    params = abstract_params(model, mesh, jnp.float32)
    prompts = array(2, LENGTH - NEW, dtype=jnp.int32), array(2, dtype=jnp.int32), array(2, dtype=jnp.int32)
    call = Call(jax.random.key(0), array(), array(dtype=jnp.int32))
    with jax.set_mesh(mesh):
        carry = jax.eval_shape(programs.start, params, *prompts)
        return programs.chunk.lower(params, carry, call)


def cpu_seconds(fn: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    value = fn()
    return time.process_time() - start, value


def main() -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    programs = {"update": lower_update, "decode chunk": lower_decode}
    titles = [
        "program",
        "family",
        *(f"{what} {n} layers, CPU s" for n in DEPTHS for what in ("lower", "compile")),
    ]
    print("| " + " | ".join([*titles, "ratio", "", ""]) + " |\n" + "| --- " * (len(titles) + 2) + "|")
    holds = True
    for family in sys.argv[1:] or ("qwen2", "gemma3"):
        for program, lower in programs.items():
            times: dict[int, list[tuple[float, float]]] = {n: [] for n in DEPTHS}
            for turn in range(ROUNDS):
                for depth in DEPTHS if turn % 2 == 0 else reversed(DEPTHS):
                    jax.clear_caches()
                    model = make_model(decoder_config(family, depth))
                    lowering, lowered = cpu_seconds(functools.partial(lower, model, mesh))
                    times[depth].append((lowering, cpu_seconds(lowered.compile)[0]))
            medians = {n: [statistics.median(x) for x in zip(*t, strict=True)] for n, t in times.items()}
            ratio = sum(medians[DEPTHS[1]]) / sum(medians[DEPTHS[0]])
            verdict = "" if program != "update" else "pass" if ratio <= 1.5 else "FAIL"
            holds &= verdict != "FAIL"
            cells = [
                program,
                family,
                *(f"{x:.2f}" for n in DEPTHS for x in medians[n]),
                f"{ratio:.2f}",
                verdict,
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
