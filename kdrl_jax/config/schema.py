"""Every setting of a run, section by section. A setting is here only if something reads it."""

import re
from typing import Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from kdrl_jax.config.base import Count, Flag, Fraction, Int, NonNegative, Positive, Real, Section
from kdrl_jax.config.estimators import check_pair
from kdrl_jax.config.schedules import Constant, Schedule

DType = Literal["float32", "bfloat16"]


def _constant(value: float) -> Constant:
    return Constant(value=value)


def _check_layer_item(item: Any) -> Any:
    if isinstance(item, bool) or not re.fullmatch(r"[0-9]{1,4}(-[0-9]{1,4})?", str(item)):
        raise ValueError("write an index (3) or a range (0-9), up to 9999")
    return item


LayerItem = Annotated[int | str, BeforeValidator(_check_layer_item)]


class ArchitectureConfig(Section):
    """A decoder built from random weights. Field names follow the Hugging Face config.json."""

    family: Literal["llama", "qwen2", "qwen3"] = "llama"
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive | None = None
    """Defaults to hidden_size / num_attention_heads."""
    rope_theta: Real = 10000.0
    tie_word_embeddings: Flag = True

    @model_validator(mode="after")
    def _check(self) -> "ArchitectureConfig":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads="
                f"{self.num_attention_heads}; set head_dim"
            )
        return self


class LoRAConfig(Section):
    """Low-rank adapters (arXiv 2106.09685): the student's weights stay as they are, and the product of two
    thin matrices is trained beside each. Checkpoints hold the adapters alone."""

    rank: Positive = 16
    alpha: Annotated[float, Field(strict=True, gt=0)] = 32.0
    """An adapter's product is multiplied by alpha / rank."""
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = Field(
        default=("q", "k", "v", "o", "gate", "up", "down"), min_length=1
    )
    """Weights that get an adapter."""


