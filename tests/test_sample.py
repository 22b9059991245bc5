"""The `sample` command: what it prints is the model's completion, as it comes and whole."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import yaml
from make_golden import GOLDEN

from kdrl_jax import sharding
from kdrl_jax.checkpoint import Checkpoints
from kdrl_jax.config import MeshConfig, SampleOptions, load_config, load_run_config, save_config
from kdrl_jax.data.tokenizer import CharTokenizer
from kdrl_jax.data.tokenizer_hf import HFTokenizer
from kdrl_jax.data.tokenizer_metadata import TokenizerMetadata
from kdrl_jax.main import main
from kdrl_jax.models.decoder import DecoderConfig, make_model
from kdrl_jax.models.head import head_logits
from kdrl_jax.rollout.engine import Engine
from kdrl_jax.rollout.sampling import SamplerSettings
from kdrl_jax.rollout.settings import EngineSettings
from kdrl_jax.sample import TextStream, make_engine
from kdrl_jax.setup import make_setup, make_single
from kdrl_jax.types import Prompts

ROOT = Path(__file__).parents[1]
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TREE = {
    "name": "tiny",
    "student": {"architecture": SHAPE},
    "tokenizer": {"kind": "char"},
    "data": {
        "train": [{"kind": "task", "task": "chain_sum"}],
        "max_prompt_tokens": 8,  # of training; a sample's prompt may be longer
        "prompt_template": "Q: {question} A:",
    },
    "rollout": {"group_size": 2, "max_new_tokens": 24},
    "train": {"num_steps": 3, "prompts_per_iteration": 8},
    "mesh": {"data": 8},
}
PROMPT = "7+5 and 3+4, which is more? = a: [b"


def write_config(folder: Path, **sections: object) -> Path:
    path = folder / "config_in.yaml"
    path.write_text(yaml.safe_dump(TREE | sections))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints of steps 2 and 3 that answer differently."""
    folder = tmp_path_factory.mktemp("sampled")
    config = load_config(write_config(folder), [f"log.dir={folder / 'run'}"])
    checkpoints = Checkpoints(folder / "run", write=True)
    for step in (2, 3):
        setup = make_setup(config.model_copy(update={"seed": 10 + step}))
        checkpoints.save(step, setup.init_state(), {})
    checkpoints.close()
    save_config(config, folder / "run")
    return folder / "run"


def sampled(capsys, path, *words, prompt=PROMPT):
    status = main(["sample", "--config", str(path), f"prompt={prompt}", *words])
    out, err = capsys.readouterr()
    assert status == 0, err
    assert len(err.splitlines()) == 1
    return out, err


def greedy_reference(path, step=None):
    """The most likely continuation by whole forward passes: no cache, no engine."""
    config = load_config(path / "config.yaml", ["mesh.data=8"])
    single = make_single(config, "student")
    model, params = single.model, single.params(str(path), step)
    tokenizer = CharTokenizer()
    num_tokens = tokenizer.vocab_size
    ids = tokenizer.encode(TREE["data"]["prompt_template"].replace("{question}", PROMPT))

    @jax.jit
    def forward(rows):
        decoder = model.bind(params)
        return head_logits(
            decoder.hidden(rows), decoder.output_head(), num_tokens=num_tokens, temperature=1.0
        )

    start = len(ids)
    while len(ids) < start + 24 and ids[-1] not in tokenizer.end_ids:
        row = jnp.asarray([ids + [0] * (128 - len(ids))])
        ids.append(int(jnp.argmax(forward(row)[0, len(ids) - 1])))
    return tokenizer.decode(ids[start:]), ids[-1] in tokenizer.end_ids, len(ids) - start


