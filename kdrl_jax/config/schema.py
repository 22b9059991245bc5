"""Every setting of a run, section by section. A setting is here, or in a file beside, only if something
reads it: models and tokenizer in `models`, data in `data`, the terms of the loss in `objective`."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from kdrl_jax.config.base import (
    AboveZero,
    Count,
    Decay,
    Flag,
    Fraction,
    Int,
    NonNegative,
    Positive,
    Real,
    Section,
)
from kdrl_jax.config.checks import check_contradictions
from kdrl_jax.config.data import DataConfig
from kdrl_jax.config.models import ModelConfig, TokenizerConfig
from kdrl_jax.config.objective import EntropyConfig, KDConfig, RefConfig, RLConfig, SFTConfig
from kdrl_jax.config.schedules import Schedule, constant, is_zero


class RolloutConfig(Section):
    source: Literal["student", "teacher", "dataset"] = "student"
    """Whose completions are trained on: `student` samples on-policy; `teacher` samples from the teacher
    (sequence-level KD); `dataset` takes those of the data."""
    group_size: Positive = 8
    """Completions per prompt (G); 1 with `dataset`."""
    max_new_tokens: Positive = 128
    """Tokens that a completion may have; what is compiled has room for so many."""
    length_limit: Schedule | None = None
    """Tokens that a completion may have at a step, from 1 to max_new_tokens: a curriculum of length, or
    null for max_new_tokens always. Evaluations always have max_new_tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion beside the tokenizer's end tokens; what follows the token that completes
    one is cut off on the host."""
    temperature: Schedule = constant(1.0)
    """Divides the logits of sampler, student and teacher alike, so that all mean one policy.
    Training samples the full distribution; top-k and top-p exist for evaluations and `sample` only."""
    importance_cap: AboveZero | None = None
    """Truncated importance sampling: terms at sampled tokens are multiplied by min(pi_trainer / pi_sampler,
    cap), which undoes what separates the sampler's arithmetic from the trainer's."""
    decode_chunk: Positive = 64
    """Decode steps between two words with the host (progress, a request to stop)."""
    slots_per_device: Positive | None = None
    """Completions sampled at once on each device (of `tensor`: on each group of devices); a slot that is
    done takes the next. null: as many as there are rows and room; on a CPU at most 32 in all."""
    cache_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """How keys and values are held while sampling. auto: bfloat16 on accelerators, the model's
    compute_dtype on CPUs. int8 (with a scale per key and value) takes half of bfloat16's memory; what it
    changes shows in `sampler/logprob_gap`, and importance_cap corrects for it."""
    attention: Literal["auto", "windows", "kernel"] = "auto"
    """How sampling reads keys and values: `windows` in plain XLA; `kernel` by a TPU kernel, which elsewhere
    is interpreted, slowly. auto: the kernel on TPUs."""


class RewardConfig(Section):
    verifier: str = "numeric"
    """Decides correctness (score 1): `numeric`, `math` (LaTeX: needs the extra `math`), `choice` (letters),
    `exact`, `regex`, or your own `package.module:function`. What each takes for equal is in
    docs/verifiers.md."""
    pattern: str | None = None
    """The regular expression of `regex`: what its first group holds in the last match is compared with the
    gold answer as `exact` does; without a group it must match the whole completion."""
    shaping: dict[str, Real] = Field(default_factory=dict)
    """Further reward functions and their weights, added to the verifier's score, e.g. `{format: 0.1}`."""
    num_workers: Positive = 2
    time_limit_s: Annotated[float, Field(strict=True, gt=0, le=86400)] = 2.0
    """A worker that needs longer for one answer is killed and replaced; the answer scores 0."""
    overlong_buffer: Count = 0
    """Completions that come within so many tokens of what they may have lose reward, in proportion
    (DAPO's soft overlong punishment, arXiv 2503.14476, eq. 13); 0: none do."""
    overlong_penalty: AboveZero = 1.0
    """What the longest lose."""
    length_weight: NonNegative = 0.0
    """Weight of Kimi k1.5's length reward (arXiv 2501.12599, section 2.3.3): of a group's completions the
    shortest gains half of it and the longest loses half, but wrong ones gain nothing. 0: none."""


