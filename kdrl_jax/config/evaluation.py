"""Which settings decide the numbers of a held-out evaluation: only those of the same ones are compared."""

import hashlib
import json
from typing import Any

from kdrl_jax.config.schema import Config

_DECIDE = {
    "data": ("eval", "prompt_template", "max_prompt_tokens"),
    "rollout": ("max_new_tokens", "stop", "cache_dtype"),
    "reward": ("verifier", "pattern", "time_limit_s"),
    "eval": ("num_prompts", "greedy", "num_samples", "temperature", "top_k", "top_p", "min_new_tokens"),
}
"""By section. What a file of questions holds, or a checkpoint of another run, is not looked at."""


def evaluation_settings(config: Config) -> dict[str, Any]:
    """All that decides what an evaluation finds: the questions, how they are answered and judged, and the
    models as the config has them. Nested as in a config, and JSON-able."""
    tree = config.model_dump(mode="json")
    found = {name: tree[name] for name in ("seed", "student", "teacher", "teachers", "tokenizer")}
    found |= {section: {key: tree[section][key] for key in keys} for section, keys in _DECIDE.items()}
    found["eval"]["agreement"] = config.eval.agreement
    return found


def settings_digest(settings: dict[str, Any]) -> str:
    """Eight hexadecimal digits: the same for the same settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def model_digest(config: Config, role: str) -> str:
    """Of what decides how one model answers, and the verdicts: without the other models, and whether they are
    compared.

    Args:
        role: `student`, or one of `Config.all_teachers`.
    """
    settings = evaluation_settings(config)
    del settings["eval"]["agreement"]
    models = {"student": settings.pop("student"), "teacher": settings.pop("teacher")}
    models |= {f"teachers.{name}": model for name, model in settings.pop("teachers").items()}
    return settings_digest(settings | {"model": models[role]})
