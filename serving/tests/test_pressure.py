"""Preemption, chunks and cached pages: however the work is cut up, the answers stay."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import torch

from serving.measure.engine import count_preemptions, scheduler_of
from serving.measure.material import TOLERANCE, Reference, check, generate, sampling, worst_difference


def test_preempted_requests(reference: Reference, chats: list[list[int]], serve: Any) -> None:
    """Few cache pages: requests are preempted and computed anew, prompt in blocks and answer causally."""
    with serve(num_gpu_blocks_override=12, max_model_len=256, enable_prefix_caching=False) as llm:
        preempted = count_preemptions(llm)
        short = [chat for chat in chats if len(chat) < 150]
        results = generate(llm, short + short[:20], ignore_eos=True, max_tokens=70)
    assert len(set(preempted)) >= 40
    assert worst_difference(reference, results) < TOLERANCE
    for result in results[:10]:
        answer = list(result.outputs[0].token_ids)
        table = reference.log_probabilities(list(result.prompt_token_ids), answer)
        assert table[len(result.prompt_token_ids) - 1 : -1].argmax(-1).tolist() == answer


def test_generated_control_tokens_open_no_block(
    reference: Reference, questions_asked: list[list[int]], serve: Any
) -> None:
    """Sampled envelopes are causal, also when they are computed anew or found in the cache."""
    for caching in (False, True):
        with serve(num_gpu_blocks_override=10, max_model_len=192, enable_prefix_caching=caching) as llm:
            options = {"temperature": 1.0, "seed": 3, "allowed_token_ids": [6, 7, 8, 50, 51], "ignore_eos": True}
            results = generate(llm, questions_asked[:12], max_tokens=90, **options)
            assert worst_difference(reference, results) < TOLERANCE
            # The same tokens as a prompt are blocks, and may not be taken from pages that hold them as an answer.
            again = [list(result.prompt_token_ids) + list(result.outputs[0].token_ids) for result in results]
            repeated = generate(llm, again, max_tokens=20)
            assert worst_difference(reference, repeated) < TOLERANCE


def test_long_prompts_in_chunks(reference: Reference, chats: list[list[int]], serve: Any) -> None:
    """More prompts than a step has room for: chunks end at block borders."""
    with serve(max_model_len=256, max_num_batched_tokens=64, max_num_seqs=8, enable_prefix_caching=False) as llm:
        scheduler, cut = scheduler_of(llm), []
        assert scheduler.max_num_scheduled_tokens == 256 + 8
        reserve = scheduler._reserve_prefill_lookahead

        def seen(request: Any, computed: int, new: int) -> int:
            given = reserve(request, computed, new)
            if given < new:
                cut.append((computed, new, given))
            return given

        scheduler._reserve_prefill_lookahead = seen
        short = [chat for chat in chats if len(chat) < 200]
        check(reference, generate(llm, short))
    assert any(given > 0 for _, _, given in cut)


def test_cached_pages(reference: Reference, chats: list[list[int]], serve: Any) -> None:
    """A conversation finds its earlier turns in the cache, and a prompt never the page of another layout."""
    with serve() as llm:
        longest = sorted(chats, key=len)[-10:]
        check(reference, generate(llm, longest))
        again = generate(llm, longest)
        check(reference, again)
        assert all(result.num_cached_tokens > 0 for result in again)
        # One long block that ends differently, is left open, or goes on: the first pages hold the same tokens.
        for base in longest[:4]:
            text = [token for token in base if token not in (6, 7, 11)]
            text = (text * 3)[:150]
            prompts = [
                [6, 8, *text, 7],
                [6, 8, *text, 50, 7],
                [6, 8, *text],
                [6, 8, *text, 51],
                [6, 8, *text[:40], 7, *text[40:], 7],
                [6, 8, *text[:60], 7, *text[60:], 6, 8, 50, 7],
                [6, 8, *text, 7],
            ]
            results = [generate(llm, [prompt])[0] for prompt in prompts]
            check(reference, results)
            cached = [result.num_cached_tokens for result in results]
            assert cached[0] == cached[1] == cached[2] == cached[4] == 0
            assert cached[3] == 128 and cached[6] == 128


def test_the_fourth_turn_is_read_from_the_cache(reference: Reference, serve: Any) -> None:
    """A conversation that grows turn by turn, with the answers that were served."""
    with serve() as llm:
        chat: list[dict[str, str]] = []
        for turn in range(4):
            text = f"Which number is larger, {turn + 3}{turn} or {turn}5? " * 3
            chat.append({"role": "user", "content": text})
            prompt = reference.chat_ids(chat)
            (result,) = generate(llm, [prompt])
            check(reference, [result])
            answer = [token for token in result.outputs[0].token_ids if token != 11]
            chat.append({"role": "assistant", "content": reference.tokenizer.decode(answer)})
        assert result.num_cached_tokens >= len(prompt) // 2


def test_an_aborted_prompt_leaves_nothing_behind(reference: Reference, chats: list[list[int]], serve: Any) -> None:
    """Requests are dropped in the middle of their prompts; the others and the cache stay right."""
    with serve(max_model_len=256, max_num_batched_tokens=64, max_num_seqs=4) as llm:
        engine, short = llm.llm_engine, [chat for chat in chats if len(chat) < 200]
        for index, prompt in enumerate(short[:24]):
            engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling(max_tokens=8))
        engine.step()
        engine.abort_request([str(index) for index in range(0, 24, 2)])
        results = []
        while engine.has_unfinished_requests():
            results += [output for output in engine.step() if output.finished]
        assert {int(result.request_id.split("-")[0]) for result in results} == set(range(1, 24, 2))
        check(reference, results, 8)
        check(reference, generate(llm, short[:24], max_tokens=8), 8)
        assert scheduler_of(llm).kv_cache_manager.usage == 0


def test_the_plug_in_keeps_nothing(chats: list[list[int]], serve: Any) -> None:
    """Requests come and go, aborted and preempted ones too; no tensor and no object of vLLM or the plug-in stays."""

    def alive() -> Counter[str]:
        gc.collect()
        types = [type(item) for item in gc.get_objects()]
        return Counter(
            f"{kind.__module__}.{kind.__qualname__}"
            for kind in types
            if kind is torch.Tensor or str(kind.__module__).startswith(("vllm", "hrm_text_vllm"))
        )

    with serve(num_gpu_blocks_override=12, max_model_len=256) as llm:
        engine, short, preempted = llm.llm_engine, [chat for chat in chats if len(chat) < 150], count_preemptions(llm)

        def ask(turn: int) -> None:
            generate(llm, [[*prompt, 50 + turn] for prompt in short[:16]], ignore_eos=True, max_tokens=40)
            for index, prompt in enumerate(short[16:24]):
                engine.add_request(f"{turn}-{index}", {"prompt_token_ids": prompt}, sampling())
            engine.step()
            engine.abort_request([f"{turn}-{index}" for index in range(8)])
            while engine.has_unfinished_requests():
                engine.step()
            message = [{"role": "user", "content": f"What is {turn} + 4?<|im_end|>"}]
            llm.chat(message, sampling(max_tokens=2), use_tqdm=False)

        ask(0)
        before, preempted_before = alive(), len(preempted)
        for turn in range(1, 5):
            ask(turn)
        assert len(preempted) > preempted_before
        grown = alive() - before
        assert grown.total() < 16, grown
