"""The sampling engine: a completion is a matter of its identity alone, and its log-probabilities are
the trainer's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdrl_jax import sharding
from kdrl_jax.config import MeshConfig
from kdrl_jax.models.decoder import DecoderConfig, make_model
from kdrl_jax.models.head import head_logits
from kdrl_jax.rollout.engine import Engine, EngineSettings, Stopped, windows
from kdrl_jax.rollout.recorded import from_completions
from kdrl_jax.rollout.sampling import SamplerSettings, row_keys, sample
from kdrl_jax.scoring import HeadSettings, score_tokens
from kdrl_jax.types import Prompts

V, WIDTH, NEW, NUM = 37, 9, 70, 32  # 70 new tokens: the cache is read through two windows
MODEL = make_model(DecoderConfig(V + 3, 16, 32, 2, 4, 2, 8, qkv_bias=True))  # 3 columns of padding
PARAMS = MODEL.init(jax.random.key(0))
ENDS = (1, 2)
KEY = jax.random.key(7)
MESH = sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def prompts(rows=slice(None)):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, WIDTH, NUM).astype(np.int32)
    lengths[:2] = 1, WIDTH
    tokens = rng.integers(3, V, (NUM, WIDTH)).astype(np.int32)
    tokens[np.arange(WIDTH) >= lengths[:, None]] = 0
    take = np.arange(NUM)[rows]
    return Prompts(tokens[take], lengths[take], take.astype(np.int32), (), (), (), ())


@functools.cache
def engine(num, group=2, mesh=MESH, **sampler):
    settings = EngineSettings(
        num_prompts=num,
        group_size=group,
        max_prompt_tokens=WIDTH,
        max_new_tokens=NEW,
        num_tokens=V,
        end_ids=ENDS,
        pad_id=0,
        decode_chunk=16,
        sampler=SamplerSettings(**sampler),
    )
    return Engine(MODEL, settings, mesh)


@functools.cache
def whole():
    return engine(NUM).generate(PARAMS, prompts(), KEY)


def test_layout_of_a_rollout():
    r, p = whole(), prompts()
    tokens, lengths = np.asarray(r.tokens_BT), np.asarray(r.completion_lengths_B)
    assert tokens.shape == (2 * NUM, WIDTH + NEW)
    assert lengths.min() >= 1
    assert lengths.max() == NEW  # some are cut off, and most are not
    assert 0.2 < np.asarray(r.ended_B).mean() < 1
    for b in range(2 * NUM):
        start, stop = p.lengths_P[b // 2], p.lengths_P[b // 2] + lengths[b]
        np.testing.assert_array_equal(tokens[b, :start], p.tokens_PT[b // 2, :start])
        body = tokens[b, start:stop]
        assert not np.isin(body[:-1], ENDS).any()  # nothing after the first end token
        assert np.isin(body[-1], ENDS) == r.ended_B[b]
        assert r.ended_B[b] or lengths[b] == NEW
        assert (tokens[b, stop:] == 0).all()
        assert (body < V).all()  # never a padded column
    np.testing.assert_array_equal(np.asarray(r.sampler_logprobs_BT != 0), np.asarray(r.completion_mask_BT))


@pytest.mark.parametrize("rows", [slice(5, 6), slice(4, 6)], ids=["alone", "two"])
def test_a_completion_does_not_depend_on_its_batch(rows):
    few = engine(rows.stop - rows.start).generate(PARAMS, prompts(rows), KEY)
    picked = slice(2 * rows.start, 2 * rows.stop)
    np.testing.assert_array_equal(few.tokens_BT, whole().tokens_BT[picked])
    np.testing.assert_allclose(few.sampler_logprobs_BT, whole().sampler_logprobs_BT[picked], atol=1e-4)


def test_eight_devices_sample_the_same():
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2), jax.devices()[:8])
    placed = jax.tree.map(
        lambda x, dims: jax.device_put(x, sharding.sharding(dims, x.shape, mesh)), PARAMS, MODEL.dims
    )
    r = engine(NUM, mesh=mesh).generate(placed, prompts(), KEY)
    np.testing.assert_array_equal(r.tokens_BT, whole().tokens_BT)


def test_samples_and_draws_differ():
    tokens = np.asarray(whole().tokens_BT)
    assert all((tokens[2 * p] != tokens[2 * p + 1]).any() for p in range(NUM))
    again = dataclasses.replace(prompts(slice(0, 2)), draws_P=np.array([0, 99], np.int32))
    same_question = dataclasses.replace(
        again, tokens_PT=again.tokens_PT[[0, 0]], lengths_P=again.lengths_P[[0, 0]]
    )
    r = engine(2).generate(PARAMS, same_question, KEY)
    assert (r.tokens_BT[0] != r.tokens_BT[2]).any()
    np.testing.assert_array_equal(r.tokens_BT[0], whole().tokens_BT[0])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_sampler_and_trainer_agree(temperature):
    r = engine(4).generate(PARAMS, prompts(slice(0, 4)), KEY, temperature=temperature)
    head = HeadSettings(num_tokens=V, chunk=64, max_new_tokens=NEW)

    @jax.jit
    def score(temperature):
        rows = (r.tokens_BT, r.prompt_lengths_B, jnp.full(8, temperature))
        return score_tokens(MODEL, PARAMS, *rows, head).logprobs_BT

    trained = score(temperature)
    mask = np.asarray(r.completion_mask_BT)
    gap = np.abs(np.asarray(trained) - np.asarray(r.sampler_logprobs_BT))
    assert gap[mask].max() < 1e-4
    # The mean ratio at learning rate 0 is 1; scored at another temperature it is not.
    ratio = np.exp(np.asarray(trained) - np.asarray(r.sampler_logprobs_BT))[mask]
    assert abs(ratio.mean() - 1) < 1e-4
    assert np.abs(np.asarray(score(2.5)) - np.asarray(trained))[mask].mean() > 1e-2


def test_greedy_takes_the_most_likely_and_ignores_the_key():
    greedy = engine(2, group=1, greedy=True)
    a, b = (greedy.generate(PARAMS, prompts(slice(0, 2)), jax.random.key(k)) for k in (1, 2))
    np.testing.assert_array_equal(a.tokens_BT, b.tokens_BT)
    decoder = MODEL.bind(PARAMS)
    logits = head_logits(decoder.hidden(a.tokens_BT), decoder.output_head(), num_tokens=V, temperature=1.0)
    best = np.asarray(logits[:, :-1, :V].argmax(-1))
    mask = np.asarray(a.completion_mask_BT)[:, 1:]
    np.testing.assert_array_equal(np.asarray(a.tokens_BT)[:, 1:][mask], best[mask])


def test_stops_between_chunks():
    calls = []

    def stop():
        calls.append(1)
        return len(calls) == 2

    with pytest.raises(Stopped):
        engine(NUM).generate(PARAMS, prompts(), KEY, should_stop=stop)
    assert len(calls) == 2
    # The engine is as good as new: its buffers were donated, not shared.
    np.testing.assert_array_equal(engine(NUM).generate(PARAMS, prompts(), KEY).tokens_BT, whole().tokens_BT)


def test_another_batch_or_temperature_does_not_recompile():
    e = engine(4)
    e.generate(PARAMS, prompts(slice(0, 4)), KEY)
    before = e._chunk._cache_size(), e._start._cache_size()
    e.generate(PARAMS, prompts(slice(4, 8)), jax.random.key(3), temperature=0.7)
    assert (e._chunk._cache_size(), e._start._cache_size()) == before == (1, 1)


def test_prompts_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"this engine takes \(4, 9\)"):
        engine(4).generate(PARAMS, prompts(slice(0, 3)), KEY)


@pytest.mark.parametrize("length", [10, 64, 65, 700])
def test_windows_cover_the_cache(length):
    sizes = windows(length)
    assert sizes[-1] == length
    assert list(sizes) == sorted(set(sizes))


def frequencies(settings, num=4000):
    logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
    keys = row_keys(KEY, jnp.arange(num), jnp.zeros(num, jnp.int32))
    tokens, logprobs = sample(jnp.tile(logits, (num, 1)), keys, jnp.zeros(num, jnp.int32), settings)
    # Log-probabilities are under the whole distribution, whatever the tokens were drawn from.
    np.testing.assert_allclose(logprobs, logits[tokens], rtol=1e-5)
    return np.bincount(np.asarray(tokens), minlength=4) / num


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (SamplerSettings(), [0.4, 0.3, 0.2, 0.1]),
        (SamplerSettings(top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (SamplerSettings(top_p=0.65), [4 / 7, 3 / 7, 0, 0]),
        (SamplerSettings(top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0]),
        (SamplerSettings(top_k=3, top_p=0.7), [4 / 7, 3 / 7, 0, 0]),
        (SamplerSettings(top_p=1e-6), [1, 0, 0, 0]),
        (SamplerSettings(greedy=True), [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_samplers_draw_from_what_they_say(settings, wanted):
    np.testing.assert_allclose(frequencies(settings), wanted, atol=0.03)


def test_too_many_candidates_are_refused():
    with pytest.raises(ValueError, match="top_k=300"):
        SamplerSettings(top_k=300)


def test_completions_of_a_dataset_are_laid_out_like_sampled_ones():
    given = [[5, 6, 1], list(range(3, 30))]
    r = from_completions(prompts(slice(0, 2)), given, max_new_tokens=20, end_ids=ENDS, pad_id=0, mesh=MESH)
    assert r.completion_lengths_B.tolist() == [3, 20]
    assert r.ended_B.tolist() == [True, False]  # too long: cut, and counted as truncated
    assert r.tokens_BT[0, 1:5].tolist() == [5, 6, 1, 0]
    assert r.tokens_BT[1, WIDTH:].tolist() == given[1][:20]
    assert np.asarray(r.completion_mask_BT).sum(1).tolist() == [3, 20]