class OptimizerConfig(Section):
    kind: Literal["adamw", "adamw_bf16", "adafactor", "muon"] = "adamw"
    """`adamw_bf16` holds AdamW's moments in bfloat16, rounded at random; `adafactor` (arXiv 1804.04235) holds
    only means over rows and columns of the second moment, and no first; `muon` makes the updates of the
    layers' matrices orthogonal, at AdamW's scale (arXiv 2502.16982), and trains all else by AdamW. The memory
    of each is in docs/optimizers.md."""
    learning_rate: Schedule = constant(1e-6)
    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: AboveZero = 1e-8
    weight_decay: NonNegative = 0.0
    """Decoupled, as AdamW's; applied to matrices, not to norms and biases."""
    max_grad_norm: AboveZero | None = 1.0


class TrainConfig(Section):
    num_steps: Positive
    """Optimizer updates in the whole run."""
    prompts_per_iteration: Positive = 16
    """Prompts (P) drawn per iteration; the batch is P x group_size rows."""
    num_minibatches: Positive = 1
    """Parts that an iteration's batch is cut into, with an update for each."""
    num_epochs: Positive = 1
    """Times that an iteration goes over its batch. One epoch of one minibatch is strictly on-policy."""
    pack_length: Positive | None = None
    """Positions of a packed row, which holds as many completions with their prompts as fit: a multiple of
    128, at least max_prompt_tokens + max_new_tokens. null: about 2,048, or one of the longest. Changes memory
    and speed alone, as the next settings do."""
    microbatch_rows: Positive | None = None
    """Packed rows per pass through a model, over all devices. null: one on each."""
    share_prompts: Literal["auto", "always", "never"] = "auto"
    """Whether completions of one prompt that share a packed row share the prompt, which is then computed
    once. auto: where attention can."""
    attention: Literal["auto", "plain", "blockwise", "splash"] = "auto"
    """How whole rows attend: `plain` holds all scores at once, of size pack_length²; `blockwise` a block of
    them, in XLA; `splash` by JAX's TPU kernel, which elsewhere is interpreted, slowly, and shares no prompts.
    auto: splash on TPUs, blockwise elsewhere."""
    remat: Literal["none", "elementwise", "mlp", "products", "full", "offload"] = "none"
    """What of each layer the backward pass computes again instead of keeping it, from the least work to the
    least memory: nothing; norms, rotations and activations; the products of the MLP too; the other products
    too, but not attention's; all; all, and what enters each layer waits in host memory."""
    park_frozen: Literal["auto", "always", "never"] = "auto"
    """Whether teachers and reference wait in the hosts' memory while they do not score; `auto` parks them
    where there are several."""
    park_optimizer: Flag = False
    """Keep the optimizer's state in the hosts' memory while sampling, scoring and evaluating: it comes to the
    devices once per iteration, for its updates. The numbers stay the same."""
    head_chunk: Positive = 320
    """Tokens per pass through the vocabulary head, on each device; changes memory and speed alone. The
    default takes at most 1.6 GiB with 151,936 tokens and models 3,584 wide (`benchmarks/head.py`); with
    room to spare 512 or 1024 is faster, and a vocabulary over `tensor` takes that much less."""
    diagnostics_every: Count = 10
    """Steps between measurements of the separate RL and KD gradients (0: never). One measurement costs
    a forward and two backward passes: about 1.6 updates, shown as `time/diagnostics`."""
    max_skipped_updates: Positive = 5
    """Skipped updates in a row after which the run stops."""
    spike_sigmas: AboveZero | None = None
    """An update is skipped, as one that is not finite is, if its loss or the logarithm of its gradient's norm
    lies so many standard deviations above what the last 50 or so updates had. null: none is; where rewards
    are rare, the first of them are spikes too."""

    @property
    def updates_per_iteration(self) -> int:
        return self.num_minibatches * self.num_epochs


class MeshConfig(Section):
    """Device counts per mesh axis; one of them may be -1 (what is left)."""

    data: Int = 1
    fsdp: Int = -1
    tensor: Int = 1
    host_timeout_s: Annotated[float, Field(strict=True, ge=5, allow_inf_nan=False)] = 60.0
    """In a job of several hosts, the seconds after which one that is not heard from has failed, which ends
    the job on all of them. One that ends is noticed at once."""
    cpu_devices: Positive | None = None
    """Devices that each host's CPU is taken apart into, best one per core: each samples and trains on its own
    rows, which uses the cores better than products shared between them: sampling on two cores is 1.45 times
    as fast (`benchmarks/rollout.py`). null: what JAX makes of it, one. Nothing to TPUs and GPUs."""

    @model_validator(mode="after")
    def _check(self) -> "MeshConfig":
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for axis, size in sizes.items():
            if size != -1 and size < 1:
                raise ValueError(f"{axis}={size}; a size is at least 1, or -1 for what is left")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(
                f"only one axis may be -1, got {', '.join(f'{a}={s}' for a, s in sizes.items())}"
            )
        return self


