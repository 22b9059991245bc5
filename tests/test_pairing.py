"""Which student and teacher are refused, what is said of the others, and the self-check."""

import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
import yaml
from rich.console import Console
from safetensors.numpy import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from kdrl_jax.config import Config, load_config, load_run_config
from kdrl_jax.data.tokenizer import CharTokenizer
from kdrl_jax.data.tokenizer_hf import HFTokenizer
from kdrl_jax.data.tokenizer_metadata import TokenizerMetadata
from kdrl_jax.models.decoder_config import DecoderConfig
from kdrl_jax.pairing import Pairing, Side, compare
from kdrl_jax.self_check import LIMIT, same_model, self_check, self_divergence
from kdrl_jax.setup import make_setup
from kdrl_jax.train import train
from kdrl_jax.types import TrainingError

GOLDEN = Path(__file__).parent / "golden" / "llama"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(alphabet, vocab_size):
    """Words, spaces and runs of digits, in bytes, merged."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["123 1234 and 12 more: what is the sum?", "the sum is 123"] * 3, trainer)
    return backend.to_str()


LARGE = byte_level(pre_tokenizers.ByteLevel.alphabet(), 300)
SIZE = len(json.loads(LARGE)["model"]["vocab"])


def tokenizer(edit=None, *, eos="<|im_end|>", bos=False, template=None, end_ids=()):
    tree = json.loads(LARGE)
    if edit is not None:
        edit(tree)
    metadata = TokenizerMetadata(
        tokens={"eos_token": eos, "bos_token": "<|endoftext|>"},
        add_bos=bos,
        end_ids=end_ids,
        chat_template=template,
    )
    return HFTokenizer(tokenizers.Tokenizer.from_str(json.dumps(tree)), metadata, "tokenizer.json")


def pair(student, teacher, *, used=None, widths=(SIZE + 20, SIZE + 20), longest=64, same_end=True, **options):
    configs = [DecoderConfig(width, 8, 8, 1, 1, 1, 8, max_positions=64) for width in widths]
    sides = [Side("student", configs[0], student), Side("teacher", configs[1], teacher)]
    return compare(used or student, sides, same_end=same_end, longest=longest, **options)


def renamed(count):
    """`count` bytes that no merge needs get another string."""

    def edit(tree):
        vocab, merged = tree["model"]["vocab"], {part for m in tree["model"]["merges"] for part in m}
        free = [t for t, i in vocab.items() if len(SPECIAL) <= i < len(SPECIAL) + 256 and t not in merged]
        for token in free[:count]:
            vocab[f"other {token}"] = vocab.pop(token)

    return edit


def swapped(tree):
    vocab = tree["model"]["vocab"]
    a, b = (next(t for t, i in vocab.items() if i == wanted) for wanted in (10, 12))
    vocab[a], vocab[b] = 12, 10


def added(*strings, special=True):
    def edit(tree):
        for i, string in enumerate(strings):
            tree["added_tokens"].append(
                {**tree["added_tokens"][0], "id": SIZE + i, "content": string, "special": special}
            )

    return edit


def ordinary_think(tree):
    tree["added_tokens"][SPECIAL.index("<think>")]["special"] = False


def no_merges(tree):
    tree["model"]["merges"] = []


def digit_by_digit(tree):
    digits = {"type": "Digits", "individual_digits": True}
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, tree["pre_tokenizer"]]}


def composed(tree):
    tree["normalizer"] = {"type": "NFC"}


class TestRefused:
    @pytest.mark.parametrize(("count", "shown"), [(1, 1), (12, 10)])
    def test_tokens_that_differ(self, count, shown):
        found = pair(tokenizer(), tokenizer(renamed(count)))
        [problem] = found.problems
        assert f"student and teacher do not share a vocabulary: {count} of {SIZE} tokens differ" in problem
        assert problem.count("' vs ") + problem.count('" vs ') == shown
        assert not found.notes  # of a pair that is refused, nothing else matters

    def test_two_ids_swapped(self):
        [problem] = pair(tokenizer(), tokenizer(swapped)).problems
        strings = tokenizer().token_strings()
        assert f" 10: {strings[10]!r} vs {strings[12]!r}; 12: {strings[12]!r} vs {strings[10]!r}." in problem

    def test_a_token_more(self):
        [problem] = pair(tokenizer(), tokenizer(added("<tool_call>"))).problems
        assert f"{SIZE}: '' vs '<tool_call>'" in problem
        [problem] = pair(tokenizer(added("<tool_call>")), tokenizer()).problems
        assert f"{SIZE}: '<tool_call>' vs ''" in problem

    def test_end_ids_unless_they_are_not_distilled(self):
        student, teacher = tokenizer(), tokenizer(eos="<|endoftext|>")
        [problem] = pair(student, teacher).problems
        assert "student {2: '<|im_end|>'} vs teacher {0: '<|endoftext|>'}" in problem
        assert "kd.end_token=false" in problem
        assert pair(student, teacher, same_end=False).problems == ()
        # The order says which to train on first, not what they mean.
        assert pair(tokenizer(end_ids=(0,)), tokenizer(eos="<|endoftext|>", end_ids=(2,))).problems == ()

    def test_the_tokenizer_that_the_config_names(self):
        """It is compared with both models' own, and the messages say whose is whose."""
        found = pair(tokenizer(), tokenizer(), used=CharTokenizer())
        assert len(found.problems) == 4
        assert "student and run do not share" in found.problems[0]
        assert "1: '<|im_start|>' vs '<end>'" in found.problems[0]
        assert "run and teacher do not share" in found.problems[2]
        assert "1: '<end>' vs '<|im_start|>'" in found.problems[2]
        assert pair(tokenizer(), tokenizer(), used=tokenizer()) == Pairing(SIZE, (), ())

    def test_rows_that_are_too_long_and_models_that_are_too_narrow(self):
        found = pair(tokenizer(), tokenizer(), longest=65, widths=(SIZE, SIZE - 1))
        assert len(found.problems) == 3
        assert "student was made for 64 positions" in found.problems[0]
        assert f"{SIZE} tokens, but the teacher has rows for {SIZE - 1}" in found.problems[1]
        assert "teacher was made for 64 positions" in found.problems[2]


