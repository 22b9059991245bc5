"""What Hugging Face writes beside a tokenizer: end tokens, BOS, padding and the chat template."""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclasses.dataclass(frozen=True)
class TokenizerMetadata:
    """The facts a tokenizer's own file does not hold."""

    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Strings of `bos_token`, `eos_token`, `pad_token`, `unk_token`, as far as they are named."""
    added_ids: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Ids of added tokens as tokenizer_config.json has them."""
    add_bos: bool | None = None
    """Whether texts begin with BOS; None where it is not said."""
    end_ids: tuple[int, ...] = ()
    """From generation_config.json, or config.json where there is none."""
    chat_template: str | None = None


def read_metadata(folder: Path) -> TokenizerMetadata:
    """Reads tokenizer_config.json, special_tokens_map.json, generation_config.json (or config.json) and
    chat_template.jinja, as far as they are there.

    Raises:
        ValueError: naming a file that is not what it should be.
    """
    config = _read_json(folder / "tokenizer_config.json")
    special = _read_json(folder / "special_tokens_map.json")
    tokens = {name: _token_string(special.get(name)) for name in _NAMES}
    tokens |= {name: found for name in _NAMES if (found := _token_string(config.get(name)))}
    generation = folder / "generation_config.json"
    if not generation.is_file():
        generation = folder / "config.json"
    end = _read_json(generation).get("eos_token_id")
    end_ids = [] if end is None else end if isinstance(end, list) else [end]
    if not all(isinstance(i, int) for i in end_ids):
        raise ValueError(f"{generation}: eos_token_id must be an id or a list of ids, got {end!r}")
    added = config.get("added_tokens_decoder") or {}
    add_bos = config.get("add_bos_token")
    return TokenizerMetadata(
        tokens={name: string for name, string in tokens.items() if string},
        added_ids={_token_string(entry) or "": int(i) for i, entry in added.items()},
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        end_ids=tuple(end_ids),
        chat_template=_chat_template(folder, config),
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); fetch the file again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object; fetch the file again")
    return content


def _token_string(entry: Any) -> str | None:
    # A token is written as its string, or as an object with the string in `content`.
    return entry.get("content") if isinstance(entry, dict) else entry


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t["name"]: t["template"] for t in template}
        if "default" not in named:
            raise ValueError(
                f"{folder / 'tokenizer_config.json'}: chat templates {sorted(named)}, none of them "
                "'default'; put the one to use into chat_template.jinja"
            )
        return named["default"]
    return template


def ordered_end_ids(place: str, candidates: Sequence[int | None], vocab_size: int) -> tuple[int, ...]:
    """End ids without doubles, in the order given.

    Raises:
        ValueError: none at all, or one that the tokenizer does not have.
    """
    ids = tuple(dict.fromkeys(i for i in candidates if i is not None))
    if not ids:
        raise ValueError(
            f"{place}: no end token is named, so completions could not end; add eos_token_id to "
            "generation_config.json or eos_token to tokenizer_config.json"
        )
    if outside := [i for i in ids if not 0 <= i < vocab_size]:
        raise ValueError(f"{place}: end ids {outside} are not in its vocabulary of {vocab_size} tokens")
    return ids


def choose_pad_id(
    pad_id: int | None,
    unk_id: int | None,
    special: Mapping[int, str],
    end_ids: Collection[int],
    vocab_size: int,
) -> int:
    """A padding id that is no end id.

    Many tokenizers name no pad, or their end token as pad. Lengths, not ids, tell padding from text, so
    any id will do that cannot be taken for an ending: the named pad, a special token made for padding or
    reserved, the unknown token, another special token, and at last the highest id.

    Args:
        pad_id, unk_id: as the tokenizer names them.
        special: special tokens by id.
        end_ids: ids to keep away from.
        vocab_size: number of ids.

    Raises:
        ValueError: every id is an end id.
    """
    spare = [
        i for i, s in special.items() if any(word in s.lower() for word in ("pad", "reserved", "unused"))
    ]
    others = sorted(special, reverse=True)
    for candidate in (pad_id, *sorted(spare), unk_id, *others, *range(vocab_size - 1, -1, -1)):
        if candidate is not None and 0 <= candidate < vocab_size and candidate not in end_ids:
            return candidate
    raise ValueError(f"all {vocab_size} tokens are end tokens; mend eos_token_id in generation_config.json")
