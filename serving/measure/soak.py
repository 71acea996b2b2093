"""A server under clients that behave badly: `python -m serving.measure.soak --minutes 10`.

Clients ask questions and conversations of random length, stream and go away in the middle, send prompts that are too
long and requests that are no requests. Every answer is compared with `generate` of the port; no request may wait for
longer than its time-out; and the memory of all processes may not grow after the first minute, once vLLM's caches of
oneDNN's products are full. Ends with 1 where one of these is not so. Time in which this process was stopped does not
count.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil

from .engine import ROOT
from .material import CONDITIONS, Reference, conversations, fresh_questions
from .server import served


TIMEOUT = 600.0
TICK = 1.0
GROWTH = 32 * 2**20
# On processors vLLM keeps, for each matrix, oneDNN's products of the last 128 numbers of tokens in a step, and oneDNN
# 1,024 more: the worker grows until so many numbers have come up, whichever model it serves.
STEP_SIZES = 400
MALFORMED: list[dict[str, Any]] = [
    {"messages": []},
    {"messages": [{"role": "assistant", "content": "hi"}]},
    {"messages": [{"role": "user", "content": "hi"}], "max_tokens": -3},
    {"messages": [{"role": "user", "content": "hi"}], "temperature": -1},
    {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"condition": "none such"}},
    {"messages": [{"role": "user", "content": {"a": 1}}]},
    {"messages": "hi"},
    {"messages": [{"role": "user", "content": "3 + 4 is " * 700}]},
]


@dataclass
class Tally:
    """What happened so far, over all clients.

    Attributes:
        done: number of requests of each kind.
        faults: sentences about what went wrong.
    """

    done: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Asked:
    """A chat and the port's answer to it."""

    messages: list[dict[str, str]]
    condition: str
    prompt: list[int]
    answer: list[int]
    text: str