class TestPadding:
    def test_ids_without_meaning_may_differ(self):
        padded = tokenizer(added("<|reserved_special_token_0|>", "[PAD301]"))
        assert padded.vocab_size == SIZE + 2
        assert pair(tokenizer(), padded) == Pairing(SIZE, (), ())
        assert pair(padded, tokenizer()) == Pairing(SIZE + 2, (), ())

    def test_heads_of_different_widths(self):
        found = pair(tokenizer(), tokenizer(), widths=(SIZE + 4, SIZE + 20))
        assert found.problems == ()
        [note] = found.notes
        columns = f"{SIZE + 4} (student) and {SIZE + 20} (teacher)"
        assert note == f"{SIZE} shared tokens; heads of {columns} columns, padding masked"

    def test_padding_for_which_a_model_has_no_column_is_masked(self):
        padded = tokenizer(added("<|reserved_special_token_0|>", "<|reserved_special_token_1|>"))
        # Its padding id is one of them and stands in rows, so that one column is needed.
        assert padded.pad_id == SIZE
        assert pair(padded, tokenizer(), widths=(SIZE + 2, SIZE + 1)).num_tokens == SIZE + 1
        assert "tokens, but the teacher" in pair(padded, tokenizer(), widths=(SIZE + 2, SIZE)).problems[0]


