"""What is written of each token of logged rollouts, against a plain computation of it."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import SHAPE, TASK, TREE, run

from kdrl_jax.data.tokenizer import CharTokenizer
from kdrl_jax.data.tokenizer_hf import HFTokenizer
from kdrl_jax.data.tokenizer_metadata import TokenizerMetadata
from kdrl_jax.data.tokenizer_pieces import TokenPieces
from kdrl_jax.logged import LEAST, NUM_TOP, LoggedRollouts, _rank, _short

QUIET = {"eval": {"every": 0, "agreement": False}, "data": {"eval": []}}
TWO = {
    "a": {"architecture": {**SHAPE, "hidden_size": 32}},
    "b": {"architecture": {**SHAPE, "hidden_size": 24}},
}


def observed(folder, monkeypatch, **sections):
    """(what `records` was called with, the rows it gave) of each logged iteration of a run."""
    seen, records = [], LoggedRollouts.records

    def watched(self, sampled, step, params, temperature):
        rows = records(self, sampled, step, params, temperature)
        kept = jax.tree.map(lambda x: np.array(x), (sampled.rollouts, params))
        seen.append((self, sampled, kept, temperature, rows))
        return rows

    monkeypatch.setattr(LoggedRollouts, "records", watched)
    assert run(folder, "run", **{**QUIET, **sections})[1]
    return seen


COMPILED = {}


def plain(model, params, tokens_BT, temperature):
    """Log-probabilities [B, T, V] of what follows each position, all at once; padding comes after it."""
    compiled = COMPILED.setdefault(id(model), jax.jit(functools.partial(_plain, model)))
    return np.asarray(compiled(jax.tree.map(np.asarray, params), tokens_BT, temperature))


def _plain(model, params, tokens_BT, temperature):
    decoder = model.bind(params)
    head = decoder.output_head()
    kernel = head.kernel.T if head.tied else head.kernel
    logits = decoder.hidden(tokens_BT).astype(jnp.float32) @ kernel.astype(jnp.float32)
    return jax.nn.log_softmax(logits / temperature)


def check(seen, weights):
    """Every number of every row against `plain`."""
    for logged, sampled, (rollouts, params), temperature, rows in seen:
        assert len(rows) == len(logged._rows) > 0
        tokens, s = rollouts.tokens_BT[logged._rows], logged._setup
        ours = plain(s.student, params, tokens, temperature)
        theirs = [plain(t.model, t.params, tokens, temperature) for t in s.teachers.values()]
        for i, (b, row) in enumerate(zip(logged._rows, rows, strict=True)):
            start, n = int(rollouts.prompt_lengths_B[b]), int(rollouts.completion_lengths_B[b])
            ids, at = tokens[i, start : start + n], np.arange(start - 1, start + n - 1)
            student, each = ours[i, at], [x[i, at] for x in theirs]
            share = weights(sampled.sources[b])
            teacher = np.log(sum(w * np.exp(x) for w, x in zip(share, each, strict=True)))
            found = row["tokens"]
            assert "".join(found["texts"]) == row["completion"]
            assert len(found["texts"]) == n
            kl = (np.exp(student) * (student - teacher)).sum(-1)
            np.testing.assert_allclose(found["reverse_kl"], kl, rtol=6e-3, atol=1e-5)
            picked = np.take_along_axis(teacher, ids[:, None], 1)[:, 0]
            np.testing.assert_allclose(found["teacher_logprobs"], picked, rtol=6e-3, atol=1e-4)
            own = np.take_along_axis(student, ids[:, None], 1)[:, 0]
            by_teacher = row["sampler"] == "teacher"
            np.testing.assert_allclose(found["logprobs"], picked if by_teacher else own, rtol=6e-3, atol=1e-3)
            if by_teacher:
                np.testing.assert_allclose(found["student_logprobs"], own, rtol=6e-3, atol=1e-3)
            assert ("student_logprobs" in found) == by_teacher
            strings = s.tokenizer.token_strings()
            for t, top in enumerate(found["teacher_top"]):
                best = np.argsort(-teacher[t])[:NUM_TOP]
                best = [i for k, i in enumerate(best) if k == 0 or np.exp(teacher[t, i]) >= LEAST]
                assert found["teacher_rank"][t] == (best.index(ids[t]) if ids[t] in best else None)
                assert [name for name, _, _ in top] == [strings[i] for i in best]
                np.testing.assert_allclose([p for _, p, _ in top], np.exp(teacher[t, best]), rtol=6e-3)
                np.testing.assert_allclose([q for _, _, q in top], np.exp(student[t, best]), rtol=6e-3)


def test_tokens_are_as_a_plain_computation_finds_them(tmp_path, monkeypatch):
    """Whatever the temperature, in whole groups; of the parameters before the update."""
    falling = {"kind": "linear", "start": 1.3, "end": 0.7, "steps": 4}
    seen = observed(
        tmp_path,
        monkeypatch,
        rollout={"temperature": falling},
        log={"rollouts_every": 2, "rollouts_rows": 7},
        optimizer={"learning_rate": 0.03},
    )
    assert [len(rows) for *_, rows in seen] == [6, 6, 6], "three whole groups of two"
    check(seen, lambda source: [1.0])
    # The check sees a shift by one token, and parameters of another step.
    shifted = [(*rest, [{**r, "tokens": rolled(r["tokens"])} for r in rows]) for *rest, rows in seen]
    with pytest.raises(AssertionError):
        check(shifted, lambda source: [1.0])
    later = [(a, b, (c[0], seen[-1][2][1]), t, rows) for a, b, c, t, rows in seen]
    with pytest.raises(AssertionError):
        check(later, lambda source: [1.0])
    for *_, rows in seen:
        rewards = np.array([r["reward"] for r in rows]).reshape(-1, 2)
        advantages = np.array([r["advantage"] for r in rows]).reshape(-1, 2)
        np.testing.assert_allclose(advantages.sum(1), 0, atol=1e-3)
        assert ((advantages[:, 0] > 0) == (rewards[:, 0] > rewards[:, 1])).all()


def test_what_the_teacher_has_drawn_is_told_apart_from_what_the_student_says(tmp_path, monkeypatch):
    train = {**TREE["train"], "num_steps": 1, "diagnostics_every": 0}
    sections = {"rl": {"coef": 0.0}, "sft": {"coef": 1.0}, "kd": {"estimator": "full"}, "train": train}
    seen = observed(tmp_path, monkeypatch, rollout={"source": "teacher"}, **sections)
    assert {row["sampler"] for *_, rows in seen for row in rows} == {"teacher"}
    check(seen, lambda source: [1.0])


def test_a_number_that_is_not_finite_is_written_as_none():
    assert [_short(x) for x in (float("nan"), float("-inf"), 1.23456)] == [None, None, 1.23]


def test_the_rank_is_of_the_token_and_not_of_its_text():
    """Both halves of a character read as nothing, and the first as another token by itself."""
    top_ids = np.array([7, 3, 9])
    assert [_rank(token, top_ids, 2) for token in (7, 3, 9, 1)] == [0, 1, None, None]


def rolled(tokens):
    return {**tokens, "reverse_kl": [*tokens["reverse_kl"][1:], tokens["reverse_kl"][0]]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixture", "own"])
def test_several_teachers_that_wait_in_host_memory(tmp_path, monkeypatch, kind):
    """Each source's own, or all of them weighed; on a mesh of several devices."""
    sections = {"teacher": None, "teachers": TWO, "mesh": {"fsdp": 4, "data": 2}}
    if kind == "mixture":
        sections["kd"] = {"mixture": {"a": 3.0, "b": 1.0}}
        check(observed(tmp_path, monkeypatch, **sections), lambda source: [0.75, 0.25])
        return
    train = [{**TASK, "teacher": "a"}, {**TASK, "split": "heldout", "teacher": "b"}]
    sections["data"] = {"train": train, "eval": []}
    seen = observed(tmp_path, monkeypatch, **sections)
    owners = seen[0][0]._teacher_of
    assert len({owners[s] for x in seen for s in x[1].sources}) == 2
    check(seen, lambda source: [float(owners[source] == "a"), float(owners[source] == "b")])


