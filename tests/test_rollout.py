"""The sampling engine: a completion is a matter of its identity alone, and its log-probabilities are
the trainer's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed import score_rollouts

from kdrl_jax import hosts, sharding
from kdrl_jax.config import MeshConfig
from kdrl_jax.models.decoder import DecoderConfig, make_model
from kdrl_jax.models.head import head_logits
from kdrl_jax.rollout.engine import Engine, Stopped
from kdrl_jax.rollout.finish import cut_at_stops, finish_reason, stop_length
from kdrl_jax.rollout.recorded import from_completions
from kdrl_jax.rollout.sampling import SamplerSettings, row_keys, sample
from kdrl_jax.rollout.settings import EngineSettings
from kdrl_jax.scoring import HeadSettings
from kdrl_jax.types import Prompts

V, WIDTH, NEW, NUM = 37, 9, 70, 32  # 70 new tokens: the cache is read through two windows
MODEL = make_model(DecoderConfig(V + 3, 16, 32, 2, 4, 2, 8, qkv_bias=True))  # 3 columns of padding
PARAMS = MODEL.init(jax.random.key(0))
ENDS = (1, 2)
KEY = jax.random.key(7)
SAMPLER = SamplerSettings()
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
def engine(num, group=2, mesh=MESH, sampler=SAMPLER, **settings):
    shape = {
        "num_prompts": num,
        "group_size": group,
        "max_prompt_tokens": WIDTH,
        "max_new_tokens": NEW,
        "num_tokens": V,
        "end_ids": ENDS,
        "pad_id": 0,
        "decode_chunk": 16,
        "sampler": sampler,
    }
    return Engine(MODEL, EngineSettings(**shape | settings), mesh)


@functools.cache
def whole():
    return engine(NUM).generate(PARAMS, prompts(), KEY)


def assert_same(ours, theirs, rows=slice(None)):
    np.testing.assert_array_equal(ours.tokens_BT, theirs.tokens_BT[rows])
    np.testing.assert_allclose(ours.sampler_logprobs_BT, theirs.sampler_logprobs_BT[rows], atol=1e-4)
    for name in ("prompt_lengths_B", "completion_lengths_B", "ended_B"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name)[rows])


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


def test_every_token_is_that_of_whole_passes_over_its_row():
    """The plainest sampler: for each token a pass over all of its row, no cache, no slots."""
    p, group, length = prompts(slice(0, 4)), 2, WIDTH + NEW

    @jax.jit
    def next_token(row, last, draw, number, count):
        decoder = MODEL.bind(PARAMS)
        hidden = decoder.hidden(row[None])[:, last]
        logits = head_logits(hidden, decoder.output_head(), num_tokens=V, temperature=1.0)
        keys = row_keys(KEY, draw[None], number[None])
        return sample(logits, keys, count[None], SamplerSettings())

    r = whole()
    for b in range(4 * group):
        row = np.zeros(length, np.int32)
        start = int(p.lengths_P[b // group])
        row[:start] = p.tokens_PT[b // group, :start]
        for count in range(int(r.completion_lengths_B[b])):
            numbers = (start + count - 1, p.draws_P[b // group], b % group, count)
            token, logprob = next_token(row, *map(jnp.int32, numbers))
            row[start + count] = token[0]
            assert abs(float(logprob[0]) - float(r.sampler_logprobs_BT[b, start + count])) < 1e-4
        np.testing.assert_array_equal(r.tokens_BT[b], row)


@pytest.mark.parametrize("rows", [slice(5, 6), slice(4, 6)], ids=["alone", "two"])
def test_a_completion_does_not_depend_on_its_batch(rows):
    few = engine(rows.stop - rows.start).generate(PARAMS, prompts(rows), KEY)
    assert_same(few, whole(), slice(2 * rows.start, 2 * rows.stop))


@pytest.mark.parametrize("attention", ["windows", "kernel"])
@pytest.mark.parametrize("slots", [1, 4, 16, 64])
def test_a_completion_does_not_depend_on_the_slots(slots, attention):
    assert_same(engine(NUM, slots=slots, attention=attention).generate(PARAMS, prompts(), KEY), whole())


def placed(mesh):
    return jax.tree.map(
        lambda x, dims: jax.device_put(x, sharding.sharding(dims, x.shape, mesh)), PARAMS, MODEL.dims
    )


@pytest.mark.parametrize(
    ("axes", "attention"),
    [
        ({"fsdp": 8}, "windows"),
        ({"data": 2, "fsdp": 4}, "kernel"),
        ({"fsdp": 4, "tensor": 2}, "windows"),
        ({"fsdp": 4, "tensor": 2}, "kernel"),
        ({"fsdp": 2, "tensor": 4}, "windows"),  # more of `tensor` than kv heads
        ({"fsdp": 2, "tensor": 4}, "kernel"),
    ],
    ids=str,
)
@pytest.mark.parametrize("slots", [3, None])
def test_eight_devices_sample_the_same(axes, attention, slots):
    mesh = sharding.make_mesh(MeshConfig(**axes), jax.devices()[:8])
    e = engine(NUM, mesh=mesh, slots=slots, attention=attention)
    r = e.generate(placed(mesh), prompts(), KEY)
    assert_same(r, whole())
    rows = NUM * 2 // sharding.batch_shards(mesh)
    assert {x.data.shape[0] for x in r.tokens_BT.addressable_shards} == {rows}


def test_shards_that_end_early_are_seen():
    """One shard has the completions that never end, the other those of one token."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    never, at_once = (engine(2, group=1, mesh=mesh, end_ids=ids) for ids in ((), tuple(range(V))))
    for e, steps in ((never, NEW), (at_once, 1)):
        *_, last = e.stream(placed(mesh), prompts(slice(0, 2)), KEY)
        assert last.carry.steps.tolist() == [steps, steps]
        assert last.idle_frac == 0
    # Three rows a shard in two slots; the rows' lengths are known.
    e = engine(6, group=1, mesh=mesh, slots=2)
    *_, last = e.stream(placed(mesh), prompts(slice(0, 6)), KEY)
    counts = np.asarray(last.carry.counts_B)
    np.testing.assert_array_equal(counts, whole().completion_lengths_B[:12:2])
    wanted = []
    for a, b, c in counts.reshape(2, 3):
        wanted.append(max(min(a, b) + c, a, b))  # the third row begins when the first of two ends
    assert last.carry.steps.tolist() == wanted
    assert wanted[0] != wanted[1]
    assert last.idle_frac == pytest.approx(1 - counts.sum() / (2 * 2 * max(wanted)))


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
    head = HeadSettings(num_tokens=V, chunk=64)

    rows = (r.tokens_BT, r.prompt_lengths_B, r.completion_lengths_B)
    trained = score_rollouts(MODEL, PARAMS, *rows, head, temperature)
    mask = np.asarray(r.completion_mask_BT)
    gap = np.abs(np.asarray(trained) - np.asarray(r.sampler_logprobs_BT))
    assert gap[mask].max() < 1e-4
    # The mean ratio at learning rate 0 is 1; scored at another temperature it is not.
    ratio = np.exp(np.asarray(trained) - np.asarray(r.sampler_logprobs_BT))[mask]
    assert abs(ratio.mean() - 1) < 1e-4
    warm = score_rollouts(MODEL, PARAMS, *rows, head, 2.5)
    assert np.abs(np.asarray(warm) - np.asarray(trained))[mask].mean() > 1e-2


