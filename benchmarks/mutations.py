"""Puts faults into a copy of the code, one at a time, and says which test notices.

    python benchmarks/mutations.py [part of a fault's name ...]

A test that never fails proves nothing. Each row of FAULTS names what goes wrong in practice, where it is put
in, and the tests that must notice. Prints a table; exits with 1 if a fault goes unnoticed or no longer fits
the code.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from evaluation_faults import EVALUATION_FAULTS
from optimizer_faults import OPTIMIZER_FAULTS
from verifier_faults import VERIFIER_FAULTS

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Fault:
    name: str
    file: str
    """Under kdrl_jax/."""
    old: str
    new: str
    tests: str
    """Words for pytest, under tests/."""


STEP, TRAIN, ROLLOUT, SLOTS = "test_step.py", "test_train.py", "test_rollout.py", "test_slots.py"
OBJECTIVE, POLICY, MASKS = "test_objective.py", "test_objective_policy.py", "test_objective_masks.py"
FAULTS = (
    # DESIGN's traps
    Fault(
        "the teacher is in a metric only",
        "step/terms.py",
        "target = _where_counted(weights, target, scores.logprobs)",
        "target = jax.lax.stop_gradient(scores.logprobs)",
        f"{STEP} -k another_teacher",
    ),
    Fault(
        "whitening after KD was added",
        "step/terms.py",
        "            loss, acts = self._policy(scores, x, at, advantages, weights)\n",
        "            white = advantages / jnp.sqrt(jnp.mean(advantages**2))\n"
        "            loss, acts = self._policy(scores, x, at, white, weights)\n",
        f"{STEP} -k doubling",
    ),
    Fault(
        "a group of equal rewards is dropped whole",
        "batch.py",
        "        scales = []",
        "        mask &= (group_advantages(rewards_B, group_size, rl.advantage) != 0)[:, None]\n"
        "        scales = []",
        f"{STEP} -k equal_rewards",
    ),
    Fault(
        "denominators counted per microbatch",
        "step/update.py",
        "return objective.loss(overlay(frozen, params), part, shared)",
        "own = part.inputs.weights.sum()\n"
        "                scaled = jax.tree.map(lambda w: w / own, part.inputs.rl_weights)\n"
        "                inputs = dataclasses.replace(part.inputs, rl_weights=scaled)\n"
        "                part = dataclasses.replace(part, inputs=inputs)\n"
        "                return objective.loss(overlay(frozen, params), part, shared)",
        f"{STEP} -k packing_does",
    ),
    Fault(
        "no shift between states and tokens",
        "scoring/packs.py",
        "from_completion + after - 1)",
        "from_completion + after)",
        f"{ROLLOUT} -k sampler_and_trainer",
    ),
    Fault(
        "padding and prompts count",
        "step/terms.py",
        "mask, longest = batch.completion_mask_BT, c.rollout.max_new_tokens",
        "mask, longest = jnp.ones_like(batch.completion_mask_BT), c.rollout.max_new_tokens",
        f"{STEP} -k parts_are",
    ),
    Fault(
        "packed sequences see each other",
        "scoring/packs.py",
        "layout = Layout(spread(column), spread(from_prompt, position))",
        "layout = Layout(spread(column), spread(0 * from_prompt, position))",
        f"{STEP} -k packing_does",
    ),
    Fault(
        "scored at another temperature than sampled",
        "train.py",
        "                temperature,\n                old_logprobs,",
        "                1.0,\n                old_logprobs,",
        f"{TRAIN} -k mean_ratio",
    ),
    Fault(
        "padded columns of the vocabulary take part",
        "models/head.py",
        "    if num_tokens < logits.shape[-1]:",
        "    if False:",
        f"{STEP} -k padded_columns",
    ),
    Fault(
        "different end tokens go unnoticed",
        "pairing.py",
        "if same_end and (found := _end_problem(*pair)):",
        "if False and (found := _end_problem(*pair)):",
        "test_pairing.py -k end",
    ),
    Fault(
        "the end token is distilled though it is left out",
        "objective/masks.py",
        "    if not end_token:",
        "    if False:",
        f"{MASKS} -k final_end_token",
    ),
    Fault(
        "trained ids are not the sampled ones",
        "scoring/packer.py",
        "                rollouts.tokens_BT,\n",
        "                rollouts.tokens_BT + 1,\n",
        f"{TRAIN} -k trained_ids",
    ),
    Fault(
        "rounding noise of equal rewards is an advantage",
        "objective/advantages.py",
        "return spread > 1e-6 * jnp.maximum",
        "return spread > 0 * jnp.maximum",
        f"{POLICY} -k rounding_noise",
    ),
    Fault(
        "an update that is not finite is applied",
        "step/update.py",
        "lambda new, old: jnp.where(taken, new, old)",
        "lambda new, old: new",
        f"{STEP} -k not_finite",
    ),
    Fault(
        "keys by row instead of identity",
        "rollout/decode.py",
        "keys = row_keys(call.key, carry.draws_P[prompt], row % settings.group_size)",
        "keys = row_keys(call.key, row, row % settings.group_size)",
        f"{ROLLOUT} -k 'alone or differ'",
    ),
    # Rollouts
    Fault(
        "keys by slot",
        "rollout/decode.py",
        "keys = row_keys(call.key, carry.draws_P[prompt], row % settings.group_size)",
        "keys = row_keys(call.key, jnp.arange(row.shape[0]), row % settings.group_size)",
        f"{ROLLOUT} -k depend_on_the_slots",
    ),
    Fault(
        "a slot is refilled with another prompt's prefix",
        "rollout/decode.py",
        "row_of_slot[slots[i]] // settings.group_size)",
        "row_of_slot[slots[i]] % carry.prompt_lengths_P.shape[0])",
        f"{SLOTS} -k comes_back",
    ),
    Fault(
        "a row of the queue is left out",
        "rollout/queue.py",
        "jnp.cumsum(idle, dtype=jnp.int32) - 1",
        "jnp.cumsum(idle, dtype=jnp.int32)",
        f"{SLOTS} -k taken_once",
    ),
    Fault(
        "the limit of a call is ignored",
        "rollout/decode.py",
        "counts + 1 >= call.max_new_tokens",
        "counts + 1 >= settings.max_new_tokens",
        f"{ROLLOUT} -k its_own_maximum",
    ),
    Fault(
        "a window ends before what is filled",
        "rollout/windows.py",
        "longest_J = jnp.max(positions_B[rows_JR], axis=1) + 1",
        "longest_J = jnp.max(positions_B[rows_JR], axis=1)",
        f"{SLOTS} -k 'plain_way or smallest'",
    ),
    Fault(
        "groups are not put back in order",
        "rollout/windows.py",
        "return out[jnp.argsort(plan.rows_JR.reshape(-1))], cache",
        "return out, cache",
        f"{SLOTS} -k plain_way",
    ),
    Fault(
        "the kernel leaves out a block that was just begun",
        "rollout/kernel.py",
        "blocks_B = positions_B // self.block + 1",
        "blocks_B = jnp.maximum(-(-positions_B // self.block), 1)",
        f"{SLOTS} -k 'plain_way or filled_blocks'",
    ),
    Fault(
        "the kernel's running sum is not scaled to the new maximum",
        "rollout/kernel.py",
        "total = kept * sum_ref",
        "total = sum_ref",
        f"{SLOTS} -k plain_way",
    ),
    Fault(
        "the kernel skips a block that a sliding layer sees",
        "rollout/kernel.py",
        "return jnp.maximum(position - sees + 1, 0) // block",
        "return jnp.maximum(position - sees + block, 0) // block",
        f"{SLOTS} -k plain_way",
    ),
    Fault(
        "later chunks of a prompt stand at the first one's positions",
        "rollout/prefill.py",
        "jnp.broadcast_to(start + jnp.arange(chunk), (rows, chunk))",
        "jnp.broadcast_to(jnp.arange(chunk), (rows, chunk))",
        f"{SLOTS} -k one_pass",
    ),
    Fault(
        "the scales of keys and values are taken for each other",
        "models/attention.py",
        "scores = scores * cache.key_scales[:, :, None, None]",
        "scores = scores * cache.value_scales[:, :, None, None]",
        f"{SLOTS} -k smaller_cache",
    ),
    Fault(
        "the state of a chunk is not donated",
        "rollout/engine.py",
        "self.chunk = jax.jit(chunk, donate_argnums=1, ",
        "self.chunk = jax.jit(chunk, ",
        f"{SLOTS} -k never_copied",
    ),
    Fault(
        "both draws of a token are made with the same numbers",
        "rollout/sampling.py",
        "(keys, i) for i in range(2))",
        "(keys, i) for i in (0, 0))",
        f"{ROLLOUT} -k blocks_of",
    ),
    Fault(
        "an end token one too early",
        "rollout/sampling.py",
        "(positions_B < settings.min_new_tokens)",
        "(positions_B + 1 < settings.min_new_tokens)",
        f"{ROLLOUT} -k before_the_minimum",
    ),
    Fault(
        "slots that wait for another shard count as busy",
        "rollout/engine.py",
        "steps = jax.lax.pmax(carry.steps[0], sharding.ROWS)",
        "steps = jax.lax.psum(carry.steps[0], sharding.ROWS) // self.shards",
        f"{ROLLOUT} -k end_early",
    ),
    Fault(
        "heads that do not divide over tensor are left to the compiler",
        "rollout/attention.py",
        "attend = on_own_heads(how.attend, config, mesh)",
        "attend = on_own_heads(how.attend, config, mesh) if heads_divide(config, mesh) else how.attend",
        f"{SLOTS} -k never_copied",
    ),
    Fault(
        "a later chunk of a prompt reads the first one alone",
        "rollout/prefill.py",
        "sizes = range(chunk, cache.length + 1, chunk)",
        "sizes = [chunk] * (cache.length // chunk)",
        f"{SLOTS} -k 'one_pass or prefill_them_whole'",
    ),
    Fault(
        "the token that completes a stop text is cut off",
        "rollout/finish.py",
        "    return 1 + bisect",
        "    return bisect",
        f"{ROLLOUT} -k stop_text",
    ),
    Fault(
        "the data position is not restored",
        "train.py",
        '        self.data.set_state(host["data"])\n',
        "",
        f"{TRAIN} -k stopped_and_resumed",
    ),
    # The rest of the objective
    Fault(
        "k2 without its importance weight",
        "objective/kl.py",
        "return importance_weight(student, old) * _integral(d, bound)",
        "return _integral(d, bound)",
        OBJECTIVE,
    ),
    Fault(
        "a gradient through the importance weight",
        "objective/kl.py",
        "return jax.lax.stop_gradient(jnp.exp(student - old))",
        "return jnp.exp(student - jax.lax.stop_gradient(old))",
        OBJECTIVE,
    ),
    Fault(
        "the policy clip is one-sided",
        "objective/policy.py",
        "acts_low = (judged < 1.0 - clip_low) & (advantages < 0)",
        "acts_low = judged < -1.0",
        POLICY,
    ),
    Fault(
        "the response mask turned round",
        "objective/masks.py",
        'if kind in ("response", "group"):',
        'if kind in ("response_correct", "group"):',
        MASKS,
    ),
    Fault(
        "masks move the weight they take away",
        "objective/masks.py",
        "return mask / jnp.maximum(completion_mask_BT.sum().astype(jnp.float32), 1.0)",
        "return mask / jnp.maximum(mask.sum(), 1.0)",
        MASKS,
    ),
    Fault(
        "top-k without its tail bucket",
        "objective/divergence.py",
        " + _shares(settings, *tails)",
        "",
        "test_objective_divergence.py",
    ),
    Fault(
        "truncated importance sampling without its cap",
        "objective/policy.py",
        "jnp.minimum(jnp.exp(old - sampler), cap)",
        "jnp.exp(old - sampler)",
        f"{STEP} -k stale_samplers",
    ),
    Fault(
        "a KD reward that escapes the clip",
        "step/terms.py",
        'for t, v in terms.items() if t not in ("rl", "kd")} | {"policy": jnp.sum(loss)}',
        "for t, v in terms.items()}",
        f"{STEP} -k clipped_together",
    ),
    Fault(
        "the soft weight changes the denominator",
        "step/terms.py",
        "kd_weights = kd_weights * batch.kd_scale_BT",
        "kd_weights = kd_weights * batch.kd_scale_BT / batch.kd_scale_BT.mean()",
        f"{STEP} -k soft_weights",
    ),
    Fault(
        "replaced groups do not distil",
        "rounds/choose.py",
        "place < len(for_rl), place < len(used)",
        "place < len(for_rl), place < len(for_rl)",
        "test_rounds.py -k still_distil",
    ),
    Fault(
        "empty places count in a denominator",
        "objective/masks.py",
        "num_rows = completion_mask_BT.any(1).sum().astype(jnp.float32)",
        "num_rows = jnp.float32(completion_mask_BT.shape[0])",
        f"{STEP} -k count_nowhere",
    ),
    Fault(
        "infinity times a weight of 0",
        "step/terms.py",
        "return jnp.where(weights != 0, value, jax.lax.stop_gradient(student))",
        "return value",
        f"{STEP} -k may_overflow",
    ),
    Fault(
        "a bound on d that bounds nothing",
        "objective/kl.py",
        "        return jnp.clip(d, -bound.limit, bound.limit)",
        "        return d",
        f"{OBJECTIVE} -k 'bounds or certain'",
    ),
    Fault(
        "each teacher scores all rows of the other",
        "frozen.py",
        "return bounds[teacher], bounds[teacher + 1]",
        "return bounds[1 - teacher], bounds[2 - teacher]",
        "test_frozen.py -k own_rows",
    ),
    Fault(
        "the head's gradient is not reduced over data",
        "scoring/passes.py",
        "        part = jax.lax.psum_scatter(x[0]",
        "        part = 2 * jax.lax.psum_scatter(x[0]",
        f"{STEP} -k meshes",
    ),
    Fault(
        "a verifier that hangs is waited for",
        "rewards/pool.py",
        "reply = process.ask(request, self._time_limit_s)",
        "reply = process.ask(request, 60.0)",
        "test_rewards.py -k hanging",
    ),
    Fault(
        "the fused head forgets a chunk",
        "scoring/passes.py",
        "(longest(operands.counts_B) + size - 1) // size",
        "longest(operands.counts_B) // size",
        f"{STEP} -k chunks",
    ),
    *(Fault(*row) for row in (*OPTIMIZER_FAULTS, *VERIFIER_FAULTS, *EVALUATION_FAULTS)),
)


def try_fault(fault: Fault) -> tuple[bool, str]:
    """(whether a test noticed, which)."""
    with tempfile.TemporaryDirectory(prefix="mutation_") as folder:
        for name in ("kdrl_jax", "tests", "configs", "docs"):
            shutil.copytree(ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "requirements.txt"):
            shutil.copy(ROOT / name, folder)
        path = Path(folder, "kdrl_jax", fault.file)
        source = path.read_text()
        if source.count(fault.old) != 1:
            return False, f"stands {source.count(fault.old)} times in {fault.file}: mend the fault"
        text = source.replace(fault.old, fault.new)
        if "dataclasses." in fault.new and "import dataclasses" not in text:
            text = text.replace("import jax\n", "import dataclasses\n\nimport jax\n", 1)
        path.write_text(text)
        command = f"{sys.executable} -m pytest -q -x --no-header -p no:cacheprovider tests/{fault.tests}"
        done = subprocess.run(
            command,
            shell=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": folder},
            capture_output=True,
            text=True,
        )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode == 1 and failed:
        return True, failed[0].split(" - ")[0].split("::")[-1]
    return False, f"pytest ended with {done.returncode}: {' '.join(done.stdout.split()[-6:])}"


def main() -> int:
    chosen = [f for f in FAULTS if not sys.argv[1:] or any(word in f.name for word in sys.argv[1:])]
    print("| fault | noticed by |\n| --- | --- |", flush=True)
    unnoticed = 0
    for fault in chosen:
        noticed, what = try_fault(fault)
        unnoticed += not noticed
        print(f"| {fault.name} | {'' if noticed else 'NOT NOTICED, '}{what} |", flush=True)
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
