"""How often a call waits for the device: one stacked read in a direct forward, none in a step of `generate`.

On a GPU each read stops the host until every kernel before it has run. On a processor a read costs nothing, but it
goes through the same operations, so it can be counted there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache, modeling_flash_attention_utils

from .flash_stand_in import flash_stand_in
from .optimized_models import captured, decode_statically
from .tiny import load_class, tiny_model


use_kernels = load_class("kernels_hrm_text.use_kernels")
History, StepLayout = load_class("cache_hrm_text.History"), load_class("layout_hrm_text.StepLayout")

ROOM = "_hrm_text.py"
# Operations whose result, or its shape, the host must wait for.
OPERATIONS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "allclose", "bincount"}
OPERATIONS |= {"_unique2", "unique_dim", "unique_consecutive"}
# What copies to the host without an operation, where the tensor lies there already.
COPIES = {"tolist", "numpy", "cpu", "__array__"}
# Every way of a read from Python, for counting without a dispatch mode, under which the kernels room steps back.
METHODS = COPIES | {"item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "equal", "masked_select"}


class Read(NamedTuple):
    """A read, and the innermost function of a room, of transformers or of a stand-in that asked for it."""

    what: str
    file: str
    function: str


def _who_reads() -> tuple[str, str]:
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.endswith((ROOM, "flash_stand_in.py")) or f"{os.sep}transformers{os.sep}" in path:
            return os.path.basename(path), frame.f_code.co_name
        frame = frame.f_back
    return "", ""


class _Operations(TorchDispatchMode):
    def __init__(self, reads: list[Read]):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        waits = name in OPERATIONS
        if name in ("index", "index_put", "index_put_"):
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        elif name == "repeat_interleave":
            waits = kwargs.get("output_size") is None
        if waits:
            self.reads.append(Read(name, *_who_reads()))
        return func(*args, **kwargs)


class _Methods(TorchFunctionMode):
    def __init__(self, reads: list[Read], names: set[str]):
        super().__init__()
        self.reads, self.names = reads, names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.names:
            self.reads.append(Read(func.__name__, *_who_reads()))
        return func(*args, **(kwargs or {}))


def reads_of(call: Callable[[], Any]) -> tuple[list[Read], Any]:
    """The reads of a call without fast kernels, which read a number where a processor is the faster for it."""
    reads: list[Read] = []
    with torch.no_grad(), use_kernels(False), _Methods(reads, COPIES), _Operations(reads):
        result = call()
    return reads, result


def of_rooms(reads: list[Read]) -> list[Read]:
    return [read for read in reads if read.file.endswith(ROOM)]


# ---- the counter itself ---------------------------------------------------------------------------------------------

NUMBERS = torch.arange(4)
WAITING = {
    "item": lambda: NUMBERS[1].item(),
    "int": lambda: int(NUMBERS[1]),
    "float": lambda: float(NUMBERS[1]),
    "if": lambda: 1 if NUMBERS.any() else 0,
    "as a list's index": lambda: [0, 1, 2][NUMBERS[1]],
    "as a slice": lambda: NUMBERS[: NUMBERS[2]],
    "comparison": lambda: max(NUMBERS[1], NUMBERS[2]),
    "in": lambda: 3 in NUMBERS,
    "format": lambda: f"{NUMBERS[0]}",
    "tolist": lambda: NUMBERS.tolist(),
    "tolist of one": lambda: NUMBERS[1].tolist(),
    "numpy": lambda: NUMBERS.numpy(),
    "cpu": lambda: NUMBERS.cpu(),
    "nonzero": lambda: NUMBERS.nonzero(),
    "where with one argument": lambda: torch.where(NUMBERS > 1),
    "a mask as an index": lambda: NUMBERS[NUMBERS > 1],
    "writing through a mask": lambda: NUMBERS.clone().__setitem__(NUMBERS > 1, 0),
    "masked_select": lambda: NUMBERS.masked_select(NUMBERS > 1),
    "equal": lambda: torch.equal(NUMBERS, NUMBERS),
    "unique": lambda: NUMBERS.unique(),
    "repeats of a tensor": lambda: NUMBERS.repeat_interleave(NUMBERS),
}
FREE = {
    "masked_fill": lambda: NUMBERS.masked_fill(NUMBERS > 1, 0),
    "where": lambda: torch.where(NUMBERS > 1, NUMBERS, 0),
    "numbers as an index": lambda: NUMBERS[NUMBERS],
    "gather": lambda: NUMBERS.gather(0, NUMBERS),
    "cumsum": lambda: NUMBERS.cumsum(0),
    "sizes": lambda: NUMBERS[: NUMBERS.shape[0]],
    "equal repeats": lambda: NUMBERS.repeat_interleave(2),
    "index_copy": lambda: NUMBERS.clone().index_copy_(0, NUMBERS, NUMBERS),
}


@pytest.mark.parametrize("name", WAITING)
def test_the_counter_sees(name):
    assert reads_of(WAITING[name])[0]


@pytest.mark.parametrize("name", FREE)
def test_the_counter_does_not_count(name):
    assert not reads_of(FREE[name])[0]


# ---- direct calls ---------------------------------------------------------------------------------------------------

IDS = torch.tensor([[6, 20, 31, 42, 7, 50, 51], [5, 5, 6, 55, 7, 60, 61]])
MASK = (IDS != 5).long()
TYPES = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0]])
PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1], [0, 0, 0, 1, 2, 0, 1]])
SQUARE = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
CALLS = {
    "inferred types": {},
    "types": {"token_type_ids": TYPES},
    "causal": {"token_type_ids": torch.zeros_like(TYPES)},
    "a mask without padding": {"attention_mask": torch.ones_like(MASK)},
    "padded": {"attention_mask": MASK},
    "padded, types": {"attention_mask": MASK, "token_type_ids": TYPES},
    "packed": {"attention_mask": MASK, "position_ids": PACKED},
    "packed, types": {"attention_mask": MASK, "position_ids": PACKED, "token_type_ids": TYPES},
    "without a cache": {"use_cache": False},
    "hidden states": {"output_hidden_states": True},
    "a mask of four dimensions": {"attention_mask": SQUARE},
}
CACHES = {
    "HrmTextCache": lambda model: None,
    "DynamicCache": lambda model: DynamicCache(config=model.config),
    "StaticCache": lambda model: StaticCache(config=model.config, max_cache_len=32),
}


def model_of(**overrides: Any) -> Any:
    model = tiny_model(prefix_end_token_id=7, num_layers_per_stack=1, **overrides)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CALLS)
def test_a_direct_forward_reads_once(name, implementation):
    model = model_of(attn_implementation=implementation)
    reads, _ = reads_of(lambda: model(IDS, **CALLS[name]))
    assert reads == [Read("tolist", "reading_hrm_text.py", "_read_at_once")]


@pytest.mark.parametrize("name", [name for name in CALLS if name != "a mask of four dimensions"])
def test_flash_attention_reads_the_lengths_of_its_runs(name, monkeypatch):
    """At most one read more, where rows have padding, blocks or several sequences; one new token needs none."""
    monkeypatch.setattr(modeling_flash_attention_utils, "_flash_varlen_fn", flash_stand_in, raising=False)
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *args, **kwargs: None)
    model = model_of()
    model.config._attn_implementation = "flash_attention_2"
    reads, output = reads_of(lambda: model(IDS, **CALLS[name]))
    first, *others = of_rooms(reads)
    assert first == Read("tolist", "reading_hrm_text.py", "_read_at_once")
    assert others in ([], [Read("tolist", "attention_hrm_text.py", "plan_flash")])
    assert {read.file for read in reads if read not in of_rooms(reads)} == {"flash_stand_in.py"}
    if output.past_key_values is not None:
        reads, _ = reads_of(lambda: model(IDS[:, :1], past_key_values=output.past_key_values))
        assert reads == [Read("tolist", "reading_hrm_text.py", "_read_at_once")]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", CACHES)
def test_a_direct_forward_on_a_live_cache_reads_once(kind, padded):
    """The prompt, one token, and several with a block: each beside the check that the cache is what it was."""
    model = model_of()
    cache, length = CACHES[kind](model), 0
    for ids in (IDS, torch.tensor([[33], [34]]), torch.tensor([[6, 40, 7, 41], [6, 42, 7, 43]])):
        length += ids.shape[1]
        mask = torch.cat([MASK, torch.ones(2, length - 7, dtype=torch.long)], dim=1) if padded else None
        reads, output = reads_of(lambda: model(ids, attention_mask=mask, past_key_values=cache, use_cache=True))  # noqa: B023
        cache = output.past_key_values
        assert reads == [Read("tolist", "reading_hrm_text.py", "_read_at_once")]


@pytest.mark.parametrize("labelled", ["all", "responses"])
def test_the_loss_reads_once_more(labelled):
    """How many tokens carry labels is the size of a tensor, which the host has to know."""
    model = model_of()
    labels = IDS if labelled == "all" else IDS.where(TYPES == 0, -100)
    reads, _ = reads_of(lambda: model(IDS, labels=labels))
    assert [read.file for read in reads] == ["reading_hrm_text.py", "modeling_hrm_text.py"]


# ---- steps of `generate` --------------------------------------------------------------------------------------------


def reads_of_calls(model: Any, **options: Any) -> tuple[list[Read], ...]:
    """The reads of `generate`: before its first forward call, and from the beginning of each to that of the next."""
    reads: list[Read] = []
    begins: list[int] = []
    hook = model.register_forward_pre_hook(lambda module, args: begins.append(len(reads)))
    options = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True, **options}
    with use_kernels(False), _Methods(reads, COPIES), _Operations(reads):
        model.generate(**options)
    hook.remove()
    return tuple(reads[start:end] for start, end in zip([0, *begins], [*begins, None]))


PROMPTS = {
    "greedy": {"input_ids": IDS[:1]},
    "greedy, a mask": {"input_ids": IDS[:1], "attention_mask": MASK[:1]},
    "greedy, types": {"input_ids": IDS[:1], "token_type_ids": TYPES[:1]},
    "greedy, padded": {"input_ids": IDS, "attention_mask": MASK},
    "greedy, positions": {"input_ids": IDS[:1], "position_ids": torch.arange(9, 16)[None]},
    "sampling, padded": {"input_ids": IDS, "attention_mask": MASK, "do_sample": True},
    "beams, padded": {"input_ids": IDS, "attention_mask": MASK, "num_beams": 2},
    # The search of transformers 4 for drafts needs an end.
    "drafts": {"input_ids": IDS[:1].repeat(1, 2), "prompt_lookup_num_tokens": 2, "eos_token_id": 5},
}


@pytest.mark.parametrize("kind", [None, "dynamic", "static"])
@pytest.mark.parametrize("name", PROMPTS)
def test_a_step_of_generate_reads_nothing(name, kind):
    """What remains are the library's own reads: whether all rows have ended, and of its search for drafts or beams."""
    _, first, *steps = reads_of_calls(model_of(), **PROMPTS[name], cache_implementation=kind)
    assert of_rooms(first) == [Read("tolist", "reading_hrm_text.py", "_read_at_once")]
    assert len(steps) >= 2
    for step in steps:
        found = of_rooms(step)
        if kind == "static":
            # The length of a static cache on a processor, where it is no read from a device.
            found = [read for read in found if read[1:] != ("modeling_hrm_text.py", "_prepare")]
        assert not found