def test_greedy_takes_the_most_likely_and_ignores_the_key():
    greedy = engine(2, group=1, sampler=SamplerSettings(greedy=True))
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


def test_another_batch_temperature_or_limit_does_not_recompile():
    e = engine(4)
    e.generate(PARAMS, prompts(slice(0, 4)), KEY)
    programs = e.programs()
    before = programs.chunk._cache_size(), programs.start._cache_size()
    e.generate(PARAMS, prompts(slice(4, 8)), jax.random.key(3), temperature=0.7, max_new_tokens=5)
    assert (programs.chunk._cache_size(), programs.start._cache_size()) == before == (1, 1)


def test_a_call_has_its_own_maximum():
    r = engine(4).generate(PARAMS, prompts(slice(0, 4)), KEY, max_new_tokens=5)
    lengths = np.minimum(whole().completion_lengths_B[:8], 5)
    np.testing.assert_array_equal(r.completion_lengths_B, lengths)
    assert lengths.max() == 5
    np.testing.assert_array_equal(r.ended_B, np.asarray(whole().completion_lengths_B[:8]) <= 5)
    for b, length in enumerate(lengths):
        stop = int(r.prompt_lengths_B[b]) + length
        np.testing.assert_array_equal(r.tokens_BT[b, :stop], whole().tokens_BT[b, :stop])
        assert not np.asarray(r.tokens_BT[b, stop:]).any()
    for wrong in (0, NEW + 1):
        with pytest.raises(ValueError, match=f"max_new_tokens={wrong} of this call: it must be 1 to 70"):
            engine(4).generate(PARAMS, prompts(slice(0, 4)), KEY, max_new_tokens=wrong)