def test_greedy_is_the_most_likely_continuation_of_the_checkpoint(run, capsys):
    texts = []
    for step in (2, 3):
        text, ended, num_tokens = greedy_reference(run, step)
        out, err = sampled(capsys, run, "greedy=true", *([f"step={step}"] if step != 3 else []))
        assert out == text
        assert err.startswith(f"{num_tokens} tokens, {'ended' if ended else 'cut at rollout.max_new_tokens'}")
        texts.append(text)
    assert texts[0] != texts[1]
    assert main(["sample", "--config", str(run), "prompt=x", "step=1"]) == 2
    assert "there are 2, 3" in capsys.readouterr().err


def test_the_seed_and_the_sampler_are_honoured(run, capsys):
    drawn = [sampled(capsys, run, *words)[0] for words in ([], [], ["seed=1"], ["eval.top_k=1"])]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[3] == sampled(capsys, run, "greedy=true")[0] != drawn[0]
    words = ["eval.top_k=3", "eval.top_p=0.5", "rollout.temperature=0.7", "rollout.max_new_tokens=9"]
    config = load_run_config(run, words)
    engine = make_engine(config, SampleOptions(prompt=""), make_single(config, "student"), num_tokens=65)
    assert engine.settings.sampler == SamplerSettings(top_k=3, top_p=0.5)
    assert (engine.settings.max_prompt_tokens, engine.settings.max_new_tokens) == (128, 9)


def test_standard_input_is_the_same_prompt(run, capsys, monkeypatch):
    given = sampled(capsys, run, "greedy=true")[0]
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    assert sampled(capsys, run, "greedy=true", prompt="-")[0] == given


def test_only_the_model_that_answers_is_read(tmp_path, capsys):
    absent = {"path": str(tmp_path / "absent")}
    architecture = {"architecture": SHAPE}
    small = ["rollout.max_new_tokens=4"]
    for student, teacher, model in ((architecture, absent, "student"), (absent, architecture, "teacher")):
        path = write_config(tmp_path, student=student, teacher=teacher)
        out, _ = sampled(capsys, path, f"model={model}", *small)
        other = {"student": "teacher", "teacher": "student"}[model]
        assert main(["sample", "--config", str(path), "prompt=x", f"model={other}"]) == 2
        assert "absent" in capsys.readouterr().err
    # Both have the same shape and seed: the teacher here is the student there.
    assert out == sampled(capsys, write_config(tmp_path), *small)[0]


def word_model(tmp_path):
    """A golden checkpoint of 64 positions with a tokenizer of 96 words."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((GOLDEN / "llama" / name).read_bytes())
    vocab = {"</s>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, 96)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))
    template = "{{ 'w2 w2 ' + messages[0].content }}"
    settings = {"eos_token": "</s>", "unk_token": "<unk>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_model_folder_with_its_chat_template_and_its_positions(tmp_path, capsys):
    folder = word_model(tmp_path)
    words = ["greedy=true", "rollout.max_new_tokens=8"]
    with_template = sampled(capsys, folder, *words, prompt="w5 w6")[0]
    assert (
        with_template
        == sampled(capsys, folder, *words, "tokenizer.chat_template=none", prompt="w2 w2 w5 w6")[0]
    )
    plain = sampled(capsys, folder, *words, "tokenizer.chat_template=none", prompt="w5 w6")[0]
    assert plain != with_template
    for too_long in (
        ["prompt=w5 w6"],  # 256 new tokens by default
        ["prompt=" + "w5 " * 61, "rollout.max_new_tokens=2"],
        ["prompt=" + "w5 " * 70, "rollout.max_new_tokens=1"],
    ):
        assert main(["sample", "--config", str(folder), *too_long]) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1
        assert "was made for 64 positions" in err
    sampled(capsys, folder, "rollout.max_new_tokens=2", prompt="w5 " * 60)  # 64 in all


def test_a_student_with_a_tokenizer_needs_no_files_of_the_teacher(tmp_path):
    models = {"student": {"path": str(word_model(tmp_path))}, "teacher": {"path": str(tmp_path / "absent")}}
    config = load_config(write_config(tmp_path, tokenizer={"kind": "model"}, **models))
    assert make_single(config, "student").tokenizer.vocab_size == 96
    with pytest.raises(ValueError, match="absent"):
        make_single(config, "teacher")


# ---- Text as it comes


def byte_tokenizer() -> HFTokenizer:
    """One token per byte, so that characters come in parts."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<end>": 0} | {char: i for i, char in enumerate(alphabet, 1)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return HFTokenizer(backend, TokenizerMetadata(tokens={"eos_token": "<end>"}), "a test")


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("text", ["7+5=12\n", "naïve 日本語 👩‍👩‍👧 end", "a\ufffdb\ufffd", "👍", ""])
@pytest.mark.parametrize("cut", [0, 1])
def test_pieces_are_whole_characters_and_make_the_text(size, text, cut):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text)
    ids = ids[: len(ids) - cut] if cut else [*ids, 0]
    stream = TextStream(tokenizer)
    pieces = []
    for end in range(size, len(ids) + size, size):
        pieces.append(stream.feed(ids[:end], is_last=end >= len(ids)))
        assert end >= len(ids) or not pieces[-1].endswith("\ufffd")
    assert "".join(pieces) == tokenizer.decode(ids)
    if len(ids) > 10 * size:
        assert sum(map(bool, pieces)) > 3  # it does come in pieces


