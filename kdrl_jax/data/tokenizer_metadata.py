"""What Hugging Face writes beside a tokenizer: end tokens, BOS, padding and the chat template."""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclasses.dataclass(frozen=True)
class TokenizerMetadata:
    """The facts a tokenizer's own file does not hold."""

    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Strings of `bos_token`, `eos_token`, `pad_token`, `unk_token`, as far as they are named."""
    added: Mapping[int, tokenizers.AddedToken] = dataclasses.field(default_factory=dict)
    """Added tokens by id, in the order of ids, as tokenizer_config.json and added_tokens.json have them."""
    add_bos: bool | None = None
    """Whether texts begin with BOS; None where it is not said."""
    legacy: bool | None = None
    """SentencePiece only: False where no space is put before text that follows an added token."""
    end_ids: tuple[int, ...] = ()
    """From generation_config.json, or config.json where that names none."""
    chat_template: str | None = None


def read_metadata(folder: Path) -> TokenizerMetadata:
    """Reads tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json (or
    config.json) and chat_template.jinja, as far as they are there.

    Raises:
        ValueError: naming a file that is not what it should be.
    """
    config = _read_json(folder / "tokenizer_config.json")
    special = _read_json(folder / "special_tokens_map.json")
    tokens = {name: _token_string(special.get(name)) for name in _NAMES}
    tokens |= {name: found for name in _NAMES if (found := _token_string(config.get(name)))}
    add_bos = config.get("add_bos_token")
    legacy = config.get("legacy")
    return TokenizerMetadata(
        tokens={name: string for name, string in tokens.items() if string},
        added=_added_tokens(folder, config, special),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        legacy=legacy if isinstance(legacy, bool) else None,
        end_ids=_end_ids(folder),
        chat_template=_chat_template(folder, config),
    )


def _end_ids(folder: Path) -> tuple[int, ...]:
    # Many generation_config.json hold sampling settings alone, or a null.
    for path in (folder / "generation_config.json", folder / "config.json"):
        end = _read_json(path).get("eos_token_id")
        ids = [] if end is None else end if isinstance(end, list) else [end]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise ValueError(f"{path}: eos_token_id must be an id or a list of ids, got {end!r}")
        if ids:
            return tuple(ids)
    return ()


def _added_tokens(
    folder: Path, config: Mapping[str, Any], special_map: Mapping[str, Any]
) -> dict[int, tokenizers.AddedToken]:
    # added_tokens.json is the older form: ids alone, and what is special is named elsewhere.
    special = {_token_string(file.get(name)) for file in (config, special_map) for name in _NAMES}
    for file in (config, special_map):
        more = file.get("additional_special_tokens") or []
        special |= {_token_string(entry) for entry in more}
    path = folder / "added_tokens.json"
    try:
        added = {
            int(i): tokenizers.AddedToken(string, special=string in special, normalized=False)
            for string, i in _read_json(path).items()
        }
        path = folder / "tokenizer_config.json"
        for i, entry in (config.get("added_tokens_decoder") or {}).items():
            if isinstance(entry, str):
                entry = {"content": entry, "special": entry in special}
            flags = {f: bool(entry.get(f)) for f in ("special", "lstrip", "rstrip", "single_word")}
            added[int(i)] = tokenizers.AddedToken(entry["content"], normalized=False, **flags)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: added tokens are not as Hugging Face writes them ({error!r})") from None
    return dict(sorted(added.items()))


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