class ModelConfig(Section):
    """Where a model comes from: exactly one of `path`, `run` and `architecture`."""

    path: str | None = None
    """A Hugging Face folder, a .gguf file, or a hub name such as `Qwen/Qwen2.5-0.5B`."""
    run: str | None = None
    """A finished run directory, or a config (relative to the file naming it) that is trained first."""
    architecture: ArchitectureConfig | None = None
    """Random initial weights of this shape."""
    sha256: str | None = None
    """Expected checksum of the file at `path` (single files only)."""
    keep_layers: tuple[LayerItem, ...] | None = None
    """Layers to keep, in order, as indices or inclusive ranges: `[0-9, 20-29]`."""
    compute_dtype: DType = "float32"
    """Type of matrix products. The student's master weights are always float32 (with `lora`, those of its
    adapters; the rest is held in this type)."""
    weights: Literal["float", "int8"] = "float"
    """`int8` (teacher only): matrices in 8 bits, with a scale per output channel."""
    lora: LoRAConfig | None = None
    """Student only: train adapters instead of the weights."""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        given = [k for k in ("path", "run", "architecture") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, run and architecture; got {given or 'none'}")
        if self.sha256 is not None and self.path is None:
            raise ValueError(f"sha256={self.sha256} checks a file, so it needs path")
        if self.keep_layers is not None and self.path is None:
            items = list(self.keep_layers)
            raise ValueError(f"keep_layers={items} cuts a model that is read from path")
        self.layer_indices()
        return self

    def layer_indices(self) -> tuple[int, ...] | None:
        """`keep_layers` with its ranges written out, or None for all layers."""
        if self.keep_layers is None:
            return None
        kept: list[int] = []
        for item in self.keep_layers:
            first, _, last = str(item).partition("-")
            kept.extend(range(int(first), int(last or first) + 1))
        if not kept or kept != sorted(set(kept)):
            items = list(self.keep_layers)
            raise ValueError(f"keep_layers={items}: name at least one layer, in increasing order")
        return tuple(kept)


class TokenizerConfig(Section):
    kind: Literal["model", "char", "file"] = "model"
    """`model`: the one beside the student's (or else the teacher's) weights; `char`: built in;
    `file`: at `path`."""
    path: str | None = None
    """With kind `file`: a tokenizer.json, a SentencePiece or tiktoken .model, a .gguf, or their folder."""
    chat_template: Literal["auto", "none"] = "auto"
    """`auto` wraps prompts in the tokenizer's chat template if it has one; `none` never does."""

    @model_validator(mode="after")
    def _check(self) -> "TokenizerConfig":
        if (self.kind == "file") != (self.path is not None):
            raise ValueError(f"kind={self.kind} with path={self.path or 'null'}; path goes with kind=file")
        return self


class _Source(Section):
    weight: Annotated[float, Field(strict=True, gt=0)] = 1.0
    """Share of draws in a mixture, relative to the other sources."""


class JsonlSourceConfig(_Source):
    kind: Literal["jsonl"]
    path: str
    """A JSON Lines file, relative to the working directory."""
    question_field: str = "question"
    answer_field: str = "answer"
    completion_field: str | None = None
    """Field holding a completion to imitate (for SFT)."""
    first: Positive | None = None
    """Use only the first so many rows."""


class TaskSourceConfig(_Source):
    """Procedural questions: every row is generated from its index, so there is nothing to download."""

    kind: Literal["task"]
    task: Literal["chain_sum", "word_sum"]
    """`chain_sum`: symbols with worked steps; `word_sum`: one- and two-step sums in words."""
    split: Literal["train", "heldout"] = "train"
    """A question belongs to one split, by a hash of its text."""
    min_terms: Annotated[int, Field(strict=True, ge=2)] = 2
    max_terms: Annotated[int, Field(strict=True, ge=2)] = 4
    max_value: Positive = 9
    """Terms are drawn from 1..max_value."""
    size: Positive = 100_000
    """Rows before the task repeats (rows are drawn with a fixed seed of the task's own)."""

    @model_validator(mode="after")
    def _check(self) -> "TaskSourceConfig":
        if self.min_terms > self.max_terms:
            raise ValueError(f"min_terms={self.min_terms} is above max_terms={self.max_terms}")
        return self


SourceConfig = Annotated[
    Union[Annotated[JsonlSourceConfig, Tag("jsonl")], Annotated[TaskSourceConfig, Tag("task")]],
    Discriminator("kind"),
]


class DataConfig(Section):
    train: tuple[SourceConfig, ...] = Field(min_length=1)
    """Sources to train on, mixed by weight, each shuffled and repeated."""
    eval: tuple[SourceConfig, ...] = ()
    """Held-out sources; the first `eval.num_prompts` rows over all of them, taken in turn."""
    prompt_template: str = "{question}"
    """The user's message; `{question}` is replaced."""
    max_prompt_tokens: Positive = 128
    """Longer prompts are left out, counted and reported."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if "{question}" not in self.prompt_template:
            raise ValueError(f"prompt_template={self.prompt_template!r} does not hold '{{question}}'")
        return self


class RolloutConfig(Section):
    source: Literal["student", "dataset"] = "student"
    """`student` samples on-policy; `dataset` takes the completions of the data (SFT)."""
    group_size: Positive = 8
    """Completions per prompt (G); 1 with `dataset`."""
    max_new_tokens: Positive = 128
    temperature: Annotated[float, Field(strict=True, gt=0)] = 1.0
    """Divides the logits of sampler, student and teacher alike, so that all mean one policy.
    Training samples the full distribution; top-k and top-p exist for evaluation only."""
    decode_chunk: Positive = 64
    """Decode steps between two words with the host (progress, a request to stop)."""


class RewardConfig(Section):
    verifier: str = "numeric"
    """Decides correctness (score 1): `numeric`, `exact`, or your own `package.module:function`."""
    shaping: dict[str, Real] = Field(default_factory=dict)
    """Further reward functions and their weights, added to the verifier's score, e.g. `{format: 0.1}`."""
    num_workers: Positive = 2
    time_limit_s: Annotated[float, Field(strict=True, gt=0)] = 2.0
    """A worker that needs longer for one answer is killed and replaced; the answer scores 0."""


Denominator = Literal["tokens", "sequences"]


class RLConfig(Section):
    coef: Schedule = _constant(1.0)
    advantage: Literal["grpo", "grpo_no_std"] = "grpo"
    """Group-centred reward, divided by the group's standard deviation or not (Dr. GRPO)."""
    clip_low: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(strict=True, gt=0)] = 0.2
    denominator: Denominator = "tokens"
    """Mean over the minibatch's completion tokens, or over its sequences of their token means."""


