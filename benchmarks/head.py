"""Says what the vocabulary head costs on a TPU: memory and work, compiled for one v5p chip.

    pip install 'libtpu==0.0.42.*'        # what jax 0.10.2 asks for as jax[tpu]
    python benchmarks/head.py [CHUNK ...]
    python benchmarks/head.py --cpu       # instead: time of the two ways on this machine

Needs no TPU: the compiler runs on any host. 16,384 tokens (4 rows) of a student (bfloat16 over a float32
head) and a teacher of width 3,584 meet 151,936 columns under KDRL's loss: policy term, exact reverse KL,
and the entropy and the agreement with the teacher as metrics. `fused` is `head_loss`, `recomputing` is
`score_predictors` with the same loss, `plain` computes all logits at once, for a quarter of the tokens.

Memory is what the program takes beside its arguments and the float32 gradient of the head (the gradient
of the states, which goes on to the decoder, is counted). Work is the products' (2 operations per
multiplication and addition, a loop's body as often as it runs) over that of the plain computation of as
many tokens. Time is the compiler's own estimate. Pass, at the default chunk: at most 1.6 GiB, and 1.1
(fused) and 1.7 (recomputing) times the work.
"""

import functools
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

# Before jax starts: the TPU is described, not there.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from kdrl_jax.config.schema import TrainConfig
from kdrl_jax.models.head import Head, head_logits
from kdrl_jax.objective.divergence import Divergence
from kdrl_jax.scoring import HeadSettings, TeacherSide, TokenScores, head_loss, score_predictors

ROWS, TOKENS, COLUMNS, NUM_TOKENS, TEACHER_DIM = 4, 4096, 151_936, 151_665, 3584
MODELS = ((1536, True), (1536, False), (3584, False))
"""Width of the student, and whether its head is tied to the embedding."""
DEFAULT_CHUNK: int = TrainConfig.model_fields["head_chunk"].default
CLOCK_HZ = 1.75e9
"""Of a v5p: the compiler estimates cycles."""
MAX_GIB = 1.6
MAX_WORK = {"fused": 1.1, "recomputing": 1.7}
DIVERGENCE = Divergence("reverse_kl")


def token_loss(scores: TokenScores, inputs: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """KDRL's loss of some tokens and the sums for its metrics."""
    assert scores.divergence is not None
    assert scores.reverse_kl is not None
    ratio = jnp.exp(scores.logprobs - inputs["old"])
    a = inputs["advantage"][:, None]
    policy = -jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.2) * a)
    loss = jnp.sum(inputs["weights"] * (policy + 1e-2 * scores.divergence))
    fields = ("entropy", "reverse_kl", "same_top", "teacher_mass")
    return loss, {name: jnp.sum(inputs["weights"] * getattr(scores, name)) for name in fields}


def fused(
    settings: HeadSettings, states: Any, head: Head, targets: Any, t: Any, inputs: Any, side: Any
) -> Any:
    return head_loss(states, head, targets, t, inputs, token_loss, settings, side, DIVERGENCE)


def recomputing(
    settings: HeadSettings, states: Any, head: Head, targets: Any, t: Any, inputs: Any, side: Any
) -> Any:
    return token_loss(score_predictors(states, head, targets, t, settings, side, DIVERGENCE), inputs)


def plain(
    settings: HeadSettings, states: Any, head: Head, targets: Any, t: Any, inputs: Any, side: Any
) -> Any:
    logits = functools.partial(head_logits, num_tokens=settings.num_tokens, temperature=t)
    logp = jax.nn.log_softmax(logits(states, head))
    teacher = jax.nn.log_softmax(logits(side.states[0], side.heads[0]))
    p, top = jnp.exp(logp), logp.argmax(-1)
    kl = jnp.sum(p * (logp - teacher), -1)
    scores = TokenScores(
        jnp.take_along_axis(logp, targets[..., None], -1)[..., 0],
        -jnp.sum(p * logp, -1),
        kl,
        kl,
        top == teacher.argmax(-1),
        jnp.take_along_axis(jnp.exp(teacher), top[..., None], -1)[..., 0],
    )
    return token_loss(scores, inputs)


WAYS: dict[str, Callable[..., Any]] = {"fused": fused, "recomputing": recomputing, "plain": plain}


def operands(dim: int, tied: bool, rows: int, tokens: int, columns: int, teacher_dim: int) -> tuple[Any, ...]:
    """Shapes and types of what the head is given, student in bfloat16 over a float32 kernel."""

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    bf16 = jnp.bfloat16
    head = Head(array(*((columns, dim) if tied else (dim, columns))), None, tied=tied, softcap=None)
    theirs = Head(array(teacher_dim, columns, dtype=bf16), None, tied=False, softcap=None)
    side = TeacherSide((array(rows, tokens, teacher_dim, dtype=bf16),), (theirs,))
    inputs = {"old": array(rows, tokens), "weights": array(rows, tokens), "advantage": array(rows)}
    targets = array(rows, tokens, dtype=jnp.int32)
    return array(rows, tokens, dim, dtype=bf16), head, targets, array(rows), inputs, side


def gradient(way: str, settings: HeadSettings) -> Callable[..., Any]:
    """Loss, metrics, and gradients in states and kernel."""
    return jax.jit(jax.value_and_grad(functools.partial(WAYS[way], settings), argnums=(0, 1), has_aux=True))