class EvalConfig(Section):
    every: Count = 0
    """Steps between evaluations during training; 0 evaluates before and after only."""
    num_prompts: Positive = 64
    greedy: Flag = True
    """Measure greedy accuracy."""
    num_samples: Count = 4
    """Samples per prompt for the sampled accuracy (0: none)."""
    temperature: AboveZero = 1.0
    top_k: Annotated[int, Field(strict=True, ge=0, le=256)] = 0
    """Keep the k most likely tokens (0: all)."""
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] = 1.0
    """Keep the smallest set of tokens with this much probability, within the top 256."""
    min_new_tokens: Count = 0
    """No end token before so many others. For evaluations and `sample` only, as the two above: training
    samples the policy itself."""
    agreement: Flag = False
    """Compare student and teacher on the teacher's own greedy answers to the held-out prompts."""
    keep_samples: Count = 64
    """The answers to the first so many questions are kept to be read, in `eval/samples/` (0: none)."""


class CheckpointConfig(Section):
    every: Count = 50
    """Steps between checkpoints; 0 saves at the end only. Arrays are written while the run goes on."""
    keep: Positive = 2
    """Newest checkpoints kept; with 1 there is none to go back to where the newest is damaged."""
    keep_every: Count = 0
    """Checkpoints of steps that are multiples of it are kept as well; 0: none."""
    keep_best: Count = 0
    """So many of the highest held-out accuracy (sampled, else greedy; of equal ones the newer) are kept as
    well; 0: none. What is evaluated is then saved too, from the first update on."""
    stop_within_s: AboveZero | None = 25.0
    """Seconds that a run asked to end by SIGTERM has to reach a place where it can save, and to save. Then it
    ends all the same, and goes on from its newest checkpoint. Spot TPUs are taken away after 30 s. null: as
    long as it takes, as for Ctrl-C."""
    preemption_notice: Literal["google"] | None = None
    """Whose word that the machine will be taken away counts as SIGTERM: `google` asks the metadata server of
    Google Cloud's machines every two seconds. null: nobody's but the signal's."""


class AlarmsConfig(Section):
    """When a run is told to go wrong; it goes on. null switches an alarm off. Each compares means over
    `window` steps, and is raised once until it has passed."""

    window: Positive = 20
    reward_collapse: Fraction | None = 0.5
    """`reward/solved_frac` is below this share of the best that it was, if that was 5 % or more."""
    length_blow_up: AboveZero | None = 2.0
    """`completion/length_mean` is so many times that of the run's first steps, and more completions than then
    are cut off."""
    entropy_collapse: Fraction | None = 0.1
    """`entropy` is below this share of that of the run's first steps, and fewer than 80 % are solved."""
    teacher_mismatch: AboveZero | None = 3.0
    """`kd/reverse_kl` is above so many nats a token, and not falling: the teacher does not know what it is
    shown, as under another chat template or vocabulary."""


class PlanConfig(Section):
    """What the `plan` command compiles for; no other reads it."""

    topology: str | tuple[str, ...] = "v5e:4x4"
    """TPU slices, `KIND:SHAPE`, of v4, v5e, v5p, v6e and v7x; several are compared: [v5e:4x4, v5p:2x2x1]."""
    prompt_tokens: Positive | None = None
    """Mean length of prompts, for times alone; null is half of data.max_prompt_tokens."""
    completion_tokens: Positive | None = None
    """Mean length of completions, for times alone; null is half of rollout.max_new_tokens."""
    search: Flag = True
    """Where a slice has no room, try which settings would make some."""


