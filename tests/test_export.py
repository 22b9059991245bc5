"""The `export` command: what transformers loads from it is the model that was here."""

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
import yaml
from make_golden import CHECKPOINTS, GOLDEN, hf_logits, hf_model, random_rows
from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from kdrl_jax.checkpoint import Checkpoints
from kdrl_jax.config import ModelConfig, load_config, load_run_config
from kdrl_jax.data.tokenizer import CharTokenizer
from kdrl_jax.main import main
from kdrl_jax.models.decoder import make_model
from kdrl_jax.models.head import head_logits
from kdrl_jax.models.hf import SafetensorsFolder
from kdrl_jax.models.hf_write import write_tensors
from kdrl_jax.models.load import open_model
from kdrl_jax.setup import make_setup
from kdrl_jax.train import train

ROOT = Path(__file__).parents[1]
# transformers' name of a field -> why an export's value may differ from the original's.
MAY_DIFFER = {
    "_name_or_path": "the folder",
    "bos_token_id": "the tokenizer's; the golden checkpoints were made without one",
    "eos_token_id": "the tokenizer's",
    "pad_token_id": "the tokenizer's",
    "transformers_version": "the original's writer; ours is not transformers",
}


def golden_model(folder: Path, name: str) -> Path:
    """A golden checkpoint with a tokenizer of 96 words, and two ends in its generation_config.json."""
    folder.mkdir()
    for path in (GOLDEN / name).iterdir():
        if path.suffix != ".npz":
            (folder / path.name).write_bytes(path.read_bytes())
    vocab = {"</s>": 0, "<s>": 1, "<unk>": 2, "<pad>": 3, "<stop>": 4} | {f"w{i}": i for i in range(5, 96)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["</s>", "<s>", "<unk>", "<pad>", "<stop>"])
    backend.save(str(folder / "tokenizer.json"))
    named = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    settings = named | {
        "chat_template": "{{ messages[0].content + ' w7' }}",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = {"eos_token_id": [0, 4], "temperature": 0.6, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def exported(source: Path, out: Path, *words: str) -> Path:
    assert main(["export", "--config", str(source), f"out={out}", *words]) == 0
    assert [p.name for p in out.parent.iterdir() if "partial" in p.name] == []
    return out


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    file = SafetensorsFolder(folder)
    return {name: file.read(name) for name in file.shapes}


def assert_same_bits(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype, name
        assert ours[name].tobytes() == theirs[name].tobytes(), name


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_golden_checkpoint_comes_back(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = golden_model(tmp_path / "source", name)
    out = exported(source, tmp_path / "deep" / "er" / "out")
    dtype = CHECKPOINTS[name].dtype
    said = capsys.readouterr().out
    assert f"{sum(x.size for x in tensors_of(source).values()):,} parameters, {dtype}" in said
    # The type of the files, bit for bit: no tensor turned, no head of its own beside a tied one.
    assert_same_bits(tensors_of(out), tensors_of(source))
    with safe_open(out / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}  # which older transformers insist on
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {
        "eos_token_id": [0, 4], "bos_token_id": 1, "pad_token_id": 3, "temperature": 0.6, "do_sample": True,
    }  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_transformers_computes_the_same(name: str, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    source = golden_model(tmp_path / "source", name)
    out = exported(source, tmp_path / "out", "max_shard_gib=1e-5")
    tokens, lengths = random_rows(7)
    ours, theirs = (
        hf_logits(hf_model(folder), tokens, lengths, in_steps=CHECKPOINTS[name].in_steps)
        for folder in (out, source)
    )
    # A matrix times one vector is summed in another order where the file lays tensors out otherwise.
    limit = 5e-6 if CHECKPOINTS[name].in_steps else 1e-6
    np.testing.assert_allclose(ours, theirs, rtol=limit, atol=limit * np.abs(theirs).max())
    configs = [transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in (out, source)]
    if configs[1].get("head_dim") is None:  # left to be this
        configs[1]["head_dim"] = configs[1]["hidden_size"] // configs[1]["num_attention_heads"]
    for config in configs:
        if (config["rope_parameters"] or {}).get("rope_type") == "yarn":
            # Its defaults are written out, and `mscale` as what follows from it; the logits are the same.
            config["rope_parameters"] = {
                k: v for k, v in config["rope_parameters"].items() if k in ("factor", "rope_theta")
            }
    different = {
        key: [config.get(key) for config in configs]
        for key in configs[0] | configs[1]
        if configs[0].get(key) != configs[1].get(key) and key not in MAY_DIFFER
    }
    assert different == {}
    assert configs[0]["eos_token_id"] == [0, 4]
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert (generation.eos_token_id, generation.temperature) == ([0, 4], 0.6)
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (out, source))
    assert ours("w9 <s> w11 x").input_ids == theirs("w9 <s> w11 x").input_ids
    message = [{"role": "user", "content": "w9"}]
    assert ours.apply_chat_template(message, tokenize=False) == "w9 w7"


def test_shards_hold_everything_once_and_are_as_large_as_said(tmp_path: Path):
    source = golden_model(tmp_path / "source", "llama")
    limit = 20_000
    out = exported(source, tmp_path / "out", f"max_shard_gib={limit / 2**30}")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    total = len(files)
    assert total > 3
    assert files == [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    found: dict[str, np.ndarray] = {}
    for file in files:
        inside = load_file(out / file)
        assert sum(x.nbytes for x in inside.values()) <= limit or len(inside) == 1
        assert not found.keys() & inside.keys()
        assert {index["weight_map"][name] for name in inside} == {file}
        found |= inside
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in found.values())
    assert_same_bits(found, tensors_of(source))
    jax.tree.map(np.testing.assert_array_equal, loaded(out), loaded(source))


def loaded(folder: Path) -> dict:
    source = open_model(ModelConfig(path=str(folder)))
    return source.load(make_model(source.config).abstract())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_types_are_rounded_as_torch_rounds(dtype: str, tmp_path: Path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    source = golden_model(tmp_path / "source", "llama")
    out = exported(source, tmp_path / "out", f"dtype={dtype}")
    ours, theirs = load_torch(out / "model.safetensors"), load_torch(source / "model.safetensors")
    for name, tensor in theirs.items():
        assert ours[name].dtype == getattr(torch, dtype)
        assert torch.equal(ours[name], tensor.to(ours[name].dtype)), name
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype


def test_a_cut_student_keeps_its_layers(tmp_path: Path):
    source = golden_model(tmp_path / "source", "llama")
    tree = {
        "name": "cut",
        "student": {"path": str(source), "keep_layers": [0, 2]},
        "data": {"train": [{"kind": "task", "task": "chain_sum"}]},
        "train": {"num_steps": 1},
    }
    (tmp_path / "cut.yaml").write_text(yaml.safe_dump(tree))
    out = exported(tmp_path / "cut.yaml", tmp_path / "out")
    ours, theirs = tensors_of(out), tensors_of(source)
    kept = {
        name.replace("layers.2.", "layers.1."): tensor
        for name, tensor in theirs.items()
        if "layers.1." not in name
    }
    assert_same_bits(ours, kept)
    assert open_model(ModelConfig(path=str(out))).config.num_layers == 2
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A trained run of a random model and the built-in tokenizer, with checkpoints of two steps."""
    tree = {
        "name": "tiny",
        "student": {
            "architecture": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "tie_word_embeddings": False,
            }
        },
        "tokenizer": {"kind": "char"},
        "data": {"train": [{"kind": "task", "task": "chain_sum"}], "max_prompt_tokens": 8},
        "rollout": {"source": "dataset", "group_size": 1, "max_new_tokens": 16},
        "rl": {"coef": 0},
        "sft": {"coef": 1},
        "optimizer": {"learning_rate": 0.01},
        "train": {"num_steps": 2, "prompts_per_iteration": 8, "diagnostics_every": 0},
        "reward": {"num_workers": 1},
        "checkpoint": {"every": 1},
        "mesh": {"fsdp": 4, "tensor": 2},
    }
    folder = tmp_path_factory.mktemp("exported")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(folder / "tiny.yaml", [f"log.dir={folder / 'run'}"])
    assert train(config, Console(quiet=True), lambda: False)
    return folder / "run"


def test_a_trained_run_is_its_checkpoint_bit_for_bit(run: Path, tmp_path: Path):
    newest = loaded(exported(run, tmp_path / "newest"))
    first = loaded(exported(run, tmp_path / "first", "step=1"))
    abstract = make_setup(load_run_config(run)).abstract_state().params
    checkpoints = Checkpoints(run)
    try:
        for step, ours in ((2, newest), (1, first)):
            wanted = checkpoints.restore_params(abstract, step)
            assert jax.tree.structure(ours) == jax.tree.structure(wanted)
            jax.tree.map(np.testing.assert_array_equal, ours, wanted)
    finally:
        checkpoints.close()
    assert (np.asarray(newest["embed"]) != np.asarray(first["embed"])).any()


def test_a_run_with_the_built_in_tokenizer_is_whole_for_transformers(run: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    out = exported(run, tmp_path / "out")
    ours, theirs = CharTokenizer(), transformers.AutoTokenizer.from_pretrained(out)
    text = "7+5=12,\n12+9=21####21"
    assert theirs(text).input_ids == ours.encode(text)
    model = hf_model(out)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (1, 0)
    tokens = np.array([ours.encode(text)])
    logits = hf_logits(model, tokens, np.array([tokens.shape[1]]))
    setup = make_setup(load_run_config(run))
    params = jax.device_get(Checkpoints(run).restore_params(setup.abstract_state().params))
    decoder = setup.student.bind(params)
    np.testing.assert_allclose(
        head_logits(decoder.hidden(tokens), decoder.output_head(), num_tokens=98, temperature=1.0),
        logits,
        atol=2e-5,
    )


# ---- All or nothing


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["export", *argv]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1
    assert out == ""
    return err


def test_an_out_that_holds_something_is_refused_before_anything_is_read(tmp_path: Path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link_to_empty").symlink_to(tmp_path / "empty")
    tree = {
        "name": "absent",
        "student": {"path": "absent/model"},
        "data": {"train": [{"kind": "task", "task": "chain_sum"}]},
        "train": {"num_steps": 1},
    }
    (tmp_path / "absent.yaml").write_text(yaml.safe_dump(tree))
    before = files(tmp_path)
    for name in ("full", "file", "link", "link_to_empty"):
        said = refused(capsys, "--config", str(tmp_path / "absent.yaml"), f"out={tmp_path / name}")
        assert f"out={tmp_path / name}" in said
    said = refused(capsys, "--config", str(tmp_path / "absent.yaml"), f"out={tmp_path / 'free' / 'deep'}")
    assert "absent/model" in said
    assert files(tmp_path) == before
    empty = tmp_path / "empty"
    empty.mkdir(exist_ok=True)
    exported(golden_model(tmp_path / "source", "llama"), empty)
    assert (empty / "model.safetensors").exists()


def test_what_a_type_cannot_hold_is_named_and_nothing_stays(tmp_path: Path, capsys):
    source = golden_model(tmp_path / "source", "llama")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][2, 3] = -65520.0  # the first that rounds to infinity
    weights["lm_head.weight"][5, 6] = 1e30
    weights["model.norm.weight"][0] = 65519.0
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    before = files(tmp_path)
    argv = ["--config", str(source), f"out={tmp_path / 'new' / 'out'}", "dtype=float16"]
    said = refused(capsys, *argv)
    assert "dtype=float16 holds numbers up to 65504" in said
    assert "in model.layers.1.mlp.up_proj.weight, lm_head.weight;" in said
    assert files(tmp_path) == before
    exported(source, tmp_path / "out", "dtype=bfloat16")


def test_a_checkpoint_that_is_not_there_is_named(run: Path, tmp_path: Path, capsys):
    said = refused(capsys, "--config", str(run), f"out={tmp_path / 'a' / 'out'}", "step=7")
    assert "step=7" in said
    assert "there are 1, 2" in said
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "where"),
    [(signal.SIGINT, "in the loop"), (signal.SIGTERM, "in the loop"), (signal.SIGINT, "in a destructor")],
)
def test_a_signal_in_the_middle_leaves_nothing(number: int, where: str, tmp_path: Path):
    """The signal comes while tensors are being written, from the process itself; in a destructor, Python
    swallows what its handler raises."""
    source = golden_model(tmp_path / "source", "llama")
    before = files(tmp_path)
    code = f"""
import os, signal, sys, time
from kdrl_jax import main
class Kill:
    def __del__(self):
        os.kill(os.getpid(), {int(number)})
from kdrl_jax.models import tensors
whole = tensors.export
def export(*args):
    for i, pair in enumerate(whole(*args)):
        if i == 5:
            print([p for p in os.listdir({str(tmp_path)!r}) if 'partial' in p])
            Kill() if {where == "in a destructor"} else Kill.__del__(None)
            time.sleep(10)
        yield pair
tensors.export = export
sys.exit(main.main(['export', '--config', {str(source)!r}, 'out={tmp_path / "out"}']))
"""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    env = os.environ | {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120, check=False
    )
    assert ".out.partial-" in done.stdout
    assert (done.returncode, done.stderr) == (128 + number, "")
    assert files(tmp_path) == before


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path):
    """30 tensors of 4 MB in one file: the peak is a few of them."""
    shapes = {f"t{i}": (1024, 1024) for i in range(30)}
    num_bytes = 4 * 1024 * 1024
    arrays = ((name, np.full(shape, i, np.float32)) for i, (name, shape) in enumerate(shapes.items()))
    tracemalloc.start()
    try:
        assert write_tensors(tmp_path, shapes, arrays, dtype="bfloat16", max_bytes=1e12) == 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * num_bytes
    found = load_file(tmp_path / "model.safetensors")
    assert {x.dtype for x in found.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert [float(found[f"t{i}"].astype(np.float32).max()) for i in range(30)] == list(range(30))
