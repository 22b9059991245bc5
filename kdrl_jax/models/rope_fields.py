"""The RoPE settings of config.json: `rope_theta` and `rope_scaling`, or `rope_parameters` in newer files."""

import math
from collections.abc import Mapping
from typing import Any

from kdrl_jax.models.rope import Rope

Fields = Mapping[str, Any]

# Kind -> the settings it has besides `rope_type`, `rope_theta` and `partial_rotary_factor`.
_SETTINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    # Of these two, transformers reads no original length.
    "linear": ("factor", "original_max_position_embeddings"),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


def positive(name: str, value: Any) -> float:
    """A number above 0; raises ValueError with the name and value of anything else."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}; it has to be a positive number")
    return float(value)


def rope_from_hf(fields: Fields, default_theta: float = 10000.0) -> Rope:
    """How a config.json turns queries and keys.

    Raises:
        ValueError: naming settings that are not supported, absent, out of range, or in contradiction.
    """
    settings: dict[str, Any] = {}
    sources = {"": {"rope_theta": fields.get("rope_theta")}}
    for name in ("rope_scaling", "rope_parameters"):
        given = fields.get(name)
        if given is not None and not isinstance(given, Mapping):
            raise ValueError(f"{name}={given!r}; it has to be an object")
        sources[f"{name}."] = dict(given or {})
    seen: dict[str, str] = {}
    for prefix, source in sources.items():
        # `type` is the older spelling of `rope_type`.
        for name, value in source.items():
            plain = "rope_type" if name == "type" else name
            if value is None:
                continue
            if plain in settings and settings[plain] != value:
                raise ValueError(
                    f"{seen[plain]}={settings[plain]!r} and {prefix}{name}={value!r} contradict each other; "
                    "keep the one the model was trained with"
                )
            settings[plain] = value
            seen[plain] = prefix + name
    return _rope(settings, seen, fields, default_theta)


def _rope(settings: dict[str, Any], seen: Mapping[str, str], fields: Fields, default_theta: float) -> Rope:
    kind = settings.pop("rope_type", "default")
    if kind == "mrope" or kind not in _SETTINGS:
        where = seen["rope_type"]
        raise ValueError(f"{where}={kind!r} not supported; supported are {', '.join(_SETTINGS)}")
    if settings.pop("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{seen['partial_rotary_factor']} below 1 not supported; use a model without")
    theta = positive(seen.get("rope_theta", "rope_theta"), settings.pop("rope_theta", default_theta))
    unknown = [f"{seen[name]}={value!r}" for name, value in settings.items() if name not in _SETTINGS[kind]]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} not supported with RoPE of type {kind}; use a model without")
    if kind == "default":
        return Rope(theta)

    def number(name: str, default: float | None = None) -> float:
        value = settings.get(name, default)
        return positive(seen.get(name, f"rope_scaling.{name}"), value)

    positions = int(positive("max_position_embeddings", fields.get("max_position_embeddings")))
    if kind == "linear":
        return Rope(theta, kind, number("factor"))
    if kind == "dynamic":
        return Rope(theta, kind, number("factor"), positions)
    # The top-level spelling wins, as in transformers.
    outer = fields.get("original_max_position_embeddings")
    original = int(number("original_max_position_embeddings", positions) if outer is None else outer)
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if low >= high:
            raise ValueError(f"low_freq_factor={low} has to be below high_freq_factor={high}")
        return Rope(theta, kind, number("factor"), original, low_freq_factor=low, high_freq_factor=high)
    factor = number("factor", positions / original)
    return Rope(
        theta,
        kind,
        factor,
        original,
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        truncate=bool(settings.get("truncate", True)),
        attention_factor=_attention_factor(settings, factor),
    )


def _attention_factor(settings: Mapping[str, Any], factor: float) -> float:
    """YaRN's temperature (arXiv 2309.00071, equation 22), or the one given."""
    if settings.get("attention_factor") is not None:
        return positive("rope_scaling.attention_factor", settings["attention_factor"])

    def grown(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    over, under = settings.get("mscale"), settings.get("mscale_all_dim")
    return grown(over) / grown(under) if over and under else grown(1.0)


def rope_to_hf(rope: Rope) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which old and new readers know; inverts `rope_from_hf`."""
    if rope.kind == "default":
        return {"rope_theta": rope.theta}
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_positions
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        scaling |= {
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "attention_factor": rope.attention_factor,
        }
        if not rope.truncate:
            scaling["truncate"] = False
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
