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
from jax.sharding import Mesh

from kdrl_jax.config import Config, MeshConfig
from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.models.rope import Rope
from kdrl_jax.plan.fit import mean_lengths
from kdrl_jax.plan.programs import ROLLOUT, UPDATE, RunPrograms
from kdrl_jax.plan.shapes import Ids
from kdrl_jax.setup import abstract_setup
from kdrl_jax.sharding import make_mesh

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


def planned(shape: DecoderConfig, mesh: Mesh) -> RunPrograms:
    """The programs of a run, as `train` compiles them."""
    config = Config.model_validate(
        {
            "name": "compile_time",
            "student": {"path": "none"},
            "teacher": {"path": "none"},
            "data": {"train": [{"kind": "task", "task": "chain_sum"}], "max_prompt_tokens": LENGTH - NEW},
            "rollout": {"group_size": ROWS // 2, "max_new_tokens": NEW, "slots_per_device": ROWS},
            "optimizer": {"learning_rate": 1e-5},
            "kd": {"coef": 0.01},
            "train": {"num_steps": 1, "prompts_per_iteration": 2, "remat": "full", "diagnostics_every": 0},
        }
    )
    setup = abstract_setup(config, mesh, {"student": shape, "teacher": shape}, Ids(shape.vocab_size))
    return RunPrograms(setup, 2.0**40, mean_lengths(config))


def lower_update(shape: DecoderConfig, mesh: Mesh) -> Any:
    """The update of training."""
    return next(planned(shape, mesh).lower([UPDATE])).lowered


def lower_decode(shape: DecoderConfig, mesh: Mesh) -> Any:
    """The sampling engine's decode chunk."""
    return next(p for p in planned(shape, mesh).lower([ROLLOUT]) if p.name == "decode").lowered


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
                    shape = decoder_config(family, depth)
                    lowering, lowered = cpu_seconds(functools.partial(lower, shape, mesh))
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
