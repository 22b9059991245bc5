"""Published question sets: where each lies on the Hugging Face hub, and which of its fields is what.

A row is nothing but settings of a source (`data.StoredConfig`, `data.HubSourceConfig`) under a name, which a
source takes over by `mapping: NAME` and may give otherwise. Fields are as the data set's own page or public
code reads them, cited beside each. The hub itself could not be asked when this was written: a field that is
not there is an error that names those that are.
"""

from typing import Any

MAPPINGS: dict[str, dict[str, Any]] = {
    # Cobbe et al., arXiv 2110.14168: `answer` is the worked solution with `#### 18` at its end
    # (github.com/openai/grade-school-math; verl's examples/data_preprocess/gsm8k.py).
    "gsm8k": {
        "name": "openai/gsm8k",
        "config": "main",
        "question_field": "question",
        "answer_field": "answer",
        "answer_part": "marked",
        "completion_field": "answer",
    },
    # Hendrycks et al., arXiv 2103.03874: the answer is the last \boxed{} of `solution`. lighteval/MATH is no
    # longer there; this is what verl loads (its examples/data_preprocess/math_dataset.py).
    "math": {
        "name": "DigitalLearningGmbH/MATH-lighteval",
        "question_field": "problem",
        "answer_field": "solution",
        "answer_part": "marked",
        "completion_field": "solution",
    },
    # 40,315 rows of `problem`, `answer`, `solution` (recipe/spo/data_preprocess/deepscaler.py of
    # github.com/befocuss/Deep-GRPO; the page of its copy WaltonFuture/DeepScaleR on the hub). Discussion 4 on
    # the hub: "There are no answers for 6 samples". Not verified: whether every `solution` is written out, so
    # none is taken as a completion.
    "deepscaler": {
        "name": "agentica-org/DeepScaleR-Preview-Dataset",
        "question_field": "problem",
        "answer_field": "answer",
        "max_bad_rows": 6,
    },
    # The 30 problems of 2024, in a split called train: `problem`, `solution`, `answer` (its page on the hub;
    # src/lighteval/tasks/tasks/aime.py of github.com/huggingface/lighteval). Answers are written with three
    # digits, as on the answer sheet: 025.
    "aime": {
        "name": "HuggingFaceH4/aime_2024",
        "question_field": "problem",
        "answer_field": "answer",
        "answer_part": "integer",
    },
    # 83 problems of AMC 12 of 2022 and 2023, in a split called train: `problem`, `answer`
    # (skythought/tools/tasks/amc23/amc23.yaml of github.com/NovaSky-AI/SkyThought; its page on the hub). Not
    # verified: that answers are numbers such as 142.0, as loaders suggest that turn them into text.
    "amc": {
        "name": "AI-MO/aimo-validation-amc",
        "question_field": "problem",
        "answer_field": "answer",
        "answer_part": "integer",
    },
    # He et al., arXiv 2402.14008; its part that is open-ended (OE), of text only (TO), in English: 674 rows
    # in a split called train (the viewer on the hub), with `question`, `final_answer`, a list of text, and
    # `is_multiple_answer` (the page of its copy macabdul9/OlympiadBenchMath). Rows with several answers are
    # left out: verifiers compare one.
    "olympiadbench": {
        "name": "Hothan/OlympiadBench",
        "config": "OE_TO_maths_en_COMP",
        "question_field": "question",
        "answer_field": "final_answer.0",
        "where": {"is_multiple_answer": False},
    },
    # The 272 questions from OpenCourseWare of Lewkowycz et al., arXiv 2206.14858: `question`, `answer`
    # (skythought/evals/tasks/minervamath/minervamath.yaml of github.com/NovaSky-AI/SkyThought).
    "minerva": {
        "name": "math-ai/minervamath",
        "split": "test",
        "question_field": "question",
        "answer_field": "answer",
    },
    # Albalak et al., arXiv 2502.17387: 251,122 rows of `problem`, `answer`, `source`, `domain` and
    # `llama8b_solve_rate`, the share of an 8B Llama's samples that were right (its page on the hub); null in
    # some rows, as loaders test for it.
    "bigmath": {
        "name": "SynthLabsAI/Big-Math-RL-Verified",
        "question_field": "problem",
        "answer_field": "answer",
        "solve_rate_field": "llama8b_solve_rate",
    },
}
"""Name -> settings. What is not said is the setting's default: `split` is train."""
