"""Settings that cannot all be meant. Each check names the keys, their values and what to change."""

import re
from typing import TYPE_CHECKING

from kdrl_jax.config.estimators import BOUNDED, SAMPLED
from kdrl_jax.config.schedules import Schedule, bounds, is_zero

if TYPE_CHECKING:
    from kdrl_jax.config.schema import Config


def check_contradictions(c: "Config") -> None:
    """Refuses settings that contradict each other.

    Raises:
        ValueError: the first contradiction.
    """
    _check_models(c)
    _check_teachers(c)
    _check_unread(c)
    _check_pattern(c)
    _check_optimizer(c)
    _check_terms(c)
    _check_source(c)
    _check_ranges(c)
    _check_counts(c)


def _check_models(c: "Config") -> None:
    if c.student.weights != "float":
        raise ValueError(
            f"student.weights={c.student.weights} cannot be trained; a teacher or a reference may be int8"
        )
    frozen = c.all_teachers | ({"reference": c.reference} if c.reference else {})
    for role, model in frozen.items():
        if model.lora is not None:
            raise ValueError(f"{role}.lora is set, but a {role.split('.')[0]} is not trained; remove it")


def _check_teachers(c: "Config") -> None:
    if c.teacher is not None and c.teachers:
        raise ValueError("teacher and teachers are both given; name all of them in teachers")
    if c.scores_teacher and not c.all_teachers:
        why = "kd.coef is not 0" if not is_zero(c.kd.coef) else f"rl.anchor_share={c.rl.anchor_share}"
        raise ValueError(f"{why} but there is no teacher; add a teacher section")
    if c.eval.agreement and not c.all_teachers:
        raise ValueError("eval.agreement=true compares with a teacher, and there is none")
    if c.eval.agreement and len(c.all_teachers) > 1:
        raise ValueError("eval.agreement=true compares with one teacher, but teachers names several")
    if c.eval.agreement and not c.data.eval:
        raise ValueError("eval.agreement=true compares on held-out questions, but data.eval names no source")
    known = ", ".join(c.teachers) or "none"
    named = {s.teacher for s in c.data.train} - {None}
    if unknown := sorted(str(name) for name in named - set(c.teachers)):
        raise ValueError(f"data names teacher {unknown[0]!r}, which is none of teachers ({known})")
    if c.kd.mixture is not None:
        if set(c.kd.mixture) != set(c.teachers):
            raise ValueError(f"kd.mixture weighs {', '.join(c.kd.mixture)}, but teachers are {known}")
        if c.kd.teacher_entropy_scale is not None:
            raise ValueError(
                f"kd.teacher_entropy_scale={c.kd.teacher_entropy_scale} needs one teacher per row, but "
                "kd.mixture has several"
            )
        if named:
            raise ValueError("kd.mixture lets all teachers score every row; remove teacher from data sources")
    elif c.scores_teacher and len(c.teachers) > 1 and any(s.teacher is None for s in c.data.train):
        raise ValueError(
            f"there are {len(c.teachers)} teachers ({', '.join(c.teachers)}): give each source of data.train "
            "its own by teacher=NAME, or weigh them all with kd.mixture"
        )