class KDConfig(Section):
    coef: Schedule = _constant(0.0)
    estimator: Literal["k1", "k2", "k3_forward", "full"] = "k2"
    """Per-token divergence; see `objective.kl` for the gradient each one has."""
    placement: Literal["loss", "reward"] = "loss"
    """`loss`: differentiated; `reward`: a stopped immediate reward. Useless pairs are refused."""
    mask: Literal["none", "response", "group"] = "none"
    """`response`: only wrong completions; `group`: only groups without a correct one."""
    denominator: Denominator = "tokens"
    """Counted over the kept tokens (or sequences) alone."""
    end_token: Flag = True
    """Whether the final end token is distilled (turn off when end tokens differ in meaning)."""
    max_abs_logratio: Annotated[float, Field(strict=True, gt=0)] | None = None
    """Bound on |log pi_S - log pi_T| inside k1 and k2; counted in `kd/clip_frac` when it acts."""

    @model_validator(mode="after")
    def _check(self) -> "KDConfig":
        check_pair(self.estimator, self.placement)
        if self.max_abs_logratio is not None and self.estimator not in ("k1", "k2"):
            raise ValueError(
                f"max_abs_logratio={self.max_abs_logratio} bounds k1 and k2 only; "
                f"kd.estimator is {self.estimator}"
            )
        return self


class SFTConfig(Section):
    coef: Schedule = _constant(0.0)
    """Weight of -log pi_S(completion); needs `rollout.source: dataset`."""


class OptimizerConfig(Section):
    learning_rate: Schedule = _constant(1e-6)
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    eps: Annotated[float, Field(strict=True, gt=0)] = 1e-8
    weight_decay: NonNegative = 0.0
    """AdamW's; applied to matrices, not to norms and biases."""
    max_grad_norm: Annotated[float, Field(strict=True, gt=0)] | None = 1.0


class TrainConfig(Section):
    num_steps: Positive
    """Optimizer updates in the whole run."""
    prompts_per_iteration: Positive = 16
    """Prompts (P) drawn per iteration; the batch is P x group_size rows."""
    num_minibatches: Positive = 1
    """Updates per iteration; 1 is strictly on-policy."""
    microbatch_rows: Positive | None = None
    """Rows per forward and backward, over all devices; None is the whole minibatch. Changes memory only."""
    remat: Flag = False
    """Recompute each layer in the backward pass: less memory, about a third more work."""
    head_chunk: Positive = 320
    """Tokens per pass through the vocabulary head, on each device; changes memory and speed alone. The
    default takes at most 1.6 GiB with 151,936 tokens and models 3,584 wide (`benchmarks/head.py`); with
    room to spare 512 or 1024 is faster, and a vocabulary over `tensor` takes that much less."""
    diagnostics_every: Count = 10
    """Steps between measurements of the separate RL and KD gradients (0: never). One measurement costs
    a forward and two backward passes: about 1.6 updates, shown as `time/diagnostics`."""
    max_skipped_updates: Positive = 5
    """Non-finite updates in a row after which the run stops."""


class MeshConfig(Section):
    """Device counts per mesh axis; one of them may be -1 (what is left)."""

    data: Int = 1
    fsdp: Int = -1
    tensor: Int = 1

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
    temperature: Annotated[float, Field(strict=True, gt=0)] = 1.0
    top_k: Annotated[int, Field(strict=True, ge=0, le=256)] = 0
    """Keep the k most likely tokens (0: all)."""
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] = 1.0
    """Keep the smallest set of tokens with this much probability, within the top 256."""
    agreement: Flag = False
    """Compare student and teacher on the teacher's own greedy answers to the held-out prompts."""


class CheckpointConfig(Section):
    every: Count = 50
    """Steps between checkpoints; 0 saves at the end only."""
    keep: Positive = 2
    """Newest checkpoints kept."""