class TestNotes:
    def test_a_pair_that_reads_the_same_gives_none(self):
        same = [tokenizer(template=CHATML, bos=True) for _ in range(2)]
        assert pair(*same) == Pairing(SIZE, (), ())
        assert pair(tokenizer(), None) == Pairing(SIZE, (), ())

    def test_a_token_that_is_special_for_one(self):
        found = pair(tokenizer(), tokenizer(ordinary_think))
        assert found.problems == ()
        [note] = found.notes
        assert "1 tokens are special for the student and ordinary text for the teacher" in note
        assert "first 3: '<think>'." in note
        [note] = pair(tokenizer(ordinary_think), tokenizer()).notes
        assert "special for the teacher and ordinary text for the student" in note

    @pytest.mark.parametrize(
        ("edit", "ours", "theirs"),
        [
            (no_merges, "[' 123', ' 1234', ", "[' ', '1', '2', '3', ' ', '1']"),
            (digit_by_digit, "[' 123', ' 1234', ", "[' ', '1', '2', '3', ' ', '1']"),
            (composed, "['e', 'Ì', 'ģ', ", "['Ã', '©', "),
        ],
    )
    def test_the_same_tokens_for_other_pieces_of_text(self, edit, ours, theirs):
        student, teacher = tokenizer(), tokenizer(edit)
        assert student.token_strings() == teacher.token_strings()
        found = pair(student, teacher)
        assert found.problems == ()
        [note] = found.notes
        assert f"by the student, {ours}" in note
        assert f"by the teacher, {theirs}" in note

    def test_a_chat_template_that_is_not_the_students(self):
        base, instruct = tokenizer(), tokenizer(template=CHATML)
        [note] = pair(base, instruct, prompt_template="Q: {question}").notes
        assert "written as the student has them, 'Q: What is 12 + 7?'" in note
        assert "by the teacher's own chat template they would be '<|im_start|>user\\nQ: What is 12" in note
        [note] = pair(instruct, base).notes
        assert "as the student has them, '<|im_start|>user" in note
        assert pair(base, instruct, chat="none").notes == ()
        # Only what differs of two long ones is shown.
        short = tokenizer(template=CHATML.replace("assistant", "model"))
        [note] = pair(instruct, short).notes
        assert "as the student has them, '…im_start|>assistant\\n'; by the teacher" in note
        assert "would be '…im_start|>model\\n'." in note

    def test_a_chat_template_of_the_teacher_that_fails_stops_nothing(self):
        broken = tokenizer(template="{{ raise_exception('no') }}")
        assert pair(tokenizer(), broken) == Pairing(SIZE, (), ())

    def test_bos(self):
        [note] = pair(tokenizer(), tokenizer(bos=True)).notes
        assert "begin with no BOS as the student has it" in note
        assert "with BOS '<|endoftext|>'" in note
        # A chat template decides by itself.
        assert pair(tokenizer(template=CHATML), tokenizer(template=CHATML, bos=True)).notes == ()