def _check_unread(c: "Config") -> None:
    """Settings that are given, but that nothing in this config reads."""
    kd, rl = not is_zero(c.kd.coef), not is_zero(c.rl.coef)
    e = c.kd.estimator
    if c.kd.max_abs_logratio is not None and e not in BOUNDED and c.rl.anchor_share == 1:
        raise ValueError(
            f"kd.max_abs_logratio={c.kd.max_abs_logratio} bounds k1, k2 and score_function only (and "
            f"rl.anchor_share); kd.estimator is {e}"
        )
    if c.kd.mixture is not None and not c.scores_teacher:
        raise ValueError("kd.mixture weighs teachers, but kd.coef is 0 and none of them is asked")
    if c.kd.extrapolation != 1 and not kd:
        raise ValueError(f"kd.extrapolation={c.kd.extrapolation}, but kd.coef is 0")
    if c.reference is not None and not c.uses_reference:
        raise ValueError("reference is given, but ref.coef is 0 and kd.extrapolation is 1: nothing reads it")
    if c.rl.resample_rounds and not rl:
        raise ValueError(
            f"rl.resample_rounds={c.rl.resample_rounds} replaces groups for RL, but rl.coef is 0"
        )
    if c.rl.anchor_share < 1 and not rl:
        raise ValueError(f"rl.anchor_share={c.rl.anchor_share} changes the policy term, but rl.coef is 0")
    if c.rollout.importance_cap is not None and not (rl or (kd and e in SAMPLED) or not is_zero(c.ref.coef)):
        raise ValueError(
            f"rollout.importance_cap={c.rollout.importance_cap} weighs terms at sampled tokens: there are "
            "none"
        )
    if c.rollout.source == "dataset":
        fields = type(c.rollout).model_fields
        for name in ("length_limit", "stop", "slots_per_device", "cache_dtype", "attention"):
            value = getattr(c.rollout, name)
            evaluated = c.data.eval and name != "length_limit"
            if value != fields[name].default and not evaluated:
                raise ValueError(f"rollout.{name}={value}, but rollout.source=dataset samples nothing")
    if c.rollout.stop and kd and not c.kd.end_token:
        raise ValueError(
            "kd.end_token=false leaves out the last token of completions that have ended, which with "
            "rollout.stop is text; use one of them"
        )
    for i, source in enumerate(c.data.eval):
        if source.weight != 1:
            raise ValueError(
                f"data.eval.{i}.weight={source.weight}, but held-out questions are taken from their sources "
                "in turn; remove it"
            )
    if c.reward.overlong_buffer and not rl:
        raise ValueError(f"reward.overlong_buffer={c.reward.overlong_buffer} is a reward, but rl.coef is 0")
    if c.reward.length_weight and not rl:
        raise ValueError(f"reward.length_weight={c.reward.length_weight} is a reward, but rl.coef is 0")
    if any(s.teacher for s in c.data.eval):
        raise ValueError(
            "a source of data.eval names a teacher; teachers score completions of data.train only"
        )


def _check_pattern(c: "Config") -> None:
    r = c.reward
    if "regex" in (r.verifier, *r.shaping):
        if r.pattern is None:
            raise ValueError("the verifier regex needs reward.pattern, a regular expression")
        try:
            re.compile(r.pattern)
        except re.error as error:
            raise ValueError(f"reward.pattern={r.pattern!r} is no regular expression: {error}") from error
    elif r.pattern is not None:
        raise ValueError(
            f"reward.pattern={r.pattern!r} is read by regex alone; set reward.verifier=regex, or remove it"
        )


def _check_optimizer(c: "Config") -> None:
    o = c.optimizer
    if o.kind == "adafactor":
        for name in ("b1", "b2", "eps"):
            if (value := getattr(o, name)) != type(o).model_fields[name].default:
                raise ValueError(
                    f"optimizer.{name}={value} is Adam's; optimizer.kind=adafactor reads none: remove it"
                )
    if o.kind == "muon" and c.student.lora is not None:
        raise ValueError(
            "optimizer.kind=muon is for the layers' matrices, but with student.lora only adapters are "
            "trained; use adamw"
        )


