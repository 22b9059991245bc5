"""What the readers of model files accept, and what they say about the rest."""

import http.server
import json
import shutil
import sys
import threading
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
from test_models import loaded

from kdrl_jax.config import ModelConfig
from kdrl_jax.models.hf import SafetensorsFolder
from kdrl_jax.models.load import ModelSource, open_model


def opened(path: Path, **settings: Any) -> ModelSource:
    return open_model(ModelConfig(path=str(path), **settings))


def write_gguf(path: Path, name: str, kind: str, **metadata: Any) -> None:
    """A golden checkpoint as llama.cpp's converter writes it; names come from the gguf package."""
    gguf = pytest.importorskip("gguf")
    config, family = opened(GOLDEN / name).config, CHECKPOINTS[name].family
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
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    for key, value in metadata.items():
        writer.add_key_value(f"{family}.{key.replace('__', '.')}", *value)
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}[
        family
    ]
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
    [("llama", "F32"), ("llama_tied", "BF16"), ("qwen2", "F32"), ("qwen2_tied", "F16"), ("qwen3", "F32")],
)
def test_gguf_holds_the_same_model(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, name, kind)
    ours, golden = opened(path), opened(GOLDEN / name)
    assert ours.config.norm_eps == golden.config.norm_eps
    assert ours.tokenizer_path == str(path)
    jax.tree.map(np.testing.assert_array_equal, loaded(ours), loaded(golden))


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

    source = opened(changed(copied(tmp_path), change))
    message = error_of(lambda: loaded(source))
    assert "NaN or infinity in lm_head.weight, model.layers.2.mlp.up_proj.weight;" in message


def test_a_second_copy_of_a_tied_head_and_old_buffers_are_skipped(tmp_path: Path) -> None:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    params = loaded(opened(changed(copied(tmp_path, "llama_tied"), change)))
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
        ("llama", "use_bidirectional_attention", True),
        ("llama", "attention_sinks", 4),
        ("qwen3", "attention_bias", True),
        ("qwen3", "num_experts", 128),
        ("gemma2", "hidden_activation", "silu"),
        ("gemma3", "attn_logit_softcapping", 30.0),
        ("gemma3", "layer_types", ["chunked_attention"] * 6),
        ("llama", "model_type", "qwen3_moe"),
        ("llama", "architectures", ["LlamaForSequenceClassification"]),
        ("llama", "model_type", "gemma4"),
        ("llama", "num_key_value_heads", 3),
        ("llama", "head_dim", 7),
        ("llama", "num_hidden_layers", 0),
        ("llama", "rope_theta", 77.0),  # rope_parameters says otherwise
        ("qwen2", "sliding_window", None),  # and layers that slide
        ("qwen2", "rms_norm_eps", "1e-6"),
        ("qwen2", "tie_word_embeddings", "no"),
    ],
)
def test_unsupported_fields_are_named_with_their_value(
    name: str, field: str, value: Any, tmp_path: Path
) -> None:
    more = {"layer_types": ["sliding_attention"] * 3} if field == "sliding_window" and name == "qwen2" else {}
    message = error_of(lambda: opened(copied(tmp_path, name, **{field: value}, **more)))
    assert "config.json: " in message
    shown = value[1] if field == "layer_types" else repr(value)
    assert field.replace("model_type", "model type") in message
    assert shown in message


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"type": "linear"}, "rope_scaling.factor=None"),
        ({"type": "linear", "factor": -2}, "rope_scaling.factor=-2"),
        ({"rope_type": "longrope", "factor": 2.0}, "rope_scaling.rope_type='longrope' not supported"),
        ({"rope_type": "llama3", "factor": 8.0}, "rope_scaling.low_freq_factor=None"),
        ({"type": "yarn", "factor": 8.0, "mrope_section": [2, 2]}, "rope_scaling.mrope_section=[2, 2]"),
        ({"rope_type": "default", "factor": 2.0}, "rope_scaling.factor=2.0 not supported with RoPE of type"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "rope_scaling.partial_rotary_factor"),
        ("linear", "rope_scaling='linear'"),
    ],
)
def test_rope_settings_that_cannot_be_computed_are_named(settings: Any, shown: str, tmp_path: Path) -> None:
    folder = copied(tmp_path, rope_parameters=None, rope_theta=1e4, rope_scaling=settings)
    assert shown in error_of(lambda: opened(folder))


# As published files write them, before transformers 5.
OLDER_SPELLINGS: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 500000.0, "model_type": None, "num_key_value_heads": 2},
    "llama3": {
        "rope_theta": 500.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
            "rope_type": "llama3",
        },
    },
    "qwen2_yarn": {
        "rope_theta": 5000.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
        "layer_types": None,
        "use_mrope": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen2_sliding": {"rope_theta": 10000.0, "layer_types": None},
    "gemma2": {"rope_theta": 100.0, "layer_types": None, "hidden_act": "gelu_pytorch_tanh"},
    "gemma3": {
        "rope_theta": 1000000,
        "rope_local_base_freq": 100,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "layer_types": None,
        "sliding_window_pattern": 6,
    },
}


def test_older_spellings_mean_the_same(tmp_path: Path) -> None:
    for name, fields in OLDER_SPELLINGS.items():
        folder = copied(tmp_path, name, rope_parameters=None, **fields)
        assert opened(folder).config == opened(GOLDEN / name).config, name


