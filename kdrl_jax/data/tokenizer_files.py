"""Tokenizers written into a Hugging Face folder, for `transformers.AutoTokenizer` and for our own loader."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What may lie beside any kind of tokenizer. Neither config.json nor generation_config.json: those are the
model's, and whoever writes the weights writes them."""
VOCABULARIES = ("tokenizer.model", "vocab.json", "merges.txt")
"""Further forms of the vocabulary that tokenizer.json holds; older readers take them."""


def copy_files(source: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Copies files that exist, byte for byte; a file that is already in its place stays.

    Args:
        source: the folder they lie in.
        folder: an existing folder.
        names: of the files.
    """
    for name in names:
        if (source / name).is_file():
            copy_file(source / name, folder / name)


def copy_file(source: Path, target: Path) -> None:
    """Copies one file, byte for byte.

    Raises:
        FileNotFoundError: it was there when the tokenizer was read, but is no longer.
    """
    if not source.is_file():
        raise FileNotFoundError(
            f"{source}: gone since the tokenizer was read from it; put it back to save it"
        )
    if not (target.exists() and source.samefile(target)):
        shutil.copyfile(source, target)


def write_settings(
    folder: Path, tokens: Mapping[str, str | None], chat_template: str | None, **settings: Any
) -> None:
    """Writes tokenizer_config.json, and chat_template.jinja if there is a template.

    Args:
        folder: an existing folder.
        tokens: strings of `bos_token`, `eos_token`, `pad_token`, `unk_token`; None where there is none,
            which is written: classes of transformers have defaults of their own, which they would add.
        chat_template: jinja source.
        settings: further keys; `tokenizer_class` at least.
    """
    content = {**settings, "clean_up_tokenization_spaces": False, **tokens}
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8", newline="")
