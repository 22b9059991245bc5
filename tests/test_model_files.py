"""What the readers of model files accept, and what they say about the rest."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import constants
from make_golden import CHECKPOINTS, GOLDEN
from safetensors.numpy import load_file, save_file

from kdrl_jax.config import ModelConfig
from kdrl_jax.models.hf import SafetensorsFolder
from kdrl_jax.models.load import ModelSource, open_model


def opened(path: Path, **settings: Any) -> ModelSource:
    return open_model(ModelConfig(path=str(path), **settings))


def write_gguf(path: Path, name: str, kind: str, **metadata: Any) -> None:
    """A golden checkpoint as llama.cpp's converter writes it; names come from the gguf package."""
    gguf = pytest.importorskip("gguf")
    config, family = opened(GOLDEN / name).config, CHECKPOINTS[name][0]
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    for key, value in metadata.items():
        writer.add_key_value(f"{family}.{key.replace('__', '.')}", *value)
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}[family]
    names = gguf.get_tensor_name_map(arch, config.num_layers)
    file = SafetensorsFolder(GOLDEN / name)
    for key in file.shapes:
        tensor = file.read(key).astype(np.float32)
        if family == "llama" and ("q_proj" in key or "k_proj" in key):
            heads = config.num_heads if "q_proj" in key else config.num_kv_heads
            halves = tensor.reshape(heads, 2, config.head_dim // 2, -1)
            tensor = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
        qtype = gguf.GGMLQuantizationType[kind]
        stored = gguf.quants.quantize(tensor, qtype)
        writer.add_tensor(names.get_name(key, (".weight", ".bias")), stored, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# In each of these types the golden checkpoint is exact.
@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "F32"), ("llama_tied", "BF16"), ("qwen2", "F32"), ("qwen2_tied", "F16")],
)
def test_gguf_holds_the_same_model(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, name, kind)
    ours, golden = opened(path), opened(GOLDEN / name)
    assert ours.config.norm_eps == pytest.approx(golden.config.norm_eps)
    assert ours.tokenizer_path == str(path)
    jax.tree.map(np.testing.assert_array_equal, ours.load(), golden.load())


