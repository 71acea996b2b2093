"""Throughput of the plug-in, and of `transformers serve`: `python -m serving.measure.throughput`.

Streams the same conversations from 1, 8 and 32 clients at once, with greedy answers in steps (condition cot), and
prints a table in Markdown. `--beside PATH` names the command `transformers` of an environment with transformers 5.23
or newer; its server is then asked the same. All servers run in float32 with their defaults, one after the other.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai

from .engine import ROOT
from .material import conversations
from .server import free_port, running_server, served


@contextmanager
def plug_in(log: Path, *options: str) -> Iterator[tuple[str, str]]:
    """Address and model name of a server of vLLM with the plug-in."""
    with served(ROOT, log, "--dtype", "float32", "--max-num-seqs", "32", *options) as (address, _):
        yield address, "hrm"


@contextmanager
def transformers_serve(command: str, log: Path) -> Iterator[tuple[str, str]]:
    """Address and model name of `transformers serve`."""
    port = free_port()
    line = [command, "serve", str(ROOT), "--trust-remote-code", "--device", "cpu", "--dtype", "float32"]
    with running_server([*line, "--host", "127.0.0.1", "--port", str(port)], port, log):
        yield f"http://127.0.0.1:{port}", str(ROOT)


def measure(client: openai.OpenAI, model: str, clients: int, requests: int) -> tuple[float, float, float]:
    """Asks conversations with answers in steps (condition cot).

    Returns:
        Requests and generated tokens a second, and the median seconds to the first token.
    """
    chats = conversations(requests, seed=31)

    def ask(messages: list[dict[str, str]]) -> tuple[int, float]:
        begun, first, tokens = time.perf_counter(), 0.0, 0
        stream = client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=64,
            stream=True,
            extra_body={"chat_template_kwargs": {"condition": "cot"}},
        )
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter() - begun
                tokens += 1
        return tokens, first

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        done = list(pool.map(ask, chats))
    seconds = time.perf_counter() - begun
    waits = sorted(first for _, first in done)
    return requests / seconds, sum(tokens for tokens, _ in done) / seconds, waits[len(waits) // 2]


def table_rows(name: str, address: str, model: str, clients: list[int], requests: int) -> None:
    """Measures a server and prints a row for each number of clients."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=600, max_retries=0)
    measure(client, model, 2, 4)
    for number in clients:
        rate, tokens, wait = measure(client, model, number, requests)
        print(f"| {name} | {number} | {rate:.2f} | {tokens:.1f} | {wait:.2f} |", flush=True)


def main() -> int:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", metavar="PATH", help="the command `transformers` of another environment")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=64, help="for each number of clients")
    arguments = parser.parse_args()
    print("| server | clients | requests a second | streamed pieces a second | median seconds to the first |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for options in ((), ("--enforce-eager",)):
            with plug_in(Path(folder) / "vllm.log", *options) as (address, model):
                name = " ".join(("vLLM with the plug-in", *(f"`{option}`" for option in options)))
                table_rows(name, address, model, arguments.clients, arguments.requests)
        if arguments.beside:
            with transformers_serve(arguments.beside, Path(folder) / "transformers.log") as (address, model):
                table_rows("`transformers serve`", address, model, arguments.clients, arguments.requests)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
