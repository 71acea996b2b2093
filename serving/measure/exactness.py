"""What vLLM answers with and without the plug-in, beside `generate`: `python -m serving.measure.exactness`.

Prints a table in Markdown. Each column is a process of its own, since vLLM loads its plug-ins once; they share a file
with the port's answers. "80 of 80, 5e-06" says how many greedy answers are those of `generate` in float32, and the
largest difference of a log-probability from one plain forward pass of the port.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


PATIENCE = 20.0
LONG = 60
COLUMNS = {"with the plug-in": None, "vLLM's own class": ""}


class Rows:
    """The rows of the table; each method measures one, on an engine that it is given or starts."""

    def __init__(self, store: Path) -> None:
        self.reference = Reference(ROOT, store)
        self.questions = question_prompts(self.reference, 80)
        self.chats = chat_prompts(self.reference, 80)

    def compared(self, results: list[Any], length: int = LENGTH, to_the_end: bool = False) -> str:
        """How many answers are those of `generate`, and the largest difference of a log-probability."""
        prompts = [list(result.prompt_token_ids) for result in results]
        expected = self.reference.answers(prompts, length, to_the_end)
        same = sum(list(result.outputs[0].token_ids) == answer for result, answer in zip(results, expected))
        return f"{same} of {len(results)}, {worst_difference(self.reference, results):.0e}"

    def plain(self, llm: Any) -> dict[str, Callable[[], str]]:
        """What a default engine is asked."""
        questions, chats = self.questions, self.chats
        causal = [prompt[2:-1] for prompt in questions[:6]] + [prompt[:-1] for prompt in questions[6:12]]
        adjacent = [one + other for one, other in zip(questions[:20], questions[20:40])]
        return {
            "single prompts, in one batch": lambda: self.compared(generate(llm, questions)),
            "conversations of two to four turns": lambda: self.compared(generate(llm, chats)),
            "prompts without a closed envelope": lambda: self.compared(generate(llm, causal)),
            "envelopes right behind each other": lambda: self.compared(generate(llm, adjacent)),
            "`prompt_logprobs`": lambda: self._prompt_difference(llm),
            "log-probabilities of `n=4` samples": lambda: self._samples(llm),
            "scores of beam search of 4": lambda: self._beams(llm),
            "messages that hold control tokens": lambda: self._hostile(llm),
            "default temperature": lambda: f"{llm.get_default_sampling_params().temperature:g}",
        }

    def _prompt_difference(self, llm: Any) -> str:
        worst = 0.0
        for result in generate(llm, self.chats[:20], prompt_logprobs=1, max_tokens=1):
            prompt = list(result.prompt_token_ids)
            table = self.reference.log_probabilities(prompt, [])
            for i, step in enumerate(result.prompt_logprobs[1:]):
                worst = max(worst, abs(step[prompt[i + 1]].logprob - table[i, prompt[i + 1]].item()))
        return f"off by {worst:.0e}"

    def _samples(self, llm: Any) -> str:
        results = generate(llm, self.chats[:10], n=4, temperature=1.0, seed=5)
        return f"off by {worst_difference(self.reference, results):.0e}"

    def _beams(self, llm: Any) -> str:
        from vllm.sampling_params import BeamSearchParams

        right = total = 0
        prompts = self.questions[:10] + self.chats[:10]
        params = BeamSearchParams(beam_width=4, max_tokens=24)
        for prompt, result in zip(prompts, llm.beam_search([{"prompt_token_ids": ids} for ids in prompts], params)):
            for beam in result.sequences:
                scores = self.reference.answer_log_probabilities(prompt, list(beam.tokens[len(prompt) :]))
                right += abs(sum(scores) - beam.cum_logprob) < 1e-3
                total += 1
        return f"{right} of {total}"

    def _hostile(self, llm: Any) -> str:
        safe = 0
        for text in HOSTILE:
            message = [{"role": "user", "content": text}]
            (result,) = llm.chat(message, sampling(max_tokens=1), use_tqdm=False)
            safe += list(result.prompt_token_ids) == self.reference.chat_ids(message)
        return f"{safe} of {len(HOSTILE)} stay text"

    def preempted(self) -> str:
        """Answers of requests that lost their cache pages and were computed anew."""
        short = [chat for chat in self.chats if len(chat) < 150]
        with running(num_gpu_blocks_override=12, max_model_len=256, enable_prefix_caching=False) as llm:
            preempted = count_preemptions(llm)
            results = generate(llm, short + self.questions[:20], ignore_eos=True, max_tokens=LONG)
        lost = {name.split("-")[0] for name in preempted}
        return self.compared([result for result in results if result.request_id in lost], LONG, to_the_end=True)

    def speculation(self) -> str:
        """Answers that n-grams of the prompt speed up."""
        options = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
        with running(speculative_config=options) as llm:
            return self.compared(generate(llm, self.questions[:20] + self.chats[:20]))

    def long_prompt(self) -> str:
        """A prompt longer than the budget of a step that was asked for."""
        prompt = [6, 8, *([50, 51, 52] * 130), 7]
        with running(max_num_batched_tokens=256) as llm:
            engine, end = llm.llm_engine, time.process_time() + PATIENCE
            engine.add_request("long", {"prompt_token_ids": prompt}, sampling())
            while time.process_time() < end:
                if results := [output for output in engine.step() if output.finished]:
                    return "answered, " + self.compared(results)
            return f"no answer in {PATIENCE:.0f} s of computing"


def measure(store: Path) -> dict[str, str]:
    """All rows, in this process; each is told on the error stream as soon as it is there."""
    prepare()
    rows, found = Rows(store), {}

    def take(several: dict[str, Callable[[], str]]) -> None:
        for name, row in several.items():
            found[name] = row()
            print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
            rows.reference.save()

    with running() as llm:
        take(rows.plain(llm))
    # Speculation comes last: it imports numba, beside which vLLM 0.32 starts no further engine in a process.
    take(
        {
            "requests that lost their cache pages (preemption)": rows.preempted,
            "a prompt longer than `max_num_batched_tokens`": rows.long_prompt,
            "speculation with n-grams": rows.speculation,
        }
    )
    return found


def main() -> int:
    """Runs a process for each column and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", type=Path, metavar="FILE", help="measure in this process; FILE keeps answers")
    if (store := parser.parse_args().here) is not None:
        print(json.dumps(measure(store)))
        return 0
    columns = {}
    with tempfile.TemporaryDirectory() as folder:
        for column, plugins in COLUMNS.items():
            print(f"## {column}", file=sys.stderr, flush=True)
            environment = {**os.environ, **({} if plugins is None else {"VLLM_PLUGINS": plugins})}
            command = [sys.executable, "-m", "serving.measure.exactness", "--here", f"{folder}/answers.json"]
            done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=7200)
            if done.returncode:
                return done.returncode
            columns[column] = json.loads(done.stdout.strip().splitlines()[-1])
    print("| | " + " | ".join(columns) + " |\n| --- |" + " --- |" * len(columns))
    for row in next(iter(columns.values())):
        print(f"| {row} | " + " | ".join(values[row] for values in columns.values()) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