def error_of(action: Callable[[], Any]) -> str:
    """The message of the ValueError that the action raises: one line."""
    with pytest.raises(ValueError, match=r".") as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def copied(tmp_path: Path, name: str = "llama", **fields: Any) -> Path:
    """A copy of a golden folder with fields of config.json changed."""
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def changed(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """The folder with tensors of its model.safetensors changed."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


def test_all_wrong_tensors_are_named_at_once(tmp_path: Path) -> None:
    def change(weights: dict[str, np.ndarray]) -> None:
        del weights["model.norm.weight"]
        for layer in range(3):
            del weights[f"model.layers.{layer}.mlp.up_proj.weight"]
        weights["model.layers.1.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
        weights["lm_head.weight"] = weights["lm_head.weight"][:95]

    message = error_of(lambda: opened(changed(copied(tmp_path), change)))
    assert "missing tensors: model.norm.weight, model.layers.[0-2].mlp.up_proj.weight;" in message
    assert "unexpected tensors: model.layers.1.self_attn.q_proj.bias;" in message
    assert "lm_head.weight is (95, 32), not (96, 32)" in message


def test_nan_is_named(tmp_path: Path) -> None:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights["model.layers.2.mlp.up_proj.weight"][3, 4] = np.nan
        weights["lm_head.weight"][5, 6] = np.inf

    message = error_of(opened(changed(copied(tmp_path), change)).load)
    assert "NaN or infinity in lm_head.weight, model.layers.2.mlp.up_proj.weight;" in message


def test_a_second_copy_of_a_tied_head_and_old_buffers_are_skipped(tmp_path: Path) -> None:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    params = opened(changed(copied(tmp_path, "llama_tied"), change)).load()
    assert "head" not in params


def test_files_that_are_not_whole_are_named(tmp_path: Path) -> None:
    folder = copied(tmp_path, "qwen2")
    shard = folder / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    for content in (whole[:-5], whole[:20], b"version https://git-lfs.github.com/spec/v1\n", b""):
        shard.write_bytes(content)
        assert f"{shard} is not a whole safetensors file" in error_of(lambda: opened(folder))
    shard.unlink()
    assert f"lacks {shard.name}" in error_of(lambda: opened(folder))
    (folder / "config.json").write_text('{"model_type": "qwen2", ')
    assert "config.json is not JSON" in error_of(lambda: opened(folder))


def test_pickles_and_quantised_weights_are_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path)

    def change(weights: dict[str, np.ndarray]) -> None:
        weights["lm_head.weight"] = weights["lm_head.weight"].astype(np.int8)

    assert "lm_head.weight (I8)" in error_of(lambda: opened(changed(folder, change)))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin only, a pickle" in error_of(lambda: opened(folder))
    (folder / "pytorch_model.bin").unlink()
    assert "neither model.safetensors" in error_of(lambda: opened(folder))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llama", "hidden_act", "gelu"),
        ("llama", "attention_bias", True),
        ("llama", "mlp_bias", True),
        ("llama", "pretraining_tp", 2),
        ("llama", "sliding_window", 128),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "num_local_experts", 8),
        ("llama", "quantization_config", {"quant_method": "gptq"}),
        ("llama", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("llama", "rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "factor": 2.0}),
        ("llama", "rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("llama", "architectures", ["LlamaForSequenceClassification"]),
        ("llama", "model_type", "gemma3"),
        ("llama", "num_key_value_heads", 3),
        ("llama", "head_dim", 7),
        ("llama", "num_hidden_layers", 0),
        ("llama", "rope_theta", 77.0),  # rope_parameters says otherwise
        ("qwen2", "use_sliding_window", True),
        ("qwen2", "layer_types", ["full_attention", "sliding_attention", "full_attention"]),
        ("qwen2", "rms_norm_eps", "1e-6"),
        ("qwen2", "tie_word_embeddings", "no"),
    ],
)
def test_unsupported_fields_are_named_with_their_value(
    name: str, field: str, value: Any, tmp_path: Path
) -> None:
    message = error_of(lambda: opened(copied(tmp_path, name, **{field: value})))
    assert "config.json: " in message
    shown = "sliding_attention" if field == "layer_types" else repr(value)
    assert field.replace("model_type", "model type") in message
    assert shown in message


def test_all_unsupported_fields_are_named_at_once(tmp_path: Path) -> None:
    folder = copied(tmp_path, mlp_bias=True, hidden_act="relu")
    assert "hidden_act='relu', mlp_bias=True not supported" in error_of(lambda: opened(folder))


def test_older_spellings_mean_the_same(tmp_path: Path) -> None:
    folder = copied(tmp_path, rope_parameters=None, rope_theta=500000.0, model_type=None)
    assert opened(folder).config == opened(GOLDEN / "llama").config


def test_settings_that_do_not_fit_the_files_are_refused(tmp_path: Path) -> None:
    folder = GOLDEN / "llama"
    assert "keep_layers names layer 3, but" in error_of(lambda: opened(folder, keep_layers=("1-3",)))
    assert "sha256 checks one file" in error_of(lambda: opened(folder, sha256="0"))
    assert "it is in" in error_of(lambda: opened(folder / "model.safetensors"))
    assert "path='no/such/folder' does not exist" in error_of(lambda: opened(Path("no/such/folder")))
    assert "run='runs/x'" in error_of(lambda: open_model(ModelConfig(run="runs/x")))


def test_gguf_files_that_cannot_be_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", "F32")
    whole = path.read_bytes()
    message = error_of(lambda: opened(path, sha256="0" * 64))
    assert "has sha256" in message
    assert "0" * 64 in message
    for length in (4, 6, 100, 1000, len(whole) - 1000):
        path.write_bytes(whole[:length])
        assert f"{path} is not a whole GGUF file" in error_of(lambda: opened(path))
    path.write_bytes(b"")
    assert "is not a GGUF file" in error_of(lambda: opened(path))
    write_gguf(path, "llama", "F32", rope__scaling__type=("linear", gguf.GGUFValueType.STRING))
    assert "llama.rope.scaling.type='linear' not supported" in error_of(lambda: opened(path))
    write_gguf(path, "llama", "F32", expert_count=(8, gguf.GGUFValueType.UINT32))
    assert "llama.expert_count=8 not supported" in error_of(lambda: opened(path))
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'kdrl_jax[gguf]'" in error_of(lambda: opened(path))


def test_a_hub_name_without_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = error_of(lambda: open_model(ModelConfig(path="some-org/some-model")))
    assert "path='some-org/some-model'" in message
    assert "give `path: FOLDER`" in message


def test_a_hub_name_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(name: str, **options: Any) -> str:
        asked.append(name)
        return str(GOLDEN / "llama")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = open_model(ModelConfig(path="some-org/some-model"))
    assert asked == ["some-org/some-model"]
    assert source.tokenizer_path == str(GOLDEN / "llama")