class LogConfig(Section):
    dir: str | None = None
    """The run directory; `runs/<name>` by default."""
    rollouts_every: Count = 10
    """Steps between rollouts written to `rollouts/` (0: never). The last step is always written."""
    rollouts_rows: Positive = 16
    """Rows written each time."""


class Config(Section):
    """One run."""

    name: str
    """The run's name, and the folder of `runs/` it lives in."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0
    """Below 2**32: JAX's keys have no room for more, and would repeat those of smaller seeds."""
    student: ModelConfig
    teacher: ModelConfig | None = None
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    rl: RLConfig = RLConfig()
    kd: KDConfig = KDConfig()
    sft: SFTConfig = SFTConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def run_dir(self) -> str:
        return self.log.dir or f"runs/{self.name}"

    @property
    def uses_teacher(self) -> bool:
        return not is_zero(self.kd.coef)

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


def is_zero(schedule: Schedule) -> bool:
    """Whether a coefficient is the constant 0, so that its term is left out altogether."""
    return isinstance(schedule, Constant) and schedule.value == 0


def check_contradictions(c: Config) -> None:
    """Refuses settings that cannot all be meant.

    Raises:
        ValueError: naming the keys, their values and what to change.
    """
    if c.student.weights != "float":
        raise ValueError(f"student.weights={c.student.weights} cannot be trained; only a teacher may be int8")
    if c.teacher is not None and c.teacher.lora is not None:
        raise ValueError("teacher.lora is set, but a teacher is not trained; remove it")
    if is_zero(c.rl.coef) and is_zero(c.kd.coef) and is_zero(c.sft.coef):
        raise ValueError("rl.coef, kd.coef and sft.coef are all 0: nothing would be trained")
    if c.uses_teacher and c.teacher is None:
        raise ValueError("kd.coef is not 0 but there is no teacher; add a teacher section")
    if c.eval.agreement and c.teacher is None:
        raise ValueError("eval.agreement=true compares with a teacher, and there is none")
    if c.eval.agreement and not c.data.eval:
        raise ValueError("eval.agreement=true compares on held-out questions, but data.eval names no source")
    if c.rollout.source == "dataset":
        if not is_zero(c.rl.coef):
            raise ValueError("rl.coef must be 0 with rollout.source=dataset: nothing was sampled")
        if c.uses_teacher and c.kd.estimator != "full":
            raise ValueError(
                f"kd.estimator={c.kd.estimator} is an expectation over the student's own samples; "
                "with rollout.source=dataset use kd.estimator=full"
            )
        if c.kd.mask != "none":
            raise ValueError(f"kd.mask={c.kd.mask} needs sampled completions, not rollout.source=dataset")
        if c.rollout.group_size != 1:
            raise ValueError(
                f"rollout.group_size={c.rollout.group_size} with rollout.source=dataset; "
                "data has one completion per prompt, set it to 1"
            )
    elif not is_zero(c.sft.coef):
        raise ValueError("sft.coef is not 0, but rollout.source=student has no completions to imitate")
    elif not is_zero(c.rl.coef) and c.rollout.group_size < 2:
        raise ValueError("rollout.group_size=1 leaves no group to compare rewards in; use 2 or more")
    if c.eval.every and not c.data.eval:
        raise ValueError(f"eval.every={c.eval.every} but data.eval names no source")
    rows = c.train.prompts_per_iteration * c.rollout.group_size
    if rows % c.train.num_minibatches:
        raise ValueError(
            f"{rows} rows (prompts_per_iteration x group_size) do not divide into "
            f"train.num_minibatches={c.train.num_minibatches}"
        )
    if c.train.num_steps % c.train.num_minibatches:
        raise ValueError(
            f"train.num_steps={c.train.num_steps} ends inside an iteration of "
            f"train.num_minibatches={c.train.num_minibatches} updates; make it a multiple"
        )
    per_minibatch = rows // c.train.num_minibatches
    if c.train.microbatch_rows and per_minibatch % c.train.microbatch_rows:
        raise ValueError(
            f"a minibatch of {per_minibatch} rows does not divide into "
            f"train.microbatch_rows={c.train.microbatch_rows}"
        )
