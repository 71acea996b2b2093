"""Five benchmarks as tasks for lm-eval, with the prompts of the authors' evaluation.

Each prompt is one user message: the solved examples, if any, and the question. Everything in it is one prefix block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .scoring import LETTERS, letter_scorer, score_drop, score_gsm8k, score_math


SUBJECTS = """abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management marketing
medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory professional_accounting
professional_law professional_medicine professional_psychology public_relations security_studies sociology
us_foreign_policy virology world_religions""".split()  # noqa: SIM905 - a page of quotes otherwise
MATH_PARTS = """algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra
precalculus""".split()  # noqa: SIM905
# Longest new answer in tokens. The authors bound prompt and answer together, by 3,072; of reasoning, most is answer.
LONG_ANSWER = 2048
SHORT_ANSWER = 256


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        condition: how the prompt is tagged.
        shots: solved examples before the question.
        metric: which of its metrics the published figure is.
        published: that figure, in per cent.
        macro: whether the score is the mean over its parts rather than over questions.
    """

    condition: str
    shots: int
    metric: str
    published: float
    macro: bool = False


BENCHMARKS = {
    "math": Benchmark("synth,cot", 0, "acc", 56.2),
    "gsm8k": Benchmark("synth,cot", 0, "acc", 84.5),
    "arc": Benchmark("direct", 25, "acc", 81.9),
    "drop": Benchmark("direct", 3, "f1", 82.2),
    "mmlu": Benchmark("direct", 5, "acc", 60.7, macro=True),
}


def arc_choices(doc: dict[str, Any]) -> tuple[list[str], int]:
    return doc["choices"]["text"], doc["choices"]["label"].index(doc["answerKey"])


def mmlu_choices(doc: dict[str, Any]) -> tuple[list[str], int]:
    return doc["choices"], doc["answer"]


def one_of_each_passage(rows: Any) -> list[dict[str, Any]]:
    """Documents of DROP, the first of each passage: solved examples about different passages."""
    from lm_eval.tasks.drop.utils import process_docs

    seen: dict[str, dict[str, Any]] = {}
    for row in process_docs(rows.select(range(min(len(rows), 500)))):
        seen.setdefault(row["passage"], row)
    return list(seen.values())


def tasks(name: str, context: int, data: Path | None = None) -> list[dict[str, Any]]:
    """Configurations for `lm_eval.simple_evaluate` that together are one benchmark.

    Args:
        name: a key of `BENCHMARKS`.
        context: tokens that the model has room for; an answer gets at most half of them.
        data: a folder with `NAME.jsonl` and, where there are solved examples, `NAME_shots.jsonl`, whose rows are used
            in order, in the columns of the public data set; None takes that data set from the Hub.

    Raises:
        ValueError: a file is missing in `data`.
    """
    build = {"gsm8k": _gsm8k, "math": _math, "drop": _drop, "arc": _arc, "mmlu": _mmlu}[name]
    limits = {"long": min(LONG_ANSWER, context // 2), "short": min(SHORT_ANSWER, context // 2)}
    if data is None:
        return build(limits)
    wanted = {"test": data / f"{name}.jsonl"}
    if BENCHMARKS[name].shots:
        wanted["shots"] = data / f"{name}_shots.jsonl"
    for path in wanted.values():
        if not path.is_file():
            raise ValueError(f"{path} is missing: rows of {name} are read from there")
    local = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {key: str(path) for key, path in wanted.items()}},
    }
    first = {**build(limits)[0], "task": f"hrm_text_{name}", "dataset_name": None, **local, "test_split": "test"}
    first.pop("validation_split", None)
    if "shots" in wanted:
        shots = len(wanted["shots"].read_text(encoding="utf-8").splitlines())
        first |= {
            "fewshot_split": "shots",
            "num_fewshot": min(BENCHMARKS[name].shots, shots),
            "fewshot_config": {"sampler": "first_n"},
        }
    return [first]


def _task(name: str, tokens: int, scorer: Callable[..., dict[str, float]], **fields: Any) -> dict[str, Any]:
    # The end token ends an answer; no text does.
    generation = {"until": [], "do_sample": False, "max_gen_toks": tokens}
    metrics = ("em", "f1") if scorer is score_drop else ("acc", "invalid")
    return {
        "task": f"hrm_text_{name}",
        "output_type": "generate_until",
        "process_results": scorer,
        "generation_kwargs": generation,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
        "num_fewshot": 0,
        **fields,
    }


def _gsm8k(limits: dict[str, int]) -> list[dict[str, Any]]:
    return [
        _task(
            "gsm8k",
            limits["long"],
            score_gsm8k,
            dataset_path="openai/gsm8k",
            dataset_name="main",
            test_split="test",
            doc_to_text=lambda doc: doc["question"].strip(),
            doc_to_target="{{answer}}",
        )
    ]


def _math(limits: dict[str, int]) -> list[dict[str, Any]]:
    return [
        _task(
            f"math_{part}",
            limits["long"],
            score_math,
            dataset_path="EleutherAI/hendrycks_math",
            dataset_name=part,
            test_split="test",
            doc_to_text=lambda doc: doc["problem"].strip(),
            doc_to_target="{{solution}}",
        )
        for part in MATH_PARTS
    ]


def _drop(limits: dict[str, int]) -> list[dict[str, Any]]:
    from lm_eval.tasks.drop.utils import process_docs

    return [
        _task(
            "drop",
            limits["short"],
            score_drop,
            dataset_path="EleutherAI/drop",
            validation_split="validation",
            process_docs=process_docs,
            fewshot_split="train",
            fewshot_config={"sampler": "first_n", "process_docs": one_of_each_passage},
            num_fewshot=BENCHMARKS["drop"].shots,
            doc_to_text=lambda doc: f"{doc['passage']}\nQ: {doc['question']}\nA:",
            doc_to_target=lambda doc: ", ".join(doc["answers"][0]),
        )
    ]


def _arc(limits: dict[str, int]) -> list[dict[str, Any]]:
    return [
        _letters(
            "arc",
            arc_choices,
            dataset_path="allenai/ai2_arc",
            dataset_name="ARC-Challenge",
            test_split="test",
            fewshot_split="validation",
            num_fewshot=BENCHMARKS["arc"].shots,
        )
    ]


def _mmlu(limits: dict[str, int]) -> list[dict[str, Any]]:
    return [
        _letters(
            f"mmlu_{subject}",
            mmlu_choices,
            dataset_path="cais/mmlu",
            dataset_name=subject,
            test_split="test",
            fewshot_split="dev",
            # Five of its long examples do not leave room for the question.
            num_fewshot=3 if subject == "high_school_european_history" else BENCHMARKS["mmlu"].shots,
        )
        for subject in SUBJECTS
    ]


def _letters(name: str, choices: Callable[[dict[str, Any]], tuple[list[str], int]], **fields: Any) -> dict[str, Any]:
    """A choice among lettered answers, of which the model writes the letter: one token."""

    def question(doc: dict[str, Any]) -> str:
        lines = [
            doc["question"].strip(),
            *(f"{letter}. {text.strip()}" for letter, text in zip(LETTERS, choices(doc)[0])),
        ]
        return "\n".join([*lines, "Answer:"])

    return _task(
        name,
        1,
        letter_scorer(choices),
        doc_to_text=question,
        doc_to_target=lambda doc: LETTERS[choices(doc)[1]],
        fewshot_config={"sampler": "first_n"},
        **fields,
    )
