"""What vLLM answers with and without the plug-in, beside `generate`: `python -m serving.measure.exactness`.

Prints a table in Markdown. "80 of 80, 5e-06" says how many greedy answers are those of `generate` in float32, and the
largest difference of a log-probability from one plain forward pass of the port, up to the end of each answer.

Each engine runs in a process of its own, for each column, and appends a figure to a file as soon as it has one. A
process that ends early or hangs is started once more for what it owes. `--keep FOLDER` keeps figures and the port's
answers, so that the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .engine import ROOT, count_preemptions, prepare, running
from .material import (
    HOSTILE,
    LENGTH,
    Reference,
    chat_prompts,
    generate,
    question_prompts,
    sampling,
    worst_difference,
)


TRIES = 2
TIMEOUT = 3600
PATIENCE = 20.0
STEPS_BETWEEN_LOSSES = 5
COLUMNS = {"with the plug-in": None, "vLLM's own class": ""}
ENGINES: dict[str, dict[str, Any]] = {
    "default": {},
    "few pages": {"num_gpu_blocks_override": 12, "max_model_len": 256, "enable_prefix_caching": False},
    "small budget": {"max_num_batched_tokens": 256},
    "n-grams": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 4,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        }
    },
}


class Asked:
    """The prompts, and the port's answers to them.

    Attributes:
        reference: the port.
        questions, chats: 80 prompts each.
    """

    def __init__(self, store: Path) -> None:
        self.reference = Reference(ROOT, store)
        self.questions = question_prompts(self.reference, 80)
        self.chats = chat_prompts(self.reference, 80)

    def compared(self, results: list[Any]) -> str:
        """How many answers are those of `generate`, and the largest difference of a log-probability."""
        prompts = [list(result.prompt_token_ids) for result in results]
        expected = self.reference.answers(prompts, LENGTH)
        same = sum(list(result.outputs[0].token_ids) == answer for result, answer in zip(results, expected))
        return f"{same} of {len(results)}, {worst_difference(self.reference, results):.0e}"


def causal_prompts(asked: Asked, llm: Any) -> str:
    """Prompts whose envelope is not opened or not closed."""
    prompts = [prompt[2:-1] for prompt in asked.questions[:6]] + [prompt[:-1] for prompt in asked.questions[6:12]]
    return asked.compared(generate(llm, prompts))


def adjacent_envelopes(asked: Asked, llm: Any) -> str:
    """Two envelopes with nothing between them."""
    pairs = zip(asked.questions[:20], asked.questions[20:40])
    return asked.compared(generate(llm, [one + other for one, other in pairs]))


def prompt_log_probabilities(asked: Asked, llm: Any) -> str:
    """Those of the prompts' own tokens."""
    worst = 0.0
    for result in generate(llm, asked.chats[:20], prompt_logprobs=1, max_tokens=1):
        prompt = list(result.prompt_token_ids)
        table = asked.reference.log_probabilities(prompt, [])
        for i, step in enumerate(result.prompt_logprobs[1:]):
            worst = max(worst, abs(step[prompt[i + 1]].logprob - table[i, prompt[i + 1]].item()))
    return f"off by {worst:.0e}"


def samples(asked: Asked, llm: Any) -> str:
    """Four samples of each prompt."""
    results = generate(llm, asked.chats[:10], n=4, temperature=1.0, seed=5)
    return f"off by {worst_difference(asked.reference, results):.0e}"


def beams(asked: Asked, llm: Any) -> str:
    """How many beams have the score that the port gives their tokens."""
    from vllm.sampling_params import BeamSearchParams

    right = total = 0
    prompts = asked.questions[:10] + asked.chats[:10]
    params = BeamSearchParams(beam_width=4, max_tokens=24)
    for prompt, result in zip(prompts, llm.beam_search([{"prompt_token_ids": ids} for ids in prompts], params)):
        for beam in result.sequences:
            scores = asked.reference.answer_log_probabilities(prompt, list(beam.tokens[len(prompt) :]))
            right += abs(sum(scores) - beam.cum_logprob) < 1e-3
            total += 1
    return f"{right} of {total}"


def hostile_messages(asked: Asked, llm: Any) -> str:
    """Messages that hold control tokens by their names."""
    safe = 0
    for text in HOSTILE:
        message = [{"role": "user", "content": text}]
        (result,) = llm.chat(message, sampling(max_tokens=1), use_tqdm=False)
        safe += list(result.prompt_token_ids) == asked.reference.chat_ids(message)
    return f"{safe} of {len(HOSTILE)} stay text"


def preempted(asked: Asked, llm: Any) -> str:
    """All prompts, with pages for a few: what is preempted is computed anew, prompt and answer.

    Besides, every running request loses its pages every few steps.
    """
    engine, lost, results, steps = llm.llm_engine, count_preemptions(llm), [], 0
    prompts = [prompt for prompt in asked.questions + asked.chats if len(prompt) + LENGTH <= 256]
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling())
    while engine.has_unfinished_requests():
        results += [output for output in engine.step() if output.finished]
        steps += 1
        if steps % STEPS_BETWEEN_LOSSES == 0:
            engine.reset_prefix_cache(reset_running_requests=True)
    names = {name.split("-")[0] for name in lost}
    return asked.compared([result for result in results if result.request_id.split("-")[0] in names])


