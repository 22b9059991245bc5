"""The decoder against transformers, and the tables that fill it.

Logits are compared relative to the largest |logit| of the reference: max |ours - theirs| must stay
below 1e-4 of it, in float32, at every real position.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import plain_cache
import pytest
from make_golden import CHECKPOINTS, GOLDEN, hf_logits, hf_model, random_rows, save_random
from packed import layout_of
from safetensors.numpy import save_file

from kdrl_jax.config import ArchitectureConfig, MeshConfig, ModelConfig
from kdrl_jax.models import tensors
from kdrl_jax.models.decoder import Decoder, make_model
from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.models.head import head_logits
from kdrl_jax.models.hf import SafetensorsFolder
from kdrl_jax.models.load import ModelSource, open_model
from kdrl_jax.models.remat import Remat
from kdrl_jax.models.rope import Rope
from kdrl_jax.sharding import make_mesh, sharding
from kdrl_jax.types import Params

TOLERANCE = 1e-4


def opened(path: Path, **settings: Any) -> ModelSource:
    return open_model(ModelConfig(path=str(path), **settings))


def loaded(source: ModelSource, dtype: Any = jnp.float32) -> Params:
    """The parameters on one device, in `dtype`."""
    abstract = make_model(source.config).abstract()
    return source.load(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract))


def relative_error(ours: np.ndarray, theirs: np.ndarray, real: np.ndarray | None = None) -> float:
    """Largest difference at real positions, relative to the reference's largest |logit|."""
    real = np.ones(theirs.shape[:2], bool) if real is None else real
    return float(np.abs(ours - theirs)[real].max() / np.abs(theirs[real]).max())


def logits_of(decoder: Decoder, hidden: jax.Array) -> jax.Array:
    vocabulary = decoder.config.vocab_size
    return head_logits(hidden, decoder.output_head(), num_tokens=vocabulary, temperature=1.0)


