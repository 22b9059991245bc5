"""Tokenizers: round trips, end and padding ids, chat templates, and one vocabulary for two models."""

import builtins
import json
import os
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from kdrl_jax.config.models import TokenizerConfig
from kdrl_jax.data.chat import render_prompt
from kdrl_jax.data.tokenizer import CharTokenizer, Tokenizer, load_tokenizer
from kdrl_jax.data.tokenizer_gguf import gguf_tokenizer, load_gguf_tokenizer
from kdrl_jax.data.tokenizer_hf import HFTokenizer
from kdrl_jax.data.tokenizer_metadata import TokenizerMetadata, choose_pad_id

REPO = Path(__file__).parents[1]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = ["How many apples does Tom have now?", "3 + 4 = 7 and 7 + 2 = 9", "user assistant system"]
MODEL = TokenizerConfig()


def train_bpe() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return backend


BPE = train_bpe()


def save_hf(folder: Path, backend: tokenizers.Tokenizer = BPE, **files: Any) -> Path:
    """A Hugging Face folder; keyword `tokenizer_config={...}` becomes tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def load_hf(folder: Path, **files: Any) -> Tokenizer:
    files.setdefault("tokenizer_config", {"eos_token": "<|im_end|>"})
    return load_tokenizer(MODEL, str(save_hf(folder, **files)))


def gguf_values(**changes: Any) -> dict[str, Any]:
    """What a GGUF file made from `BPE` holds."""
    model = json.loads(BPE.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [3 if t in SPECIAL else 1 for t in tokens],
        "merges": [" ".join(m) for m in model["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 2,
        **changes,
    }
    return {"tokenizer.chat_template": CHATML} | {
        f"tokenizer.ggml.{k}": v for k, v in values.items() if v is not None
    }


def hf_in_memory() -> Tokenizer:
    metadata = TokenizerMetadata(tokens={"eos_token": "<|im_end|>"})
    return HFTokenizer(tokenizers.Tokenizer.from_str(BPE.to_str()), metadata, "tokenizer.json")


ROUND_TRIP: tuple[Tokenizer, ...] = (hf_in_memory(), gguf_tokenizer(gguf_values(), "x.gguf"))


class TestChar:
    def test_round_trip(self) -> None:
        tokenizer = CharTokenizer()
        text = "7+5+9=\n" + "".join(map(chr, range(32, 127)))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert max(ids) < tokenizer.vocab_size == len(tokenizer.token_strings()) == 98
        assert [tokenizer.token_strings()[i] for i in ids] == list(text)

    def test_special_ids_are_silent_and_apart(self) -> None:
        tokenizer = CharTokenizer()
        assert tokenizer.pad_id not in tokenizer.end_ids
        ids = [*tokenizer.encode("12"), *tokenizer.end_ids, tokenizer.pad_id, 98, 500, -1]
        assert tokenizer.decode(ids) == "12"
        assert tokenizer.decode(tokenizer.encode("<end>", special=True)) == "<end>"
        assert tokenizer.special_ids == {tokenizer.pad_id, *tokenizer.end_ids}

    @pytest.mark.parametrize("char", ["é", "\t", "\x7f", "🙂"])
    def test_unknown_character_is_named(self, char: str) -> None:
        with pytest.raises(ValueError, match=f"U\\+{ord(char):04X}"):
            CharTokenizer().encode("7+" + char)


class TestHF:
    @settings(max_examples=200, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def test_round_trip_of_any_text(self, text: str) -> None:
        for tokenizer in ROUND_TRIP:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert not set(ids) & {0, 1, 2}

    def test_special_strings_in_plain_text_stay_text(self, tmp_path: Path) -> None:
        tokenizer = load_hf(tmp_path)
        text = "a<|im_end|>b"
        assert 2 not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        parsed = tokenizer.encode(text, special=True)
        assert parsed.count(2) == 1
        assert tokenizer.decode(parsed) == "ab"
        assert 2 not in tokenizer.encode(text), "the switch must not stick"
        assert "<|im_end|>" in tokenizer.special_strings
        assert tokenizer.special_ids == {0, 1, 2}

    def test_end_ids_come_from_all_files(self, tmp_path: Path) -> None:
        tokenizer = load_hf(tmp_path, generation_config={"eos_token_id": [0, 2]})
        assert tokenizer.end_ids == (2, 0)  # the tokenizer's own first: it is what ends a turn
        assert tokenizer.pad_id not in (0, 2)
        one = load_hf(tmp_path, generation_config={"eos_token_id": 0}, tokenizer_config={})
        assert one.end_ids == (0,)
        (tmp_path / "generation_config.json").unlink()
        mapped = load_hf(
            tmp_path, tokenizer_config={}, special_tokens_map={"eos_token": {"content": "<|im_end|>"}}
        )
        assert mapped.end_ids == (2,)

    @pytest.mark.parametrize(
        ("generation", "config", "expected"),
        [
            (0, 1, (2, 0)),
            ([0, 2], None, (2, 0)),
            ([1, 0], None, (2, 1, 0)),
            (None, None, (2,)),
            ([], 0, (2, 0)),
            (None, [0, 1], (2, 0, 1)),  # sampling settings alone: the model's config knows
        ],
    )
    def test_end_ids_as_they_are_written(
        self, tmp_path: Path, generation: Any, config: Any, expected: tuple[int, ...]
    ) -> None:
        files = {"generation_config": {"eos_token_id": generation}, "config": {"eos_token_id": config}}
        tokenizer = load_hf(tmp_path, **files)
        assert tokenizer.end_ids == expected
        assert tokenizer.pad_id not in expected
        del files["generation_config"]["eos_token_id"]
        if generation is None:
            assert load_hf(tmp_path, **files).end_ids == expected

    @pytest.mark.parametrize("bad", ["<|im_end|>", [2, None], True, 2.0])
    def test_end_ids_that_are_none(self, tmp_path: Path, bad: Any) -> None:
        with pytest.raises(
            ValueError, match=r"generation_config\.json: eos_token_id must be an id or a list"
        ):
            load_hf(tmp_path, generation_config={"eos_token_id": bad})

    def test_no_or_impossible_end_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"tokenizer\.json: no end token .* generation_config\.json"):
            load_hf(tmp_path, tokenizer_config={})
        with pytest.raises(ValueError, match=r"end ids \[99999\] are not in its vocabulary"):
            load_hf(tmp_path, generation_config={"eos_token_id": [99999]})
        with pytest.raises(ValueError, match=r"eos_token '</s>' .* not in the vocabulary"):
            load_hf(tmp_path, tokenizer_config={"eos_token": "</s>"})

    def test_pad_is_never_an_end(self, tmp_path: Path) -> None:
        own = load_hf(tmp_path, tokenizer_config={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
        assert own.pad_id == 0
        files = {"tokenizer_config": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}}
        by_generation = load_hf(tmp_path, generation_config={"eos_token_id": [2, 0]}, **files)
        assert by_generation.pad_id == 1
        (tmp_path / "generation_config.json").unlink()
        base = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}  # Qwen's base models
        assert load_hf(tmp_path, tokenizer_config=base).pad_id == 2
        same = load_hf(
            tmp_path,
            tokenizer_config={
                "eos_token": "<|im_end|>",
                "pad_token": "<|im_end|>",
                "unk_token": "<|endoftext|>",
            },
        )
        assert same.pad_id == 0

    def test_choice_of_pad(self) -> None:
        special = {0: "<|endoftext|>", 5: "<|im_end|>", 7: "<|fim_pad|>"}
        assert choose_pad_id(3, 4, special, {5}, 10) == 3
        assert choose_pad_id(5, 4, special, {5}, 10) == 7
        assert choose_pad_id(None, 4, {0: "<s>"}, {5}, 10) == 4
        assert choose_pad_id(None, None, {0: "<|endoftext|>"}, {0}, 10) == 9
        with pytest.raises(ValueError, match="all 1 tokens are end tokens"):
            choose_pad_id(0, None, {}, {0}, 1)

    def test_borrowed_pad_still_decodes_as_text(self, tmp_path: Path) -> None:
        tokenizer = load_hf(
            tmp_path, tokenizer_config={"eos_token": "<|im_end|>"}, generation_config={"eos_token_id": [0, 1]}
        )
        assert tokenizer.pad_id == tokenizer.vocab_size - 1
        assert tokenizer.decode([tokenizer.pad_id]) != ""

    def test_saved_truncation_and_padding_are_off(self, tmp_path: Path) -> None:
        backend = tokenizers.Tokenizer.from_str(BPE.to_str())
        backend.enable_truncation(3)
        backend.enable_padding(length=16)
        tokenizer = load_hf(tmp_path, backend=backend)
        assert tokenizer.decode(tokenizer.encode("x" * 9)) == "x" * 9
        assert len(tokenizer.encode("x")) == 1

    def test_ids_that_do_not_fit_together_are_refused(self, tmp_path: Path) -> None:
        added = {"7": {"content": "<|im_end|>"}}
        with pytest.raises(ValueError, match=r"'<\|im_end\|>' has id 2, but 7 in tokenizer_config"):
            load_hf(tmp_path, tokenizer_config={"eos_token": "<|im_end|>", "added_tokens_decoder": added})

    def test_tokens_that_only_the_other_files_have(self, tmp_path: Path) -> None:
        size = BPE.get_vocab_size()
        config: dict[str, Any] = {"eos_token": "<|im_end|>"}
        config["added_tokens_decoder"] = {str(size): {"content": "<tool>", "special": True}}
        tokenizer = load_hf(tmp_path, tokenizer_config=config, added_tokens={"<think>": size + 1})
        assert tokenizer.vocab_size == size + 2
        assert tokenizer.special_ids == {0, 1, 2, size}
        assert tokenizer.encode("<tool>", special=True) == [size]
        assert size not in tokenizer.encode("<tool>")
        assert tokenizer.encode("<think>") == [size + 1]
        assert tokenizer.decode([size, size + 1]) == "<think>"
        with pytest.raises(ValueError, match=rf"'<think>' has id {size + 1}, but {size + 4} in"):
            load_hf(tmp_path, tokenizer_config=config, added_tokens={"<think>": size + 4})

    def test_bos(self, tmp_path: Path) -> None:
        assert load_hf(tmp_path).bos_id is None
        named = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
        assert load_hf(tmp_path, tokenizer_config=named).bos_id is None
        assert load_hf(tmp_path, tokenizer_config=named | {"add_bos_token": True}).bos_id == 0
        backend = tokenizers.Tokenizer.from_str(BPE.to_str())
        backend.post_processor = processors.TemplateProcessing(
            "<|endoftext|> $A", None, [("<|endoftext|>", 0)]
        )
        tokenizer = load_hf(tmp_path, backend=backend, tokenizer_config=named)
        assert tokenizer.bos_id == 0
        assert tokenizer.encode("a") == BPE.encode("a").ids, "encode adds nothing"

    def test_template_files(self, tmp_path: Path) -> None:
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
        config = {"eos_token": "<|im_end|>", "chat_template": named}
        assert load_hf(tmp_path, tokenizer_config=config).chat_template == "yes"
        with pytest.raises(ValueError, match=r"chat templates \['tool_use'\], none of them 'default'"):
            load_hf(tmp_path, tokenizer_config=config | {"chat_template": named[:1]})
        (tmp_path / "chat_template.jinja").write_text("file")
        assert load_hf(tmp_path, tokenizer_config=config).chat_template == "file"

    def test_missing_or_broken_files(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor .*tokenizer\.kind='file'"):
            load_tokenizer(MODEL, str(tmp_path))
        with pytest.raises(FileNotFoundError, match=r"no such file or folder \(looked at /"):
            load_tokenizer(TokenizerConfig(kind="file", path="nowhere/tokenizer.json"), None)
        with pytest.raises(ValueError, match=r"tokenizer\.kind to 'char'"):
            load_tokenizer(MODEL, None)
        (tmp_path / "a.txt").write_text("")
        with pytest.raises(ValueError, match="expected a folder"):
            load_tokenizer(MODEL, str(tmp_path / "a.txt"))
        for name in ("tokenizer.json", "a.model", "a.gguf"):
            (tmp_path / name).write_text("{}")
            with pytest.raises(ValueError, match=name):
                load_tokenizer(MODEL, str(tmp_path / name))
        save_hf(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text("{")
        with pytest.raises(ValueError, match=r"tokenizer_config\.json: not JSON"):
            load_tokenizer(MODEL, str(tmp_path))


class TestGGUF:
    def test_same_as_the_tokenizer_it_was_made_from(self) -> None:
        tokenizer = gguf_tokenizer(gguf_values(), "x.gguf")
        text = "Tom has 3456 apples\n\n and  naïve 你好 🙂 it's<|im_end|>"
        assert tokenizer.encode(text, special=True) == BPE.encode(text).ids
        assert tokenizer.end_ids == (2,)
        assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.chat_template) == (0, None, CHATML)
        assert tokenizer.token_strings() == gguf_values()["tokenizer.ggml.tokens"]

    def test_digits_are_single(self) -> None:
        values = gguf_values()
        values["tokenizer.ggml.tokens"] += ["12"]
        values["tokenizer.ggml.token_type"] += [1]
        values["tokenizer.ggml.merges"] += ["1 2"]
        assert len(gguf_tokenizer(values, "x.gguf").encode("12")) == 2
        values["tokenizer.ggml.pre"] = "gpt-2"
        assert len(gguf_tokenizer(values, "x.gguf").encode("12")) == 1

    def test_turn_ends_and_unused_tokens(self) -> None:
        values = gguf_values(eot_token_id=0, add_bos_token=True)
        size = len(values["tokenizer.ggml.tokens"])
        values["tokenizer.ggml.tokens"] += ["<think>", "[PAD301]"]
        values["tokenizer.ggml.token_type"] += [4, 5]
        tokenizer = gguf_tokenizer(values, "x.gguf")
        assert tokenizer.end_ids == (2, 0)
        assert tokenizer.bos_id == 1
        assert tokenizer.vocab_size == size + 1
        # A user-defined token is a token in any text, and is text itself.
        assert tokenizer.encode("<think>") == [size]
        assert tokenizer.decode([size, 2]) == "<think>"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model": "llama"}, "model='llama' .* is not supported"),
            ({"pre": "tekken"}, "pre='tekken' is not supported .*'smollm'"),
            ({"tokens": None}, r"no tokenizer\.ggml\.tokens; set tokenizer\.kind='file'"),
            ({"eos_token_id": None}, "no end token"),
        ],
    )
    def test_unsupported_is_refused_by_name(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=f"x.gguf: .*{message}"):
            gguf_tokenizer(gguf_values(**changes), "x.gguf")

    def test_read_from_a_file(self, tmp_path: Path) -> None:
        gguf = pytest.importorskip("gguf")
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        values = gguf_values()
        writer.add_token_list(values["tokenizer.ggml.tokens"])
        writer.add_token_types(values["tokenizer.ggml.token_type"])
        writer.add_token_merges(values["tokenizer.ggml.merges"])
        writer.add_eos_token_id(2)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        tokenizer = load_tokenizer(MODEL, str(tmp_path / "a.gguf"))
        assert tokenizer.encode(TEXTS[0]) == BPE.encode(TEXTS[0]).ids
        assert tokenizer.token_strings() == load_hf(tmp_path / "hf").token_strings()

    def test_missing_package_says_what_to_install(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = builtins.__import__

        def without_gguf(name: str, *args: Any, **kwargs: Any) -> Any:
            if name == "gguf":
                raise ImportError(name)
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without_gguf)
        with pytest.raises(ImportError, match=r"pip install 'kdrl_jax\[gguf\]'"):
            load_gguf_tokenizer(tmp_path / "a.gguf")


def find_smollm2() -> Path | None:
    named = os.environ.get("KDRL_SMOLLM2_GGUF")
    found = [Path(named)] if named else sorted((REPO / "models").rglob("SmolLM2-135M-Instruct*.gguf"))
    return found[0] if found else None


@pytest.mark.skipif(
    find_smollm2() is None, reason="SmolLM2 GGUF not in models/ nor named by KDRL_SMOLLM2_GGUF"
)
def test_smollm2() -> None:
    tokenizer = load_tokenizer(MODEL, str(find_smollm2()))
    assert (tokenizer.vocab_size, tokenizer.end_ids, tokenizer.pad_id, tokenizer.bos_id) == (
        49152,
        (2,),
        0,
        None,
    )
    # Ids of transformers 5.23 for the same file.
    text = "Hello world 12345, it's  naïve 你好 🙂\n\n\tx<|im_end|> y"
    ids = [19556, 905, 216, 33, 34, 35, 36, 37, 28, 357, 506, 216, 15486, 46494, 216, 18645, 250, 48392, 138]
    ids += [47526, 1116, 197, 104, 2, 329]
    assert tokenizer.encode(text, special=True) == ids
    prompt = render_prompt(tokenizer, "What is 2+3?", "{question}", "auto")
    system = [
        1,
        9690,
        198,
        2683,
        359,
        253,
        5356,
        5646,
        11173,
        3365,
        3511,
        308,
        34519,
        28,
        7018,
        411,
        407,
        19712,
        8182,
    ]
    turn = [2, 198, 1, 4093, 198, 1780, 314, 216, 34, 27, 35, 47, 2, 198, 1, 520, 9531, 198]
    assert prompt == system + turn