def test_a_stream_of_chunks_is_the_rollout():
    mesh = sharding.make_mesh(MeshConfig(data=2), jax.devices()[:2])
    model = make_model(DecoderConfig(20, 16, 32, 1, 2, 1, 8))
    params = model.init(jax.random.key(0))
    settings = EngineSettings(
        num_prompts=2, group_size=2, max_prompt_tokens=4, max_new_tokens=11, num_tokens=20, end_ids=(1,),
        pad_id=0, decode_chunk=3, sampler=SamplerSettings(),
    )  # fmt: skip
    engine, key = Engine(model, settings, mesh), jax.random.key(0)
    prompts = Prompts(np.full((2, 4), 5, np.int32), np.full(2, 4, np.int32), np.arange(2, dtype=np.int32),
                      (), (), (), ())  # fmt: skip
    whole = engine.generate(params, prompts, key)
    seen = []
    for chunk in engine.stream(params, prompts, key):
        # Whoever takes a chunk is not on the engine's mesh.
        assert jax.sharding.get_abstract_mesh().empty
        counts = np.asarray(chunk.carry.counts_B).tolist()
        assert chunk.num_tokens == sum(counts)
        for row, wanted, count in zip(chunk.carry.tokens_BT, whole.tokens_BT, counts, strict=True):
            np.testing.assert_array_equal(row[: 4 + count], wanted[: 4 + count])
            assert not np.asarray(row[4 + count :]).any()
        seen.append(chunk)
    assert [c.num_running == 0 for c in seen] == [False] * (len(seen) - 1) + [True]
    assert len(seen) == 4  # prefill and 3 steps, 3, 3, and the last one of 11 tokens
    last = engine.rollouts(seen[-1].carry)
    jax.tree.map(np.testing.assert_array_equal, last, whole)


# ---- How it ends


def start_endless(tmp_path):
    """A sample that goes on for minutes: greedy, and an end token that is never the most likely."""
    path = write_config(tmp_path, mesh={"data": 1})
    command = [sys.executable, "-m", "kdrl_jax.main", "sample", "--config", str(path), "prompt=1+1"]
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    env = os.environ | {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)}
    words = ["greedy=true", "rollout.max_new_tokens=8000"]
    return subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)


@pytest.mark.parametrize("how", ["pipe", signal.SIGINT, signal.SIGTERM], ids=str)
def test_it_ends_quietly(how, tmp_path):
    process = start_endless(tmp_path)
    try:
        assert len(process.stdout.read(8)) == 8
        assert process.poll() is None
        if how == "pipe":
            process.stdout.close()
        else:
            process.send_signal(how)
        err = process.stderr.read()
        assert process.wait(timeout=60) == (0 if how == "pipe" else 128 + how)
        assert err == b""
    finally:
        process.kill()
        process.stderr.close()