def _check_terms(c: "Config") -> None:
    if is_zero(c.rl.coef) and is_zero(c.kd.coef) and is_zero(c.sft.coef):
        raise ValueError("rl.coef, kd.coef and sft.coef are all 0: nothing would be trained")
    if c.rl.anchor_share < 1 and c.rl.loss != "ppo":
        raise ValueError(
            f"rl.anchor_share={c.rl.anchor_share} changes the ratio of rl.loss=ppo, not {c.rl.loss}"
        )
    uses_policy = not is_zero(c.rl.coef) or (not is_zero(c.kd.coef) and c.kd.placement == "reward")
    if c.rl.anchor_share < 1 and not is_zero(c.kd.coef) and c.kd.placement == "reward":
        raise ValueError(
            f"kd.placement=reward with rl.anchor_share={c.rl.anchor_share}: the anchored ratio would weigh "
            "the teacher's reward too, and its gradient would not be the KL's; use one of them"
        )
    if uses_policy and c.rl.loss == "reinforce" and c.train.updates_per_iteration > 1:
        raise ValueError(
            f"rl.loss=reinforce has no ratio, but train.num_minibatches x num_epochs = "
            f"{c.train.updates_per_iteration} makes samples stale; use ppo or cispo, or one update"
        )
    if uses_policy and c.rl.loss == "gspo" and c.rl.denominator != "sequences":
        raise ValueError(
            f"rl.loss=gspo has one ratio per completion: set rl.denominator=sequences, not {c.rl.denominator}"
        )
    if c.kd.group_weight != "none" and c.rollout.source == "dataset":
        raise ValueError(f"kd.group_weight={c.kd.group_weight} needs verified completions, not a dataset's")


def _check_source(c: "Config") -> None:
    """What completions of the student, of the teacher and of a dataset can be used for."""
    source = c.rollout.source
    if source == "student":
        if not is_zero(c.sft.coef):
            raise ValueError("sft.coef is not 0, but rollout.source=student has no completions to imitate")
        if not is_zero(c.rl.coef) and c.rollout.group_size < 2:
            raise ValueError("rollout.group_size=1 leaves no group to compare rewards in; use 2 or more")
        return
    if not is_zero(c.rl.coef):
        raise ValueError(f"rl.coef must be 0 with rollout.source={source}: the student sampled nothing")
    if not is_zero(c.kd.coef) and c.kd.estimator in SAMPLED:
        raise ValueError(
            f"kd.estimator={c.kd.estimator} is an expectation over the student's own samples; "
            f"with rollout.source={source} use kd.estimator=full"
        )
    if not is_zero(c.ref.coef):
        raise ValueError(
            f"ref.coef is an expectation over the student's own samples, not rollout.source={source}"
        )
    if source == "teacher":
        if len(c.all_teachers) != 1:
            raise ValueError(f"rollout.source=teacher needs one teacher, and there are {len(c.all_teachers)}")
        return
    if c.kd.mask != "none":
        raise ValueError(f"kd.mask={c.kd.mask} needs verified completions, not rollout.source=dataset")
    if c.data.curriculum is not None:
        raise ValueError("data.curriculum needs verified completions, not rollout.source=dataset")
    if c.rollout.group_size != 1:
        raise ValueError(
            f"rollout.group_size={c.rollout.group_size} with rollout.source=dataset; "
            "data has one completion per prompt, set it to 1"
        )


def _check_ranges(c: "Config") -> None:
    """Values that a schedule must never take."""
    ranges: tuple[tuple[str, Schedule, float, float], ...] = (
        ("rollout.temperature", c.rollout.temperature, 0.0, float("inf")),
        # CISPO's weight may go down to 0; a ratio that is clipped there would never be clipped.
        ("rl.clip_low", c.rl.clip_low, 0.0, float("inf") if c.rl.loss == "cispo" else 1.0),
        ("rl.clip_high", c.rl.clip_high, 0.0, float("inf")),
    )
    for key, schedule, low, high in ranges:
        smallest, largest = bounds(schedule)
        if smallest <= low or largest >= high:
            between = f"above {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
            reaches = smallest if smallest <= low else largest
            warmup = "; a warmup starts at 0" if schedule.warmup_steps else ""
            raise ValueError(f"{key} reaches {reaches:g}, but must stay {between}{warmup}")
    if (lowest := bounds(c.optimizer.learning_rate)[0]) < 0:
        raise ValueError(f"optimizer.learning_rate reaches {lowest:g}: below 0 it would climb the loss")