@pytest.mark.parametrize("slots", [3, 16])
def test_every_completion_ending_at_once_and_none_ending(slots):
    at_once = engine(4, slots=slots, end_ids=tuple(range(V))).generate(PARAMS, prompts(slice(0, 4)), KEY)
    assert at_once.completion_lengths_B.tolist() == [1] * 8
    assert at_once.ended_B.all()
    never = engine(4, slots=slots, end_ids=()).generate(PARAMS, prompts(slice(0, 4)), KEY)
    assert never.completion_lengths_B.tolist() == [NEW] * 8
    assert not never.ended_B.any()


def test_no_end_token_before_the_minimum():
    """A row whose end token comes after n others is as it was with a minimum of n, and goes on with n + 1."""
    lengths, ended = (np.asarray(x[:16]) for x in (whole().completion_lengths_B, whole().ended_B))
    row = int(np.flatnonzero(ended)[lengths[ended].argmax()])
    others = int(lengths[row]) - 1
    assert 3 < others < NEW - 1
    for minimum in (others, others + 1):
        r = engine(8, sampler=SamplerSettings(min_new_tokens=minimum)).generate(
            PARAMS, prompts(slice(8)), KEY
        )
        assert np.asarray(r.completion_lengths_B).min() > minimum
        length = int(r.completion_lengths_B[row])
        assert length == lengths[row] if minimum == others else length > lengths[row]
        unchanged = (lengths > minimum) | ~ended
        assert unchanged[row] == (minimum == others)
        np.testing.assert_array_equal(r.tokens_BT[unchanged], whole().tokens_BT[:16][unchanged])


def test_prompts_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"this engine takes \(4, 9\)"):
        engine(4).generate(PARAMS, prompts(slice(0, 3)), KEY)


def frequencies(settings, num=4000):
    logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
    keys = row_keys(KEY, jnp.arange(num), jnp.zeros(num, jnp.int32))
    tokens, logprobs = sample(jnp.tile(logits, (num, 1)), keys, jnp.zeros(num, jnp.int32), settings, (1,))
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
        (SamplerSettings(min_new_tokens=1), [4 / 7, 0, 2 / 7, 1 / 7]),
    ],
    ids=str,
)
def test_samplers_draw_from_what_they_say(settings, wanted):
    np.testing.assert_allclose(frequencies(settings), wanted, atol=0.03)