def model_folder(folder, *, change=None, edit=None):
    """tests/golden/llama (96 columns) with a tokenizer of digits and signs."""
    folder.mkdir()
    tensors = load_file(GOLDEN / "model.safetensors")
    config = json.loads((GOLDEN / "config.json").read_text())
    if change is not None:
        change(tensors)
        config["vocab_size"] = len(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    tree = json.loads(byte_level(list("0123456789+=#,Ċ"), 40))
    if edit is not None:
        edit(tree)
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return str(folder)


def run_config(folder, student, teacher, *overrides) -> Config:
    tree = {
        "name": "pair",
        "student": {"path": student},
        "teacher": {"path": teacher},
        "data": {"train": [{"kind": "task", "task": "chain_sum", "max_terms": 3}], "max_prompt_tokens": 8},
        "rollout": {"group_size": 2, "max_new_tokens": 8, "decode_chunk": 4},
        "reward": {"num_workers": 1},
        "kd": {"coef": 1.0},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"num_steps": 1, "prompts_per_iteration": 8, "diagnostics_every": 0},
        "log": {"dir": str(folder / "run"), "rollouts_every": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return load_config(folder / "config.yaml", overrides)


def parts(setup, params=None):
    """What the self-check takes; the student's own parameters by default."""
    params = setup.student_params(setup.init_trainable()) if params is None else params
    return setup.config, setup.student, params, setup.teacher, setup.head, setup.mesh


def printed_at_start(config, **options):
    """What a run says that is asked to stop before its first step."""
    out = io.StringIO()
    assert not train(config, Console(file=out), lambda: True, **options)
    assert "stopped and saved at step 0" in out.getvalue()
    return out.getvalue()


def nan_weights(tensors):
    tensors["model.norm.weight"][:] = np.nan


def test_nothing_is_loaded_of_a_pair_that_is_refused(tmp_path):
    """The teacher's weights cannot be loaded, which shows only where its tokenizer is the student's."""
    student = model_folder(tmp_path / "student")
    other = model_folder(tmp_path / "other", change=nan_weights, edit=swapped)
    same = model_folder(tmp_path / "same", change=nan_weights)
    with pytest.raises(ValueError, match="do not share a vocabulary: 2 of") as refused:
        make_setup(run_config(tmp_path, student, other))
    assert "NaN" not in str(refused.value)
    with pytest.raises(ValueError, match=r"NaN .* in model\.norm\.weight"):
        make_setup(run_config(tmp_path, student, same))
    assert not (tmp_path / "run").exists()


def test_heads_padded_to_different_widths_agree(tmp_path):
    """The same weights in heads of 96 and 112 columns, whatever the columns after the vocabulary hold."""

    def widen(tensors):
        rng = np.random.default_rng(0)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = np.pad(tensors[name], ((0, 16), (0, 0)))
            rows[40:] = 30 * rng.standard_normal(rows[40:].shape)
            tensors[name] = rows

    plain, wide = model_folder(tmp_path / "a"), model_folder(tmp_path / "b", change=widen)
    for student, teacher, widths in ((plain, wide, "96 .* 112"), (wide, plain, "112 .* 96")):
        setup = make_setup(run_config(tmp_path, student, teacher))
        assert setup.num_tokens <= 40
        assert len(setup.notes) == 1
        assert abs(self_divergence(*parts(setup))) < 1e-7, widths


def test_a_run_whose_teacher_is_its_student_is_checked_at_its_start(tmp_path):
    path = model_folder(tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    config = run_config(tmp_path, path, str(tmp_path / "link"), "teacher.compute_dtype=bfloat16")
    text = printed_at_start(config)
    [line] = [line for line in text.splitlines() if "self-check" in line]
    assert 0 < float(line.split("KL ")[1].split()[0]) < 5e-3
    assert "self-check" not in printed_at_start(load_run_config(tmp_path / "run"))


def test_notes_are_printed(tmp_path):
    student = model_folder(tmp_path / "student")
    teacher = model_folder(tmp_path / "teacher", edit=ordinary_think)
    text = printed_at_start(run_config(tmp_path, student, teacher))
    assert text.count("pair: 1 tokens are special for the student") == 1
    assert "self-check" not in text


def test_a_student_that_differs_from_its_own_weights_is_not_trained(tmp_path):
    path = model_folder(tmp_path / "model")
    setup = make_setup(run_config(tmp_path, path, path))
    params = setup.student_params(setup.init_trainable())
    assert abs(self_divergence(*parts(setup, params))) < 1e-7
    assert "student = teacher" in str(self_check(*parts(setup, params)))
    for damage, least in ((lambda x: 1.2 * x, 1e-5), (lambda x: x * np.nan, None)):
        damaged = {**params, "final_norm": damage(params["final_norm"])}
        with pytest.raises(
            TrainingError, match=r"KL\(student \|\| teacher\) is .*nothing was trained"
        ) as error:
            self_check(*parts(setup, damaged))
        assert "\n" not in str(error.value)
        assert least is None or self_divergence(*parts(setup, damaged)) > least


def test_bfloat16_has_a_limit_of_its_own(tmp_path):
    path = model_folder(tmp_path / "model")
    setup = make_setup(run_config(tmp_path, path, path, "teacher.compute_dtype=bfloat16"))
    params = setup.student_params(setup.init_trainable())
    assert LIMIT["float32"] < self_divergence(*parts(setup, params)) < 5e-3
    assert "self-check: student = teacher" in str(self_check(*parts(setup, params)))
    noisy = jax.tree.map(lambda x: x * (1 + 0.5 * np.sin(np.arange(x.size)).reshape(x.shape)), params)
    with pytest.raises(TrainingError, match="float32 and bfloat16"):
        self_check(*parts(setup, noisy))


@pytest.mark.parametrize(
    ("student", "teacher", "same"),
    [
        ({"path": "a/b"}, {"path": "./a/b"}, True),
        ({"path": "a"}, {"path": "b"}, False),
        ({"path": "a"}, {"path": "a", "compute_dtype": "bfloat16"}, True),
        ({"path": "a", "keep_layers": ["0-2"]}, {"path": "a", "keep_layers": [0, 1, 2]}, True),
        ({"path": "a", "keep_layers": ["0-2"]}, {"path": "a"}, False),
        ({"path": "a", "sha256": "0" * 64}, {"path": "b", "sha256": "0" * 64}, True),
        ({"path": "a"}, {"run": "{run}"}, False),
        ({"run": "{run}"}, {"run": "{run}/."}, True),
        (
            {"run": "sft.yaml"},
            {"run": "sft.yaml"},
            False,
        ),  # trained apart, one in `student`, one in `teacher`
    ],
)
def test_which_models_are_the_same(tmp_path, student, teacher, same):
    models = {
        role: {k: v.format(run=tmp_path) if k == "run" else v for k, v in model.items()}
        for role, model in (("student", student), ("teacher", teacher))
    }
    config = run_config(tmp_path, "x", "y")
    changed = {role: type(config.student).model_validate(model) for role, model in models.items()}
    assert same_model(config.model_copy(update=changed)) is same
    assert not same_model(config.model_copy(update={"teacher": None}))
