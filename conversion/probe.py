"""Finds how a chat template writes a user's turn, in a separate process: a template can loop or fill the memory.

`probe` starts this module as a program. It loads the tokenizer without `trust_remote_code`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parent.parent
# Of CPU time.
SECONDS = 5
# Of waiting: the machine may be busy with other work, and the two limits above end what runs without an end.
WAIT_SECONDS = 900
# Of memory beyond what the libraries take themselves; a vocabulary of 262,144 tokens with its merges takes 560 MB.
MEMORY_BYTES = 700 * 2**20
# A turn that takes more tokens than this to open is not looked at.
_MOST_TOKENS = 64
# They begin differently, so that what all of them share is the template's; some merge with what stands before them.
_TEXTS = ("zebra or ape", "7 and 8", "\n\nquiet", " white", "more")
# Small letters and digits, which every vocabulary has.
_CHAT = [("user", "how many zebras"), ("assistant", "nineteen or 20"), ("user", "and apes or 7")]


def probe(files: dict[str, bytes]) -> dict[str, Any] | None:
    """Which tokens the chat template of a tokenizer puts before and behind a user's text.

    Args:
        files: name to content of the tokenizer's files.

    Returns:
        None where the tokenizer does not load or its template fails. Else `start` and `end`, ids, for which a block is
        every user turn and no answer, both None where there are none; `names`, the tokens of these ids; `before` and
        `after`, the tokens around a text; `writes` and `tools`, whether the template writes the text, and tools.

    Raises:
        TimeoutError: the process did not end in time, so that nothing is known.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_bytes(content)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "conversion.probe", folder]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=WAIT_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the chat template was not rendered within {WAIT_SECONDS} s") from None
        with contextlib.suppress(ValueError, IndexError):
            if done.returncode == 0:
                return json.loads(done.stdout.splitlines()[-1])
    return None


def _findings(folder: str) -> dict[str, Any]:
    from transformers import AutoTokenizer

    _limit_memory()
    with contextlib.suppress(AttributeError):  # no such timer on this system: the outer limit serves
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def render(turns: list[tuple[str, str]], **arguments: Any) -> list[int]:
        chat = [{"role": role, "content": content} for role, content in turns]
        return list(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False, **arguments))

    rows = [render([("user", text)], add_generation_prompt=True) for text in _TEXTS]
    before = _common_start(rows)
    after = _common_start([row[len(before) :][::-1] for row in rows])[::-1]
    special = {*tokenizer.all_special_ids}
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    start, end = _envelope(tokenizer, before, after, special, render(_CHAT))
    tool = {"type": "function", "function": {"name": "nineteen", "description": "", "parameters": {}}}
    tools = False
    with contextlib.suppress(Exception):  # templates refuse tools with errors of their own
        tools = "nineteen" in tokenizer.decode(render([("user", "x")], tools=[tool]))
    names = tokenizer.convert_ids_to_tokens
    return {
        "start": start,
        "end": end,
        "names": dict(zip([*(start or []), *(end or [])], names([*(start or []), *(end or [])]))),
        "before": names(before),
        "after": names(after),
        "writes": any(row != rows[0] for row in rows),
        "tools": tools,
    }


def _common_start(rows: list[list[int]]) -> list[int]:
    count = 0
    for column in zip(*rows):
        if len(set(column)) > 1:
            break
        count += 1
    return rows[0][:count]


def _envelope(
    tokenizer: Any, before: list[int], after: list[int], special: set[int], chat: list[int]
) -> tuple[list[int] | None, list[int] | None]:
    """The opening and closing ids that together mark every user turn and no answer.

    The opening begins at the last special token for which this holds, and is as long as possible; the closing is the
    first special token behind the text.
    """
    closing = [token for token in after if token in special][:1]
    if not closing or len(before) > _MOST_TOKENS:
        return None, None
    places = [place for place, token in enumerate(before) if token in special]
    for place in reversed(places):
        for length in range(len(before) - place, 0, -1):
            opening = before[place : place + length]
            if closing[0] not in opening and _marks(tokenizer, opening, closing[0], chat):
                return opening, closing
    return None, None


def _marks(tokenizer: Any, opening: list[int], closing: int, ids: list[int]) -> bool:
    inside: list[int] = []
    outside: list[int] = []
    position = 0
    while position < len(ids):
        if ids[position : position + len(opening)] == opening and closing in ids[position:]:
            stop = ids.index(closing, position) + 1
            inside += ids[position:stop]
            position = stop
        else:
            outside.append(ids[position])
            position += 1
    # Without white space, which some vocabularies put before a text.
    marked, rest = ("".join(tokenizer.decode(tokens).split()) for tokens in (inside, outside))
    chat = [(role, "".join(text.split())) for role, text in _CHAT]
    return all((text in marked) == (role == "user") and (text in rest) != (role == "user") for role, text in chat)


def _limit_memory() -> None:
    """Bounds what this process may still take, where the system can."""
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):
        import resource

        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (taken + MEMORY_BYTES, taken + MEMORY_BYTES))


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answer = json.dumps(_findings(sys.argv[1]))
    print(answer)
