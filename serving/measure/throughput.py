"""Tokens a second of a server at several numbers of clients: `python -m serving.measure.throughput ADDRESS`.

Works with every OpenAI server, so that vLLM and `transformers serve` are asked the same. Without an address, a server
of vLLM with the plug-in is started for the time of the measurement.
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
from .server import served


@contextmanager
def address_of(given: str | None) -> Iterator[str]:
    """The address that was given, or that of a server of vLLM."""
    if given is not None:
        yield given
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        served(ROOT, Path(folder) / "log", "--dtype", "float32", "--enforce-eager") as (own, _),
    ):
        yield own


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


def main() -> int:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", nargs="?", help="of a running server, http://127.0.0.1:8000")
    parser.add_argument("--model", default="hrm", help="its name on that server")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=64, help="for each number of clients")
    arguments = parser.parse_args()
    with address_of(arguments.address) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=300, max_retries=0)
        measure(client, arguments.model, 4, 8)
        print("| clients | requests a second | streamed pieces a second | median seconds to the first |")
        print("| --- | --- | --- | --- |")
        for clients in arguments.clients:
            rate, tokens, wait = measure(client, arguments.model, clients, arguments.requests)
            print(f"| {clients} | {rate:.2f} | {tokens:.1f} | {wait:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
