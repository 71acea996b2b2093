"""The prefix blocks of a prompt, and what a server must know of them; plain Python on token ids, no vLLM needed.

A *block* is a half-open range (start, stop) of positions of a prompt: a prompt envelope, from the tokens that open it
up to and including the next tokens that close it. Its positions see one another and all that came before; every
position outside a block sees what came before it and itself. Generated tokens are never of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


Block = tuple[int, int]


class Envelope(NamedTuple):
    """The token ids that open a block and those that close it; with none that close, everything is causal."""

    opening: tuple[int, ...]
    closing: tuple[int, ...]

    @classmethod
    def of_config(cls, config: Any) -> Envelope:
        """The envelope that a model's config names.

        Args:
            config: the model's config, with `prefix_end_token_id` (an id, several, or None) and optionally
                `prefix_start_token_ids` (default: the bos token), `prefix_lm`.

        Raises:
            ValueError: the config says that the model reads prompts in blocks and not where these end.
        """
        if not getattr(config, "prefix_lm", True):
            return cls((), ())
        if not hasattr(config, "prefix_end_token_id"):
            raise ValueError(
                "config.json has no `prefix_end_token_id`, so that the end of a prompt cannot be told: convert the "
                "checkpoint with convert_weights.py, or pass --hf-overrides '{\"prefix_end_token_id\": 7}' (or null, "
                "for a model that is causal throughout)."
            )
        closing = _as_tuple(config.prefix_end_token_id)
        opening = _as_tuple(getattr(config, "prefix_start_token_ids", None)) or _as_tuple(config.bos_token_id)
        if closing and not opening:
            raise ValueError(
                "`prefix_end_token_id` is set and neither `prefix_start_token_ids` nor `bos_token_id` is: a block "
                "needs tokens that open it."
            )
        return cls(opening, closing)

    def blocks(self, token_ids: Sequence[int]) -> list[Block]:
        """The blocks of a prompt in order; an envelope that is not closed opens none.

        Args:
            token_ids: the prompt, and nothing that was generated.
        """
        if not self.closing:
            return []
        ids, found, position = list(token_ids), [], 0
        while (start := _find(ids, self.opening, position)) is not None:
            last = _find(ids, self.closing, start + len(self.opening))
            if last is None:
                break
            position = last + len(self.closing)
            found.append((start, position))
        return found


def _as_tuple(ids: int | Sequence[int] | None) -> tuple[int, ...]:
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _find(ids: list[int], wanted: tuple[int, ...], position: int) -> int | None:
    """Index of the first occurrence of `wanted` at or after `position`."""
    while True:
        try:
            position = ids.index(wanted[0], position)
        except ValueError:
            return None
        if tuple(ids[position : position + len(wanted)]) == wanted:
            return position
        position += 1


def last_cut(blocks: Sequence[Block], start: int, stop: int) -> int:
    """The last position in (start, stop] where a prefill may end, so that no block is split; `start` if there is none.

    Args:
        blocks: of the prompt.
        start: tokens that are computed already.
        stop: tokens that would be computed after the chunk.
    """
    for first, after in blocks:
        if first < stop < after:
            return max(first, start)
    return stop


def page_key(blocks: Sequence[Block], token_ids: Sequence[int], start: int, stop: int) -> tuple[Any, ...] | None:
    """What keys and values of the positions start..stop-1 depend on beyond the tokens up to `stop`.

    Args:
        blocks: of the prompt.
        token_ids: the prompt and what was generated.
        start, stop: positions of a cache page.

    Returns:
        The blocks that reach into the page and the tokens of the last one that follow the page; None for a page
        without blocks, whose hash then is that of any causal model.
    """
    inside = tuple(block for block in blocks if block[0] < stop and start < block[1])
    if not inside:
        return None
    return ("prefix blocks", *inside, tuple(token_ids[stop : inside[-1][1]]))


@dataclass
class Segments:
    """Rows of a batch, each cut into queries that see a single kind of attention; lists of one length.

    Attributes:
        row: index of the request.
        query_length: new tokens of the segment; the segments of a row follow each other.
        seq_length: positions that the last token of the segment sees.
        causal: whether the tokens of the segment see each other causally; if not, all see all of `seq_length`.
    """

    row: list[int]
    query_length: list[int]
    seq_length: list[int]
    causal: list[bool]

    def append(self, row: int, query_length: int, seq_length: int, causal: bool) -> None:
        """Adds a segment."""
        self.row.append(row)
        self.query_length.append(query_length)
        self.seq_length.append(seq_length)
        self.causal.append(causal)


def split_rows(
    starts: Sequence[int], lengths: Sequence[int], blocks: Sequence[Sequence[Block]], causal_runs: bool
) -> Segments | None:
    """Cuts the requests of a step into segments.

    Args:
        starts: positions that are in the cache already, for each request.
        lengths: new tokens of each request.
        blocks: the blocks of each request's prompt.
        causal_runs: whether a run of causal tokens is one segment (the backend takes a causal flag for each request);
            if not, each of its tokens is one, since a single query is causal by itself.

    Returns:
        The segments, or None where every request is causal.

    Raises:
        ValueError: a block that would be split over two steps.
    """
    segments, has_blocks = Segments([], [], [], []), False
    for row, (start, length, own) in enumerate(zip(starts, lengths, blocks)):
        position, stop = start, start + length
        for first, after in own:
            if after <= position:
                continue
            if first >= stop:
                break
            if after > stop:
                raise ValueError(
                    f"a step computes positions {start} to {stop - 1} of a request and would split the prefix block "
                    f"{first} to {after - 1}: the scheduler of hrm-text-vllm must be in charge (`scheduler_cls`)."
                )
            _append_causal(segments, row, position, first, causal_runs)
            # The head of a block may be in the cache, from a request that held the same block.
            begin = max(first, position)
            segments.append(row, after - begin, after, causal=after - begin == 1)
            has_blocks |= after - begin > 1
            position = after
        _append_causal(segments, row, position, stop, causal_runs)
    return segments if has_blocks else None


def _append_causal(segments: Segments, row: int, start: int, stop: int, as_run: bool) -> None:
    if as_run and start < stop:
        segments.append(row, stop - start, stop, causal=True)
        return
    for position in range(start, stop):
        segments.append(row, 1, position + 1, causal=True)


__all__ = ["Block", "Envelope", "Segments", "last_cut", "page_key", "split_rows"]