@pytest.mark.slow
def test_without_a_teacher_there_are_log_probabilities_alone(tmp_path, monkeypatch):
    (first, *_) = observed(
        tmp_path, monkeypatch, teacher=None, kd={"coef": 0.0}, train={**TREE["train"], "num_steps": 1}
    )
    assert set(first[-1][0]["tokens"]) == {"texts", "names", "logprobs"}
    monkeypatch.undo()
    run(tmp_path, "off", **QUIET, train={**TREE["train"], "num_steps": 1}, log={"rollouts_tokens": False})
    rows = [json.loads(line) for line in (tmp_path / "off" / "rollouts" / "step_000000.jsonl").open()]
    assert rows
    assert all("tokens" not in row and "advantage" in row for row in rows)


def byte_level():
    """A tokenizer of bytes, two of which are joined in one token with half a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(["<end>", *letters])}
    vocab["aÃ"] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "Ã")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    return HFTokenizer(backend, TokenizerMetadata(tokens={"eos_token": "<end>"}), "here")


TEXTS = ["plain words", "né à 東京 🙂🙂 done", " leading", "aé" * 40, "", "x" * 100 + "🙂"]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_pieces_join_to_the_text(text):
    tokenizer = byte_level()
    pieces = TokenPieces(tokenizer)
    ids = [*tokenizer.encode(text), *tokenizer.end_ids]
    for cut in {len(ids), max(len(ids) - 2, 1), max(len(ids) - 3, 1)}:
        found = pieces.split(ids[:cut])
        assert "".join(found) == tokenizer.decode(ids[:cut])
        assert len(found) == cut
        assert pieces._from_start(ids[:cut], tokenizer.decode(ids[:cut])) is not None
    assert "".join(pieces._from_start(ids, text)) == text


def test_half_a_character_and_an_end_have_names():
    tokenizer = byte_level()
    pieces = TokenPieces(tokenizer)
    ids = tokenizer.encode("é")
    assert pieces.split(ids) == ["", "é"]
    assert pieces.name(ids[0]) == "Ã"
    assert pieces.name(tokenizer.end_ids[0]) == "<end>"
    assert pieces.name(tokenizer.encode(" ")[0]) == " "
    assert TokenPieces(CharTokenizer()).name(1) == "<end>"