def test_everything_wrong_with_a_file_is_said_at_once(tmp_path: Path) -> None:
    def change(weights: dict[str, np.ndarray]) -> None:
        del weights["model.norm.weight"]
        weights["model.layers.0.extra"] = np.zeros(3, np.float32)
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][1:]
        weights["model.layers.2.mlp.up_proj.weight"][0, 0] = np.nan

    message = error_of(lambda: opened(changed(copied(tmp_path), change)))
    for part in ("missing tensors: model.norm", "unexpected tensors: model.layers.0.extra", "wrong shapes:"):
        assert part in message
    assert "NaN or infinity in model.layers.2.mlp.up_proj.weight" in message


@pytest.mark.parametrize("prefix", ["language_model.", "model."])
def test_the_text_model_of_a_gemma3_with_vision_is_read(prefix: str, tmp_path: Path) -> None:
    """Published files put `language_model.` before all names, newer ones `model.language_model.`."""
    folder = copied(tmp_path, "gemma3")
    text = json.loads((folder / "config.json").read_text())
    outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(outer | {"text_config": text}))
    whole = opened(GOLDEN / "gemma3")

    def change(weights: dict[str, np.ndarray]) -> None:
        for name in list(weights):
            moved = f"language_model.{name}"
            if prefix == "model.":
                moved = name.replace("model.", "model.language_model.", 1)
            weights[moved] = weights.pop(name)
        weights[f"{prefix if prefix == 'model.' else ''}vision_tower.x.weight"] = np.zeros(3, np.float32)
        weights[f"{prefix if prefix == 'model.' else ''}multi_modal_projector.y"] = np.zeros(3, np.float32)

    source = opened(changed(folder, change))
    assert source.config == whole.config
    jax.tree.map(np.testing.assert_array_equal, loaded(source), loaded(whole))


def test_all_unsupported_fields_are_named_at_once(tmp_path: Path) -> None:
    folder = copied(tmp_path, mlp_bias=True, hidden_act="relu")
    assert "mlp_bias=True, hidden_act='relu' not supported" in error_of(lambda: opened(folder))


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


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped path may look like a hub name: the client would try again for half a minute."""
    asked: list[str] = []

    class Busy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(503)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        message = error_of(lambda: open_model(ModelConfig(path="models/mistyped")))
        server.shutdown()
    assert "path='models/mistyped' is not a local path and could not be fetched from the hub" in message
    assert "503" in message
    assert asked == ["/api/models/models/mistyped"]


def test_a_hub_name_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(name: str, **options: Any) -> str:
        asked.append(name)
        return str(GOLDEN / "llama")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = open_model(ModelConfig(path="some-org/some-model"))
    assert asked == ["some-org/some-model"]
    assert source.tokenizer_path == str(GOLDEN / "llama")


def test_what_was_downloaded_before_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--some-org--some-model"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0123abc")
    shutil.copytree(GOLDEN / "llama", place / "snapshots" / "0123abc")
    source = open_model(ModelConfig(path="some-org/some-model"))
    assert source.tokenizer_path == str(place / "snapshots" / "0123abc")


def test_a_model_that_is_not_supported_is_refused_before_its_weights_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(tmp_path, "qwen3", model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"])
    asked: list[str] = []

    def one_file(name: str, file: str, **options: Any) -> str:
        asked.append(file)
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one_file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("fetched"))
    message = error_of(lambda: open_model(ModelConfig(path="some-org/some-moe")))
    assert "'qwen3_moe' (mixture of experts) is not supported" in message
    assert asked == ["config.json"]


@pytest.mark.parametrize(
    ("head", "shown"),
    [
        (
            np.ones((96, 32), np.float32),
            "is not model.embed_tokens.weight, though tie_word_embeddings is true",
        ),
        (np.ones((3, 32), np.float32), "lm_head.weight is (3, 32), not (96, 32)"),
    ],
)
def test_a_tied_head_that_is_another_matrix_is_refused(head: np.ndarray, shown: str, tmp_path: Path) -> None:
    folder = changed(copied(tmp_path, "llama_tied"), lambda weights: weights.update({"lm_head.weight": head}))
    assert shown in error_of(lambda: loaded(opened(folder)))


def test_names_of_a_model_with_vision_are_unexpected_elsewhere(tmp_path: Path) -> None:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights["vision_tower.x"] = np.zeros(3, np.float32)
        weights["language_model.model.norm.weight"] = weights["model.norm.weight"].copy()

    message = error_of(lambda: opened(changed(copied(tmp_path), change)))
    assert "unexpected tensors: language_model.model.norm.weight, vision_tower.x" in message


def test_fields_beside_a_text_model_are_read(tmp_path: Path) -> None:
    folder = copied(tmp_path, "gemma3")
    text = json.loads((folder / "config.json").read_text())
    outer = {"model_type": "gemma3", "vision_config": {}, "text_config": text}
    (folder / "config.json").write_text(json.dumps(outer | {"tie_word_embeddings": False}))
    assert "contradict each other" in error_of(lambda: opened(folder))
    (folder / "config.json").write_text(json.dumps(outer | {"logit_scale": 2.0}))
    assert "logit_scale=2.0 is not known here" in error_of(lambda: opened(folder))