def long_prompt(asked: Asked, llm: Any) -> str:
    """A prompt longer than the budget of a step that was asked for."""
    prompt = [6, 8, *([50, 51, 52] * 130), 7]
    engine, end = llm.llm_engine, time.process_time() + PATIENCE
    engine.add_request("long", {"prompt_token_ids": prompt}, sampling())
    while time.process_time() < end:
        if results := [output for output in engine.step() if output.finished]:
            return asked.compared(results)
    return f"no answer in {PATIENCE:.0f} s of computing"


class Row(NamedTuple):
    """A row of the table: the engine that it is measured on, and how."""

    engine: str
    measure: Callable[[Asked, Any], str]


ROWS = {
    "single prompts, in one batch": Row("default", lambda asked, llm: asked.compared(generate(llm, asked.questions))),
    "conversations of two to four turns": Row(
        "default", lambda asked, llm: asked.compared(generate(llm, asked.chats))
    ),
    "prompts without a closed envelope": Row("default", causal_prompts),
    "envelopes right behind each other": Row("default", adjacent_envelopes),
    "requests that lost their cache pages (preemption)": Row("few pages", preempted),
    "speculation with n-grams": Row(
        "n-grams", lambda asked, llm: asked.compared(generate(llm, asked.questions[:20] + asked.chats[:20]))
    ),
    "`prompt_logprobs`": Row("default", prompt_log_probabilities),
    "log-probabilities of `n=4` samples": Row("default", samples),
    "scores of beam search of 4": Row("default", beams),
    "messages that hold control tokens": Row("default", hostile_messages),
    "default temperature": Row("default", lambda _, llm: f"{llm.get_default_sampling_params().temperature:g}"),
    "a prompt longer than `max_num_batched_tokens`": Row("small budget", long_prompt),
}


class Figures:
    """The figures that are known, in a file of JSON lines [column, row, figure]."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.answers, self._file = folder / "answers.json", folder / "figures.jsonl"

    def known(self) -> dict[tuple[str, str], str]:
        """All figures, by column and row."""
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        return {(column, row): figure for column, row, figure in map(json.loads, lines)}

    def owed(self, column: str, engine: str) -> list[str]:
        """Rows of an engine that have no figure yet."""
        known = self.known()
        return [row for row, how in ROWS.items() if how.engine == engine and (column, row) not in known]

    def append(self, column: str, row: str, figure: str) -> None:
        """Writes a figure, and tells it on the error stream."""
        with self._file.open("a") as file:
            file.write(json.dumps([column, row, figure]) + "\n")
        print(f"{row}: {figure}", file=sys.stderr, flush=True)


def measure(figures: Figures, column: str, engine: str, rows: list[str]) -> None:
    """Measures rows of one engine, in this process."""
    prepare()
    asked = Asked(figures.answers)
    with running(**ENGINES[engine]) as llm:
        for row in rows:
            figures.append(column, row, ROWS[row].measure(asked, llm))
            asked.reference.save()


def measure_apart(folder: Path, column: str, engine: str) -> None:
    """Measures what an engine owes in a process of its own, which is started anew where it ended early or hung."""
    figures, tried = Figures(folder), Counter[str]()
    plugins = COLUMNS[column]
    environment = {**os.environ, **({} if plugins is None else {"VLLM_PLUGINS": plugins})}
    while rows := [row for row in figures.owed(column, engine) if tried[row] < TRIES]:
        print(f"## {column}: {engine}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "serving.measure.exactness", "--keep", str(folder)]
        command += ["--measure", json.dumps([column, engine, rows])]
        try:
            subprocess.run(command, env=environment, cwd=ROOT, stdout=sys.stderr, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            print(f"no end within {TIMEOUT} s", file=sys.stderr, flush=True)
        if left := figures.owed(column, engine):
            tried[next(row for row in rows if row in left)] += 1


def main() -> int:
    """Runs the processes and prints the table; ends with 1 where a figure is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep figures and answers, and go on from them")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(Figures(arguments.keep), *json.loads(arguments.measure))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.keep or Path(temporary)).resolve()
        for column in COLUMNS:
            for engine in ENGINES:
                measure_apart(folder, column, engine)
        known = Figures(folder).known()
    print("| | " + " | ".join(COLUMNS) + " |\n| --- |" + " --- |" * len(COLUMNS))
    for row in ROWS:
        print(f"| {row} | " + " | ".join(known.get((column, row), "") for column in COLUMNS) + " |")
    return int(len(known) < len(COLUMNS) * len(ROWS))


if __name__ == "__main__":
    raise SystemExit(main())
