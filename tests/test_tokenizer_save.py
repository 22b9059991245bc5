"""Saved tokenizers: transformers and our own loader read the same one back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from test_tokenizer import BPE, CHATML, MODEL, TEXTS, find_smollm2, gguf_values, save_hf
from test_tokenizer_sentencepiece import gemma, llama, mistral, train
from test_tokenizer_tiktoken import write_ranks
from tokenizers import processors

from kdrl_jax.data.chat import render_prompt
from kdrl_jax.data.tokenizer import CharTokenizer, Tokenizer, load_tokenizer
from kdrl_jax.data.tokenizer_gguf import gguf_tokenizer

SAMPLES = [
    *TEXTS,
    "",
    "two  spaces \n\n\n",
    "naïve 你好 🙂 12345, it's\r\n\tdef f(x):\n        return x",
    "a</s>b <|im_end|> c<|eot_id|> <think>d<end> ",
    "<|im_start|>user\nTom<|im_end|>\n <start_of_turn>",
]
PLAIN = ["7+5+9=\n", "".join(map(chr, range(32, 127))), "<end> a <pad>", ""]


def load(folder: Path) -> Tokenizer:
    return load_tokenizer(MODEL, str(folder))


def from_hf(folder: Path) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(BPE.to_str())
    template = [("<|endoftext|>", 0)]
    backend.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, template)
    config = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "pad_token": "<|im_start|>"}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    generation = {"eos_token_id": [2]}
    save_hf(folder, backend, tokenizer_config=config, special_tokens_map={}, generation_config=generation)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "merges.txt").write_text("#version: 0.2\r\n")
    return load(folder)


def from_hf_alone(folder: Path) -> Tokenizer:
    return load(save_hf(folder, generation_config={"eos_token_id": 2}))


def from_gguf(folder: Path) -> Tokenizer:
    values = gguf_values(add_bos_token=True, eot_token_id=0)
    values["tokenizer.ggml.tokens"] += ["<think>"]
    values["tokenizer.ggml.token_type"] += [4]
    return gguf_tokenizer(values, "x.gguf")


def from_gguf_qwen2(folder: Path) -> Tokenizer:
    # As R1-Distill-Qwen: without <|endoftext|>, which Qwen2's class of transformers has by default.
    values = gguf_values(pre="qwen2", unknown_token_id=None)
    values["tokenizer.ggml.tokens"][0] = "<|end▁of▁sentence|>"
    return gguf_tokenizer(values, "x.gguf")


def from_tiktoken(folder: Path) -> Tokenizer:
    write_ranks(folder)
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template, newline="")
    return load(folder)


def from_smollm2(folder: Path) -> Tokenizer:
    if find_smollm2() is None:
        pytest.skip("SmolLM2 GGUF not in models/ nor named by KDRL_SMOLLM2_GGUF")
    return load_tokenizer(MODEL, str(find_smollm2()))


def from_sentencepiece(make: Callable[[Path], Path]) -> Callable[[Path], Tokenizer]:
    return lambda folder: load(make(folder))


KINDS: dict[str, Callable[[Path], Tokenizer]] = {
    "char": lambda folder: CharTokenizer(),
    "hf": from_hf,
    "hf_alone": from_hf_alone,
    "gguf": from_gguf,
    "gguf_qwen2": from_gguf_qwen2,
    "smollm2": from_smollm2,
    "tiktoken": from_tiktoken,
    "llama": from_sentencepiece(llama),
    "gemma": from_sentencepiece(gemma),
    "mistral": from_sentencepiece(mistral),
    "model_alone": from_sentencepiece(train),
    "model_alone_no_prefix": from_sentencepiece(lambda folder: train(folder, add_dummy_prefix=False)),
}
MODEL_TYPE = {"gguf": "qwen3", "gguf_qwen2": "qwen2", "gemma": "gemma3_text"}


@pytest.mark.parametrize("kind", KINDS)
def test_read_back(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "saved").mkdir()
    ours, folder = KINDS[kind](tmp_path / "source"), tmp_path / "saved"
    ours.save(folder)
    assert not {"config.json", "generation_config.json"} & {file.name for file in folder.iterdir()}
    # What an exporter writes with the weights.
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ours.end_ids)}))
    (folder / "config.json").write_text(json.dumps({"model_type": MODEL_TYPE.get(kind, "llama")}))
    check_same(ours, load(folder), kind)
    check_transformers(ours, transformers.AutoTokenizer.from_pretrained(folder), kind)


@pytest.mark.parametrize("kind", ["gguf", "tiktoken"])
def test_bos_is_in_tokenizer_json_too(kind: str, tmp_path: Path) -> None:
    # Readers of tokenizer.json alone, and transformers before 5, know no add_bos_token.
    ours = KINDS[kind](tmp_path / "source")
    ours.save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert backend.encode("Tom").ids == [ours.bos_id, *ours.encode("Tom")]


def check_same(ours: Tokenizer, again: Tokenizer, kind: str) -> None:
    for name in ("vocab_size", "pad_id", "end_ids", "bos_id", "chat_template", "special_ids"):
        assert getattr(again, name) == getattr(ours, name), name
    assert again.token_strings() == ours.token_strings()
    for text in PLAIN if kind == "char" else SAMPLES:
        assert again.encode(text) == ours.encode(text)
        if kind != "char":
            assert again.encode(text, special=True) == ours.encode(text, special=True)
        assert again.decode(ours.encode(text)) == ours.decode(ours.encode(text))


def check_transformers(ours: Tokenizer, theirs: Any, kind: str) -> None:
    assert len(theirs) == ours.vocab_size
    assert theirs.chat_template == ours.chat_template
    if kind not in ("llama", "mistral"):  # whose own files name none, or the end token
        assert theirs.pad_token_id == (ours.pad_id if ours.pad_id in ours.special_ids else None)
    assert theirs.eos_token_id == ours.end_ids[0]
    for text in PLAIN if kind == "char" else SAMPLES:
        ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text) == ids
        assert theirs.decode(ids) == ours.decode(ids)
        with_bos = theirs.encode(text, split_special_tokens=True)
        assert with_bos == [*([] if ours.bos_id is None else [ours.bos_id]), *ids]
        parsed = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, special=True) == parsed
        assert theirs.decode(parsed, skip_special_tokens=True) == ours.decode(parsed)
    if ours.chat_template is not None:
        chat = [{"role": "user", "content": "Hello Tom"}]
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ids == render_prompt(ours, "Hello Tom", "{question}", "auto")


def test_huggingface_files_are_copied_as_they_were(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "saved"
    folder.mkdir()
    tokenizer = from_hf(source)
    text = json.dumps(json.loads((source / "tokenizer.json").read_text()), indent=7)
    (source / "tokenizer.json").write_text(text)  # as no library writes it
    tokenizer.save(folder)
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
    assert {file.name for file in folder.iterdir()} == names | {"merges.txt"}
    for file in folder.iterdir():
        assert file.read_bytes() == (source / file.name).read_bytes()
    tokenizer.save(source)  # over itself
    assert (source / "tokenizer.json").read_text() == text
    (source / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: gone since"):
        tokenizer.save(folder)


def test_a_file_of_another_name(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    file = (llama(tmp_path / "source") / "tokenizer.model").rename(tmp_path / "source" / "v3.model")
    tokenizer = load(file.parent)
    tokenizer.save(tmp_path / "saved")
    names = {saved.name for saved in (tmp_path / "saved").iterdir()}
    assert names == {"tokenizer.model", "tokenizer_config.json"}
    assert (tmp_path / "saved/tokenizer.model").read_bytes() == file.read_bytes()


def test_a_unigram_model_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    tokenizer = load(train(tmp_path / "source", model_type="unigram", vocab_size=290))
    with pytest.raises(ValueError, match=r"unigram model without tokenizer_config\.json"):
        tokenizer.save(tmp_path / "saved")
    assert not list((tmp_path / "saved").iterdir())


def test_an_unknown_character_stays_an_error(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    CharTokenizer().save(tmp_path)
    with pytest.raises(Exception, match="UNK"):
        transformers.AutoTokenizer.from_pretrained(tmp_path).encode("é")