class LogConfig(Section):
    dir: str | None = None
    """The run directory, here or in a bucket (gs://BUCKET/RUN, s3://BUCKET/RUN); `runs/<name>` by default.
    All hosts of a job must see it; several cannot write checkpoints to s3://."""
    rollouts_every: Count = 10
    """Steps between rollouts written to `rollouts/` (0: never). The last step's is always written;
    of rows of a data set (`rollout.source: dataset`) none is."""
    rollouts_rows: Positive = 16
    """Rows written each time, in whole groups: at least one."""
    rollouts_tokens: Flag = True
    """Write each token of them too: its log-probability and, where a teacher scores, the exact reverse KL and
    the teacher's most likely tokens there. `report` shows them; the file is about ten times as large."""
    writers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Programs that are told what the run's files are told; each has an extra of its name, and settings of
    its own in its environment. A resumed run goes on there. None can slow a run or end it."""
    project: str = "kdrl_jax"
    """Where runs are kept together: W&B's and trackio's project, MLflow's experiment."""
    group: str | None = None
    """What groups runs within it, such as seeds of one setting."""
    profile_steps: tuple[Count, Count] | None = None
    """Steps [first, last) that are traced for xprof, in whole iterations, to `profile/`: of [2, 4] none
    compiles any more."""

    @field_validator("writers")
    @classmethod
    def _check_writers(cls, writers: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(writers)) < len(writers):
            raise ValueError(f"{', '.join(writers)}: name each once")
        return writers


class Config(Section):
    """One run."""

    name: str
    """The run's name, and the folder of `runs/` it lives in."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0
    """Below 2**32: JAX's keys have no room for more, and would repeat those of smaller seeds."""
    deterministic: Flag = False
    """The same seed, machine and mesh give the same bytes. CPUs and TPUs do that anyway; GPUs then use only
    kernels that do, which can be slower."""
    student: ModelConfig
    teacher: ModelConfig | None = None
    teachers: dict[str, ModelConfig] = Field(default_factory=dict)
    """Several teachers by name, instead of `teacher`: each source of data.train names its own, or
    kd.mixture weighs them all."""
    reference: ModelConfig | None = None
    """What ref and kd.extrapolation compare with; null is the student as the run starts it."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    rl: RLConfig = RLConfig()
    kd: KDConfig = KDConfig()
    ref: RefConfig = RefConfig()
    entropy: EntropyConfig = EntropyConfig()
    sft: SFTConfig = SFTConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    plan: PlanConfig = PlanConfig()
    cache_dir: str | None = "~/.cache/kdrl_jax"
    """Where compiled programs wait for the next run of the same ones, and tables of `plan`; null: nowhere."""

    @property
    def run_dir(self) -> str:
        return self.log.dir or f"runs/{self.name}"

    @property
    def all_teachers(self) -> dict[str, ModelConfig]:
        """Role -> teacher: `teacher`, or `teachers.NAME` for each of several."""
        if self.teacher is not None:
            return {"teacher": self.teacher}
        return {f"teachers.{name}": model for name, model in self.teachers.items()}

    @property
    def scores_teacher(self) -> bool:
        """Whether a teacher's probabilities of the completions are needed."""
        return not is_zero(self.kd.coef) or self.rl.anchor_share < 1

    @property
    def uses_reference(self) -> bool:
        return not is_zero(self.ref.coef) or (not is_zero(self.kd.coef) and self.kd.extrapolation != 1)

    @property
    def samples_student(self) -> bool:
        """Whether the completions are the student's own, so that they have rewards and ratios."""
        return self.rollout.source == "student"

    @property
    def teacher_states(self) -> bool:
        """Whether the update needs the teachers' distributions whole, not only at the sampled tokens."""
        return not is_zero(self.kd.coef) and self.kd.estimator in ("full", "top_k")

    @property
    def num_kinds(self) -> int:
        """Kinds of rows that no pass through a model mixes: as many as there are teachers that each score
        rows of their own."""
        by_source = self.scores_teacher and self.kd.mixture is None
        return len(self.all_teachers) if by_source and len(self.all_teachers) > 1 else 1

    @property
    def groups_per_batch(self) -> int:
        """Prompts whose completions an iteration trains on; more than it draws at first if groups without
        signal are replaced and still distil."""
        p = self.train.prompts_per_iteration
        return 2 * p if self.rl.resample_rounds and not is_zero(self.kd.coef) else p

    @field_validator("teachers")
    @classmethod
    def _check_teachers(cls, teachers: dict[str, ModelConfig]) -> dict[str, ModelConfig]:
        for name in teachers:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(f"name {name!r}: write letters, digits, '_' and '-'")
        return teachers

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError("write letters, digits, '.', '_' and '-', beginning with a letter or digit")
        return name

    @model_validator(mode="after")
    def _check(self) -> "Config":
        check_contradictions(self)
        return self