def test_blocks_of_the_vocabulary_are_drawn_by_their_share():
    """Against the distribution itself, over more than two blocks, the last of which is not whole."""
    num, v = 40_000, 300
    logits = 2 * jax.random.normal(jax.random.key(3), (v,))
    keys = row_keys(KEY, jnp.arange(num), jnp.zeros(num, jnp.int32))
    tokens, logprobs = sample(jnp.tile(logits, (num, 1)), keys, jnp.zeros(num, jnp.int32), SamplerSettings())
    np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits)[tokens], atol=1e-5)
    probs = np.asarray(jax.nn.softmax(logits))
    counts = np.bincount(np.asarray(tokens), minlength=v)
    likely = num * probs > 5
    chi2 = ((counts - num * probs) ** 2 / (num * probs))[likely].sum()
    assert abs(chi2 - likely.sum()) < 5 * np.sqrt(2 * likely.sum())
    # Which token of a block comes does not follow from which block: both draws are made with other numbers.
    inside = np.bincount(np.asarray(tokens)[np.asarray(tokens) < 128], minlength=128)
    share = probs[:128] / probs[:128].sum()
    np.testing.assert_allclose(inside / inside.sum(), share, atol=5 * np.sqrt(share.max() / inside.sum()))


def test_too_many_candidates_are_refused():
    with pytest.raises(ValueError, match="top_k=300"):
        SamplerSettings(top_k=300)


def test_completions_of_a_dataset_are_laid_out_like_sampled_ones():
    given = [[5, 6, 1], list(range(3, 30))]
    both = hosts.share(MESH, 2)
    r = from_completions(
        prompts(slice(0, 2)), given, max_new_tokens=20, end_ids=ENDS, pad_id=0, share=both, mesh=MESH
    )
    assert r.completion_lengths_B.tolist() == [3, 20]
    assert r.ended_B.tolist() == [True, False]  # too long: cut, and counted as truncated
    assert r.tokens_BT[0, 1:5].tolist() == [5, 6, 1, 0]
    assert r.tokens_BT[1, WIDTH:].tolist() == given[1][:20]
    assert np.asarray(r.completion_mask_BT).sum(1).tolist() == [3, 20]


# ---- How completions end


def decode(ids):
    """Letters, and a token of two."""
    return "".join("ab" if i == 30 else chr(ord("a") + i % 26) for i in ids)


@pytest.mark.parametrize(
    ("ids", "stops", "wanted"),
    [
        ([5, 6, 7, 8], ["gh"], 3),
        ([5, 6, 7, 8], ["h", "f"], 1),
        ([5, 6, 7, 8], ["zz"], None),
        ([5, 30, 7], ["a"], 2),  # the token that completes it, whatever else it brings
        ([5, 6, 7], ["fgh"], 3),
        ([5, 5, 5, 5], ["f"], 1),
    ],
)
def test_a_stop_text_ends_with_the_token_that_completes_it(ids, stops, wanted):
    assert stop_length(ids, decode, stops) == wanted


def test_what_follows_a_stop_text_is_cut_off():
    r = whole()
    assert cut_at_stops(r, decode, (), pad_id=0) is r
    cut = cut_at_stops(r, decode, ("k",), pad_id=0)
    stopped = 0
    for b in range(2 * NUM):
        start, length = int(r.prompt_lengths_B[b]), int(r.completion_lengths_B[b])
        ids = np.asarray(r.tokens_BT[b, start : start + length]).tolist()
        kept = next((n for n in range(1, length + 1) if "k" in decode(ids[:n])), length)
        stopped += "k" in decode(ids)
        assert int(cut.completion_lengths_B[b]) == kept
        assert bool(cut.ended_B[b]) == (bool(r.ended_B[b]) or "k" in decode(ids))
        np.testing.assert_array_equal(cut.tokens_BT[b, : start + kept], r.tokens_BT[b, : start + kept])
        assert not np.asarray(cut.tokens_BT[b, start + kept :]).any()
        assert not np.asarray(cut.sampler_logprobs_BT[b, start + kept :]).any()
        ended = bool(cut.ended_B[b])
        reason = "stop" if "k" in decode(ids) and ids[kept - 1] not in ENDS else "end" if ended else "length"
        assert finish_reason(ids[:kept], ended, ENDS) == reason
    assert 0 < stopped < 2 * NUM
    assert cut.tokens_BT.sharding == r.tokens_BT.sharding