class Compiled:
    """What the tests run of a decoder. Compiling takes longest, so tests of one config share it."""

    def __init__(self, config: DecoderConfig):
        model = make_model(config)

        def at_once(params: Params, tokens: jax.Array) -> jax.Array:
            decoder = model.bind(params)
            return logits_of(decoder, decoder.hidden(tokens))

        def segmented(params: Params, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
            decoder = model.bind(params)
            return logits_of(decoder, decoder.hidden(tokens, layout_of(segment_ids)))

        def prefill(params: Params, tokens: jax.Array, lengths: jax.Array, room: int) -> Any:
            decoder = model.bind(params)
            last, cache = plain_cache.prefill(decoder, tokens, lengths, tokens.shape[1] + room)
            return logits_of(decoder, last), cache

        def decode(params: Params, tokens: jax.Array, positions: jax.Array, cache: Any) -> Any:
            decoder = model.bind(params)
            hidden, cache = plain_cache.decode(decoder, tokens, positions, cache)
            return logits_of(decoder, hidden), cache

        self.at_once = jax.jit(at_once)
        self.segmented = jax.jit(segmented)
        self.prefill = jax.jit(prefill, static_argnames="room")
        self.decode = jax.jit(decode)


compiled = functools.cache(Compiled)


def logits_at_once(config: DecoderConfig, params: Params, tokens: np.ndarray) -> np.ndarray:
    """[B, T, V] from one pass over right-padded rows."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(compiled(config).at_once(params, tokens))


def logits_in_steps(
    config: DecoderConfig, params: Params, tokens: np.ndarray, prompt_lengths: np.ndarray
) -> np.ndarray:
    """[B, T, V] from a prefill of uneven prompts and then one token per row at a time.

    Positions before a prompt's last, which prefill does not return, are NaN.
    """
    run = compiled(config)
    rows, length = tokens.shape
    width = int(prompt_lengths.max())
    out = np.full((rows, length, config.vocab_size), np.nan, np.float32)
    row = np.arange(rows)
    with jax.default_matmul_precision("highest"):
        logits, cache = run.prefill(params, tokens[:, :width], prompt_lengths, room=length - width)
        out[row, prompt_lengths - 1] = logits
        for step in range(length - int(prompt_lengths.min())):
            positions = np.minimum(prompt_lengths + step, length - 1)
            logits, cache = run.decode(params, tokens[row, positions], positions, cache)
            out[row, positions] = logits
    return out


def check_against(source: ModelSource, tokens: np.ndarray, lengths: np.ndarray, theirs: np.ndarray) -> None:
    params = loaded(source)
    position = np.arange(tokens.shape[1])
    real = position < lengths[:, None]
    assert relative_error(logits_at_once(source.config, params, tokens), theirs, real) < TOLERANCE
    prompts = np.array([4, 2, 3])
    real &= position >= prompts[:, None] - 1
    stepped = logits_in_steps(source.config, params, tokens, prompts)
    assert relative_error(stepped, theirs, real) < TOLERANCE


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_equal_golden(name: str) -> None:
    golden = np.load(GOLDEN / name / "golden.npz")
    check_against(opened(GOLDEN / name), golden["tokens"], golden["lengths"], golden["logits"])


# Rows of 24 made of three sequences: (sequence, where it begins, its segment id).
LAYOUTS: dict[str, list[tuple[int, int, int]]] = {
    "left": [(0, 4, 1)],
    "left, much": [(1, 17, 1)],
    "right": [(2, 0, 1)],
    "packed": [(1, 0, 1), (2, 7, 2)],
    "packed with padding before, between and after": [(2, 1, 9), (1, 16, 3)],
}


def laid_out(
    sequences: list[np.ndarray], layouts: list[list[tuple[int, int, int]]], width: int = 24
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids of such rows; padding is random tokens, which nothing may depend on."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 96, (len(layouts), width), dtype=np.int32)
    ids = np.zeros_like(tokens)
    for row, layout in enumerate(layouts):
        for sequence, begin, segment in layout:
            end = begin + len(sequences[sequence])
            tokens[row, begin:end], ids[row, begin:end] = sequences[sequence], segment
    return tokens, ids


def check_segments(source: ModelSource, tokens: np.ndarray, lengths: np.ndarray, theirs: np.ndarray) -> None:
    """Each sequence of each layout has the logits that it has alone."""
    sequences = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    rows, ids = laid_out(sequences, list(LAYOUTS.values()))
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(compiled(source.config).segmented(loaded(source), rows, ids))
    assert np.isfinite(logits).all()
    for (name, layout), ours in zip(LAYOUTS.items(), logits, strict=True):
        for sequence, begin, _ in layout:
            length = lengths[sequence]
            # What transformers gives in steps begins with the logits of the fourth token.
            real = theirs[sequence : sequence + 1, :length]
            error = relative_error(ours[None, begin : begin + length], real, real.any(-1))
            assert error < TOLERANCE, name


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_padded_and_packed_rows_equal_golden(name: str) -> None:
    golden = np.load(GOLDEN / name / "golden.npz")
    check_segments(opened(GOLDEN / name), golden["tokens"], golden["lengths"], golden["logits"])


@pytest.mark.parametrize(
    ("name", "remat"), [("llama", "none"), ("llama", "mlp"), ("gemma2", "none"), ("gemma3_capped", "full")]
)
def test_packing_and_padding_leave_gradients_as_they_are(name: str, remat: Remat) -> None:
    source = opened(GOLDEN / name)
    model, params = make_model(source.config), loaded(source)
    golden = np.load(GOLDEN / name / "golden.npz")
    sequences = [golden["tokens"][row, :length] for row, length in ((1, 7), (2, 13))]
    alone = laid_out(sequences, [[(0, 0, 1)], [(1, 0, 1)]])
    packed = laid_out(sequences, [[(0, 2, 1), (1, 11, 2)], []])

    @jax.jit
    def gradient(params: Params, tokens: jax.Array, ids: jax.Array, counted: jax.Array) -> Params:
        def loss(params: Params) -> jax.Array:
            decoder = model.bind(params)
            logits = logits_of(decoder, decoder.hidden(tokens, layout_of(ids), remat=remat))
            return jnp.sum(jnp.square(logits) * counted[..., None])

        return jax.grad(loss)(params)

    with jax.default_matmul_precision("highest"):
        of_alone, of_packed = (gradient(params, rows, ids, ids > 0) for rows, ids in (alone, packed))
        # A whole row of padding, and padding that counts, give gradients too.
        of_padding = gradient(params, packed[0], packed[1], packed[1] == 0)
    for ours, theirs, padding in zip(*map(jax.tree.leaves, (of_packed, of_alone, of_padding)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * float(jnp.abs(theirs).max()))
        assert jnp.isfinite(padding).all()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_equal_transformers_on_fresh_weights(name: str, tmp_path: Path) -> None:
    """Rows padded on the right and on the left, both ways in transformers too."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    save_random(tmp_path, name, seed)
    tokens, lengths = random_rows(seed)
    model, in_steps = hf_model(tmp_path), CHECKPOINTS[name].in_steps
    right = hf_logits(model, tokens, lengths, in_steps=in_steps)
    check_against(opened(tmp_path), tokens, lengths, right)
    check_segments(opened(tmp_path), tokens, lengths, right)
    if not in_steps:
        left = hf_logits(model, tokens, lengths, left=True)
        check_segments(opened(tmp_path), tokens, lengths, left)


def test_dynamic_rope_and_what_transformers_does_in_one_pass() -> None:
    """Within the original context it is the same; a longer row it turns by that row's length, whole."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    source = opened(GOLDEN / "llama_dynamic")
    config, params, rope = source.config, loaded(source), source.config.rope
    golden = np.load(GOLDEN / "llama_dynamic" / "golden.npz")
    tokens, length, original = golden["tokens"][:1], int(golden["lengths"][0]), 8
    assert (length, rope.original_positions) == (20, original)
    model = hf_model(GOLDEN / "llama_dynamic")
    ours = logits_at_once(config, params, tokens)
    short = hf_logits(model, tokens[:, :original], np.array([original]))
    assert relative_error(ours[:, :original], short) < TOLERANCE
    long = hf_logits(model, tokens, np.array([length]))
    assert relative_error(ours, long) > 100 * TOLERANCE
    stretch = rope.factor * length / original - (rope.factor - 1)
    theta = rope.theta * stretch ** (config.head_dim / (config.head_dim - 2))
    turned = dataclasses.replace(config, rope=Rope(theta))
    assert relative_error(logits_at_once(turned, params, tokens), long) < TOLERANCE


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_transformers_reads_what_is_exported(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    source = opened(GOLDEN / name)
    family, params = source.family, loaded(source)
    (tmp_path / "config.json").write_text(json.dumps(family.config_to_hf(source.config)))
    written = dict(tensors.export(family.tensors, source.config, params))
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    golden = np.load(GOLDEN / name / "golden.npz")
    # Of what was imported, on the same machine: the same weights give the same bits.
    theirs, imported = (
        hf_logits(hf_model(folder), golden["tokens"], golden["lengths"], in_steps=CHECKPOINTS[name].in_steps)
        for folder in (tmp_path, GOLDEN / name)
    )
    np.testing.assert_array_equal(theirs, imported)


def smollm2() -> Path:
    root = Path(__file__).parents[1] / "models"
    found = [Path(p) for p in [os.environ.get("KDRL_SMOLLM2_GGUF")] if p]
    found += sorted(root.rglob("SmolLM2-135M-Instruct*.gguf"))
    if not found:
        pytest.skip("no SmolLM2-135M-Instruct GGUF (KDRL_SMOLLM2_GGUF, or below models/)")
    pytest.importorskip("gguf")
    return found[0]


def test_logits_of_smollm2_equal_golden() -> None:
    golden = np.load(GOLDEN / "smollm2.npz")
    source = opened(smollm2())
    params = loaded(source)
    logits = logits_at_once(source.config, params, golden["tokens"])
    assert relative_error(logits[..., golden["columns"]], golden["logits"]) < TOLERANCE
    logsumexp = np.asarray(jax.nn.logsumexp(logits, axis=-1))
    assert relative_error(logsumexp, golden["logsumexp"]) < TOLERANCE
    # The text is plain English, so a third of its tokens at least is the model's first guess.
    assert (logits.argmax(-1)[:, :-1] == golden["tokens"][:, 1:]).mean() > 1 / 3


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_import_fills_the_decoder_and_export_gives_the_file_back(name: str) -> None:
    source = opened(GOLDEN / name)
    params = loaded(source)
    abstract = make_model(source.config).abstract()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )
    exported = dict(tensors.export(source.family.tensors, source.config, params))
    file = SafetensorsFolder(GOLDEN / name)
    assert exported.keys() == file.shapes.keys()
    for key, tensor in exported.items():
        np.testing.assert_array_equal(tensor, file.read(key).astype(np.float32), err_msg=key)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_config_survives_the_round_trip(name: str) -> None:
    source = opened(GOLDEN / name)
    fields = json.loads(json.dumps(source.family.config_to_hf(source.config)))
    assert source.family.config_from_hf(fields) == source.config
    assert fields["architectures"] == [source.family.architecture]


def test_leaves_have_the_type_and_the_shards_that_were_asked_for() -> None:
    source = opened(GOLDEN / "llama")
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    model = make_model(source.config)
    abstract = jax.tree.map(
        lambda x, dims: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=sharding(dims, x.shape, mesh)),
        model.abstract(),
        model.dims,
    )
    params = source.load(abstract)
    jax.tree.map(
        lambda x, want: x.sharding == want.sharding or pytest.fail(str(x.sharding)), params, abstract
    )
    assert params["layers"]["attn"]["q"].addressable_shards[0].data.shape == (3, 8, 2, 16)
    whole = loaded(source, jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, params, whole)


def test_keep_layers_keeps_exactly_those() -> None:
    whole, cut = opened(GOLDEN / "qwen2"), opened(GOLDEN / "qwen2", keep_layers=(0, 2))
    assert (whole.config.num_layers, cut.config.num_layers) == (3, 2)
    expected = loaded(whole)
    expected["layers"] = jax.tree.map(lambda x: x[jnp.array([0, 2])], expected["layers"])
    jax.tree.map(np.testing.assert_array_equal, loaded(cut), expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_heads_of_an_architecture_are_as_wide_as_it_says(family: str) -> None:
    """Whatever the family's published models have."""
    shape = ArchitectureConfig(
        family=family, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    assert open_model(ModelConfig(architecture=shape), vocab_size=50).config.head_dim == 16
    wider = shape.model_copy(update={"head_dim": 32})
    assert open_model(ModelConfig(architecture=wider), vocab_size=50).config.head_dim == 32


def test_architecture_gives_a_config_and_no_weights() -> None:
    shape = ArchitectureConfig(
        family="qwen2",
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=5000.0,
    )
    source = open_model(ModelConfig(architecture=shape), vocab_size=50)
    assert source.config == DecoderConfig(50, 24, 40, 2, 4, 2, 6, Rope(5000.0), 1e-6, True, True)
    assert not source.has_weights
    assert source.tokenizer_path is None


@pytest.mark.parametrize("remat", ["none", "elementwise"])
def test_joined_weights_give_what_they_give_apart(remat: Remat, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two products of many tokens as one: values and gradients."""
    model = make_model(DecoderConfig(32, 16, 24, 2, 2, 1, 8))
    params = model.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 9), 0, 32)

    def of(params: Params) -> Any:
        return jnp.sum(jnp.sin(model.bind(params).hidden(tokens, remat=remat)))

    texts, results = [], []
    for least in (10**9, 1):
        monkeypatch.setattr("kdrl_jax.models.block.JOINED_FROM", least)
        jax.clear_caches()
        results.append(jax.jit(jax.value_and_grad(of))(params))
        texts.append(str(jax.make_jaxpr(lambda params: of(params))(params)))
    assert "4,9,2,24" not in texts[0]
    assert "4,9,2,24" in texts[1]  # they were joined
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