def pool_of(reference: Reference, size: int) -> list[Asked]:
    """Chats of one to four turns with the answers of `generate`."""
    chats = [[{"role": "user", "content": text}] for text in fresh_questions(size // 2, seed=21)]
    chats += conversations(size - len(chats), seed=22)
    conditions = [CONDITIONS[index % 3] for index in range(len(chats))]
    prompts = [reference.chat_ids(chat, condition=condition) for chat, condition in zip(chats, conditions)]
    answers = reference.answers(prompts, 128)
    texts = [reference.tokenizer.decode([token for token in answer if token != 11]) for answer in answers]
    return [Asked(*parts) for parts in zip(chats, conditions, prompts, answers, texts)]


class Client(threading.Thread):
    """One client; each request is drawn anew."""

    def __init__(self, address: str, pool: list[Asked], seed: int, over: threading.Event, tally: Tally) -> None:
        super().__init__(daemon=True)
        self.api = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=TIMEOUT, max_retries=0)
        self.pool, self.draw, self.over, self.tally = pool, random.Random(seed), over, tally

    def run(self) -> None:
        """Asks until the time is over."""
        kinds = [self.ask] * 6 + [self.stream, self.leave, self.leave, self.complete, self.send_nonsense]
        while not self.over.is_set():
            kind = self.draw.choice(kinds)
            try:
                kind(self.draw.choice(self.pool))
            except Exception as error:
                self.tally.faults.append(f"{kind.__name__}: {type(error).__name__}: {error}")
            self.tally.done[kind.__name__] += 1

    def _chat(self, asked: Asked, **options: Any) -> Any:
        extra = {"chat_template_kwargs": {"condition": asked.condition}, **options.pop("extra_body", {})}
        return self.api.chat.completions.create(model="hrm", messages=asked.messages, extra_body=extra, **options)

    def _compare(self, asked: Asked, text: str | None) -> None:
        if text != asked.text:
            self.tally.faults.append(f"wrong answer {text!r} instead of {asked.text!r}")

    def ask(self, asked: Asked) -> None:
        """A whole answer."""
        self._compare(asked, self._chat(asked).choices[0].message.content)

    def stream(self, asked: Asked) -> None:
        """A whole answer, token by token."""
        chunks = self._chat(asked, stream=True)
        self._compare(asked, "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices))

    def leave(self, asked: Asked) -> None:
        """Goes away before the answer is there, at the prompt or after some tokens."""
        patience = self.draw.randrange(0, 6)
        stream = self._chat(asked, stream=True, max_tokens=600, extra_body={"ignore_eos": True})
        for count, _ in enumerate(stream):
            if count >= patience:
                break
        stream.close()

    def complete(self, asked: Asked) -> None:
        """A prompt of ids that holds a part of its answer, which is causal."""
        kept = self.draw.randrange(len(asked.answer))
        prompt, rest = asked.prompt + asked.answer[:kept], asked.answer[kept:]
        choice = self.api.completions.create(
            model="hrm", prompt=prompt, max_tokens=len(rest), extra_body={"return_token_ids": True}
        ).choices[0]
        if list(choice.token_ids) != rest:
            self.tally.faults.append(f"wrong continuation {choice.token_ids} instead of {rest}")

    def send_nonsense(self, _: Asked) -> None:
        """What cannot be served, and must be refused at once."""
        body = self.draw.choice(MALFORMED)
        begun = time.monotonic()
        try:
            self.api.post("/chat/completions", body={"model": "hrm", **body}, cast_to=object)
        except openai.APIStatusError as error:
            if not 400 <= error.status_code < 500:
                self.tally.faults.append(f"{error.status_code} for {json.dumps(body)[:80]}")
        else:
            self.tally.faults.append(f"served: {json.dumps(body)[:80]}")
        if time.monotonic() - begun > TIMEOUT / 4:
            self.tally.faults.append(f"{time.monotonic() - begun:.0f} s to refuse {json.dumps(body)[:80]}")


def fill_caches(address: str) -> None:
    """Computes prompts of many lengths one by one: the caches of products are full before memory is watched."""
    draw = random.Random(0)
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=TIMEOUT, max_retries=0) as api:
        for length in draw.sample(range(2, 2 * STEP_SIZES), STEP_SIZES):
            prompt = [draw.randrange(40, 99) for _ in range(length)]
            api.completions.create(model="hrm", prompt=prompt, max_tokens=1)


def told(parts: dict[str, int]) -> str:
    """Bytes of each part, to read."""
    return ", ".join(f"{name} {own / 2**20:.0f} MB" for name, own in parts.items())


def memory(process: psutil.Process) -> dict[str, int]:
    """Bytes that belong to a process alone, of the server and of each process below it, by name."""
    found: dict[str, int] = {}
    for member in [process, *process.children(recursive=True)]:
        try:
            info, line = member.memory_info(), member.cmdline()
        except psutil.Error:
            continue
        names = {"EngineCore": "engine", "Worker": "worker"}
        named = [name for part, name in names.items() if line and part in line[0]]
        name = "server" if member == process else named[0] if named else "others"
        found[name] = found.get(name, 0) + info.rss - info.shared
    return found


def soak(minutes: float, clients: int, log: Path) -> Tally:
    """Runs server and clients, and prints what is found every ten seconds."""
    pool, tally, over = pool_of(Reference(ROOT), 48), Tally(), threading.Event()
    options = ("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16", "--block-size", "32")
    with served(ROOT, log, *options, "--num-gpu-blocks-override", "64") as (address, process_id):
        process = psutil.Process(process_id)
        print(f"at the start: {told(memory(process))}", flush=True)
        fill_caches(address)
        print(f"after steps of {STEP_SIZES} sizes: {told(memory(process))}", flush=True)
        threads = [Client(address, pool, seed, over, tally) for seed in range(clients)]
        for thread in threads:
            thread.start()
        spent, reported, first, last = 0.0, 0.0, 0, 0
        while spent < 60 * minutes:
            before = time.monotonic()
            time.sleep(TICK)
            spent += min(time.monotonic() - before, 2 * TICK)
            if spent - reported < 10 and spent < 60 * minutes:
                continue
            reported, each = spent, memory(process)
            last = sum(each.values())
            first = max(first, last) if spent <= 72 else first
            total = sum(tally.done.values())
            print(f"{spent / 60:5.1f} min  {total} requests  {len(tally.faults)} faults  {told(each)}", flush=True)
        over.set()
        for thread in threads:
            thread.join(TIMEOUT + 10)
        if hanging := sum(thread.is_alive() for thread in threads):
            tally.faults.append(f"{hanging} clients still wait")
        if last > first + GROWTH:
            tally.faults.append(
                f"memory grew from {first / 2**20:.0f} MB in the first minute to {last / 2**20:.0f} MB"
            )
    return tally


def main() -> int:
    """Soaks; ends with 1 where something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=32)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = soak(arguments.minutes, arguments.clients, Path(folder) / "log")
    print(dict(tally.done))
    print("\n".join(sorted(set(tally.faults))[:20]) or "no faults")
    return int(bool(tally.faults))


if __name__ == "__main__":
    raise SystemExit(main())