def _check_counts(c: "Config") -> None:
    r = c.rollout
    if r.length_limit is not None and (
        bounds(r.length_limit)[0] < 1 or bounds(r.length_limit)[1] > r.max_new_tokens
    ):
        low, high = bounds(r.length_limit)
        raise ValueError(
            f"rollout.length_limit goes from {low:g} to {high:g}, but must stay between 1 and "
            f"rollout.max_new_tokens={r.max_new_tokens}"
        )
    if any(not text for text in r.stop):
        raise ValueError("rollout.stop holds an empty text, which every completion begins with")
    if c.eval.min_new_tokens > r.max_new_tokens:
        raise ValueError(
            f"eval.min_new_tokens={c.eval.min_new_tokens} is above rollout.max_new_tokens={r.max_new_tokens}"
        )
    shortest = r.max_new_tokens if r.length_limit is None else bounds(r.length_limit)[0]
    if c.reward.overlong_buffer > shortest:
        name = "max_new_tokens" if r.length_limit is None else "length_limit at its lowest"
        raise ValueError(
            f"reward.overlong_buffer={c.reward.overlong_buffer} is above rollout.{name}={shortest:g}"
        )
    if c.eval.every and not c.data.eval:
        raise ValueError(f"eval.every={c.eval.every} but data.eval names no source")
    if c.checkpoint.keep_best and not (c.data.eval and (c.eval.greedy or c.eval.num_samples)):
        raise ValueError(
            f"checkpoint.keep_best={c.checkpoint.keep_best} ranks by held-out accuracy, and none is "
            "measured: give data.eval, and eval.greedy or eval.num_samples"
        )
    rows = c.train.prompts_per_iteration * c.rollout.group_size
    if rows % c.train.num_minibatches:
        raise ValueError(
            f"{rows} rows (prompts_per_iteration x group_size) do not divide into "
            f"train.num_minibatches={c.train.num_minibatches}"
        )
    if c.groups_per_batch > c.train.prompts_per_iteration and c.train.num_minibatches == c.groups_per_batch:
        raise ValueError(
            f"train.num_minibatches={c.train.num_minibatches} is one for each group, and rl.resample_rounds "
            "beside kd.coef may find fewer: use at most "
            f"train.prompts_per_iteration={c.train.prompts_per_iteration}"
        )
    if c.train.num_steps % c.train.updates_per_iteration:
        raise ValueError(
            f"train.num_steps={c.train.num_steps} ends inside an iteration of "
            f"{c.train.updates_per_iteration} updates (train.num_minibatches x num_epochs); make it a "
            "multiple"
        )
    if c.cache_dir is not None and "://" in c.cache_dir:
        raise ValueError(f"cache_dir={c.cache_dir}: programs are kept on a disk; give a folder, or null")
    if (steps := c.log.profile_steps) is not None and steps[0] >= steps[1]:
        raise ValueError(f"log.profile_steps={list(steps)} holds no step; write [first, last + 1]")
    longest = c.data.max_prompt_tokens + r.max_new_tokens
    if c.train.pack_length is not None and c.train.pack_length < longest:
        raise ValueError(
            f"train.pack_length={c.train.pack_length} has no room for the longest row: "
            f"data.max_prompt_tokens + rollout.max_new_tokens = {longest}; raise it, or leave it out"
        )
    if c.train.pack_length is not None and c.train.pack_length % 128:
        raise ValueError(
            f"train.pack_length={c.train.pack_length} does not divide into blocks of 128 positions; take "
            f"{-(-c.train.pack_length // 128) * 128}"
        )
    if c.train.share_prompts == "always" and c.train.attention == "splash":
        raise ValueError(
            "train.share_prompts=always with train.attention=splash, which sees one run of tokens alone; use "
            "blockwise, or share_prompts=auto"
        )