def costs(hlo: str) -> tuple[int, int]:
    """(operations of all products, estimated cycles) of a compiled program: loop bodies as often as they run.

    A product is a `dot`, or a `convolution` whose window is summed over with its input features. The trip
    count is the constant in the loop's condition.
    """
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = start[2]
            entry = name if start[1] else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)

    def shape(text: str) -> list[int]:
        return [int(x) for x in re.search(r"\[([\d,]*)\]", text)[1].split(",") if x]  # type: ignore[index]

    @functools.cache
    def of(computation: str) -> tuple[int, int]:
        operations = cycles = 0
        shapes = {
            m[1]: shape(m[2])
            for line in bodies[computation]
            if (m := re.match(r" *(?:ROOT )?%([\w.\-]+) = (\w+\[[\d,]*\])", line))
        }
        for line in bodies[computation]:
            if found := re.search(r" (convolution|dot)\(%([\w.\-]+), %([\w.\-]+)\)", line):
                right = shapes[found[3]]
                if found[1] == "dot":
                    dims = re.search(r"rhs_contracting_dims=\{([\d,]*)\}", line)
                    summed = math.prod(right[int(i)] for i in dims[1].split(","))  # type: ignore[index]
                else:
                    labels = re.search(r"dim_labels=\w+_(\w+)->", line)[1]  # type: ignore[index]
                    window = re.search(r"window=\{size=([\dx]+)", line)
                    summed = right[labels.index("i")]
                    summed *= math.prod(map(int, window[1].split("x"))) if window else 1
                operations += 2 * math.prod(shape(line.split("=", 1)[1])) * summed
            if estimate := re.search(r'"estimated_cycles":"(\d+)"', line):
                cycles += int(estimate[1])
            trips = 1
            if " while(" in line:
                condition = re.search(r"condition=%([\w.\-]+)", line)[1]  # type: ignore[index]
                (bound,) = re.findall(r"s32\[\][^ ]* constant\((\d+)\)", "\n".join(bodies[condition]))
                trips = int(bound)
            for called in re.findall(r"(?:calls|body|to_apply)=%([\w.\-]+)", line):
                inner = of(called)
                operations, cycles = operations + trips * inner[0], cycles + trips * inner[1]
        return operations, cycles

    return of(entry)


def compiled_costs(way: str, dim: int, tied: bool, chunk: int, tokens: int) -> tuple[float, int, float]:
    """(GiB beside arguments and the kernel's gradient, operations, estimated milliseconds)."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1")
    chip = SingleDeviceSharding(topology.devices[0])
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip),
        operands(dim, tied, ROWS, tokens, COLUMNS, TEACHER_DIM),
    )
    compiled = gradient(way, HeadSettings(NUM_TOKENS, chunk)).lower(*args).compile()
    memory = compiled.memory_analysis()
    taken = memory.temp_size_in_bytes + memory.output_size_in_bytes - 4 * COLUMNS * dim
    operations, cycles = costs(compiled.as_text())
    return taken / 2**30, operations, 1e3 * cycles / CLOCK_HZ


def on_tpu(chunks: list[int]) -> bool:
    """Prints the table; says whether the default chunk passes."""
    jax.config.update("jax_enable_compilation_cache", False)
    print("| student | way | chunk | memory, GiB | work / plain | time, ms | |\n" + "| --- " * 7 + "|")
    holds = True
    for dim, tied in MODELS:
        student = f"{dim}, {'tied' if tied else 'untied'}"
        share = 4  # of the tokens is enough to know the work of all
        gib, once, ms = compiled_costs("plain", dim, tied, 0, TOKENS // share)
        some = f"plain, {ROWS * TOKENS // share} tokens"
        print(f"| {student} | {some} | | {gib:.2f} | | {ms:.0f} | |", flush=True)
        for way in ("fused", "recomputing"):
            for chunk in chunks:
                gib, operations, ms = compiled_costs(way, dim, tied, chunk, TOKENS)
                ratio = operations / (share * once)
                verdict = ""
                if chunk == DEFAULT_CHUNK:
                    passes = gib <= MAX_GIB and ratio <= MAX_WORK[way]
                    holds &= passes
                    verdict = "pass" if passes else "FAIL"
                cells = [student, way, str(chunk), f"{gib:.2f}", f"{ratio:.3f}", f"{ms:.0f}", verdict]
                print(f"| {' | '.join(cells)} |", flush=True)
    return holds


def on_cpu(rounds: int = 7) -> None:
    """Median time of the two ways and of the plain one, in turns, at a size that this machine can hold."""
    shapes = operands(256, True, 4, 256, 8192, 512)
    keys = iter(jax.random.split(jax.random.key(0), 100))

    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
        if x.dtype == jnp.int32:
            return jax.random.randint(next(keys), x.shape, 0, 8192)
        return jax.random.uniform(next(keys), x.shape, jnp.float32, 0.1, 1.0)

    args = jax.tree.map(fill, shapes)
    settings = HeadSettings(8000, 256)
    programs = {way: gradient(way, settings).lower(*args).compile() for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            times[way].append(time.perf_counter() - start)
    medians = {way: statistics.median(t) for way, t in times.items()}
    print(f"| way | median of {rounds}, ms | over fused |\n| --- | --- | --- |")
    for way, median in medians.items():
        print(f"| {way} | {1e3 * median:.0f} | {median / medians['fused']:.2f} |")


def main() -> None:
    if "--cpu" in sys.argv[1:]:
        on_cpu()
    else:
        sys.exit(0 if on_tpu([int(x) for x in sys.argv[1:]] or [DEFAULT_CHUNK]) else 1)


if __name__ == "__main__":
    main()