@pytest.mark.parametrize("padded", [False, True])
def test_a_captured_step_reads_nothing(padded):
    """The operations that are captured, and those that hand over the inputs and note the token in the history."""
    model = decode_statically(model_of())
    _, _, *steps = reads_of_calls(model, input_ids=IDS, attention_mask=MASK if padded else None)
    assert captured(model) and len(steps) == 5
    assert not [read for step in steps for read in of_rooms(step)]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", CACHES)
def test_a_step_runs_where_nothing_can_be_read(kind, padded, implementation, fast):
    """On the meta device there are no values: a read, a copy or a shape that depends on values is an error there."""
    model = model_of(attn_implementation=implementation)
    with torch.no_grad(), use_kernels(fast):
        cache = CACHES[kind](model)
        mask = MASK if padded else None
        cache = model(IDS, attention_mask=mask, past_key_values=cache, use_cache=True).past_key_values
        model.to("meta")
        for layer in cache.layers:
            layer.device = torch.device("meta")
            for name, value in list(vars(layer).items()):
                if isinstance(value, torch.Tensor):
                    setattr(layer, name, value.to("meta"))
        History.of(cache).to(torch.device("meta"))
        for length in (8, 9):
            ids = torch.zeros(2, 1, dtype=torch.long, device="meta")
            columns = 32 if kind == "StaticCache" else length
            mask = torch.ones(2, columns, dtype=torch.long, device="meta") if padded else None
            output = model(ids, attention_mask=mask, past_key_values=cache, layout=StepLayout(padded))
            assert output.logits.shape == (2, 1, model.config.vocab_size)
        with pytest.raises((NotImplementedError, RuntimeError)):
            model(torch.zeros(2, 2, dtype=torch.long, device="meta"), past_key_values=cache)


def test_what_the_fast_kernels_read():
    """One number of the norm of a single row, on processors only, where it is faster than a tensor."""
    reads: list[Read] = []
    model = model_of()
    with use_kernels(True), torch.no_grad():
        output = model(IDS[:1], use_cache=True)
        with _Methods(reads, METHODS):
            model(IDS[:1, :1], past_key_values=output.past_key_values, layout=StepLayout(padded=False))
    assert {read[1:] for read in of_rooms(reads)} == {("kernels_hrm_text.py", "fused_norm")}
