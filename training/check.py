"""Whether a trainer trains what it is meant to: prompts read as blocks, and the loss on responses alone."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .data import IGNORED, closing_id


class PrefixCheck(TrainerCallback):
    """Holds the first passes of a training against plain ones, from inside the run.

    Each sequence of a batch, without its padding and its neighbours in a packed row, is read once more by a plain
    forward with explicit `token_type_ids`, which the tokenizer derives from the ids. The log-probabilities of all
    response tokens must be the same, whatever the trainer passed on or left out.

    Args:
        tokenizer: an `HrmTextTokenizer`.
        passes: how many forward passes with gradient are checked. Each costs about one forward more.
        tolerance: largest difference of a log-probability. The default is for float32; half precision needs about 0.1.

    Attributes:
        checked: response tokens compared so far.
        worst: largest difference met.

    Raises:
        ValueError (in training): log-probabilities differ; a sequence has no block; labels lie on tokens of a block;
            the batch is not one of ids alone; attention weights are dropped out, so that no two passes are equal.
    """

    def __init__(self, tokenizer: Any, passes: int = 4, tolerance: float = 1e-4):
        self.tokenizer, self.passes, self.tolerance = tokenizer, passes, tolerance
        self.checked, self.worst = 0, 0.0
        self._handles: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        # Wrappers (peft, DDP) pass attributes on, so the class itself is asked.
        found = (each for each in model.modules() if hasattr(type(each), "set_gradient_steps"))
        causal = next((each for each in found if "lm_head" in each._modules), None)
        if causal is None:
            raise TypeError(f"{type(model).__name__} holds no HRM-Text with an output head to be checked")
        if causal.config.attention_dropout:
            raise ValueError("attention_dropout makes each pass another: set it to 0, or train without PrefixCheck")
        # Two places: labels reach the outer module, whose forward a trainer may have replaced; all ids the inner one.
        outer = causal.register_forward_pre_hook(self._check_labels, with_kwargs=True)
        inner = causal.model.register_forward_hook(self._checker(causal), with_kwargs=True)
        self._handles = [outer, inner]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _check_labels(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        labels, ids = kwargs.get("labels"), kwargs.get("input_ids")
        if labels is None or not torch.is_grad_enabled() or self.passes <= 0 or not _stands_alone(kwargs):
            return
        asked = inside = 0
        for row, places in _sequences(kwargs):
            types = torch.tensor(self._types(ids[row, places].tolist()), device=labels.device)
            learned = labels[row, places] != IGNORED
            asked, inside = asked + int(learned.sum()), inside + int((learned & (types != 0)).sum())
        if inside:
            raise ValueError(
                f"{inside} of {asked} labels lie on tokens of a prompt, which see one another: their loss teaches "
                "copying. Give prompt/completion rows, or messages with assistant_only_loss=True"
            )

    def _checker(self, causal: nn.Module) -> Any:
        def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not (module.training and torch.is_grad_enabled()) or self.passes <= 0:
                return
            self.passes -= 1
            if args:
                kwargs = {"input_ids": args[0], **kwargs}
            if not _stands_alone(kwargs):
                raise ValueError(
                    "the batch is embeddings, follows on a cache, or has a mask of its own, and cannot be read again "
                    "from its ids: leave PrefixCheck out"
                )
            with torch.no_grad():
                self._compare(causal, kwargs, output[0])

        return check

    def _compare(self, causal: nn.Module, kwargs: dict[str, Any], hidden_states: torch.Tensor) -> None:
        """Compares hidden_states [rows, tokens, hidden] of a call with those of plain forwards."""
        for row, places in _sequences(kwargs):
            ids = kwargs["input_ids"][row, places]
            types = torch.tensor([self._types(ids.tolist())], device=ids.device)
            # Past the hooks, this one among them.
            plain = type(causal.model).forward(causal.model, ids[None], token_type_ids=types, use_cache=False)
            response = types[0, 1:] == 0
            used, wanted = (
                causal.lm_head(states[:-1][response]).float().log_softmax(-1).gather(1, ids[1:][response][:, None])
                for states in (hidden_states[row, places], plain[0][0])
            )
            if not len(used):
                continue
            worst = float((used - wanted).abs().max())
            self.checked, self.worst = self.checked + len(used), max(self.worst, worst)
            if not worst <= self.tolerance:
                raise ValueError(
                    f"a log-probability of the trainer is {worst:.2g} away from that of a plain forward with explicit "
                    f"token types (tolerance {self.tolerance:g}): the trainer reads prompts in another way"
                )

    def _types(self, ids: list[int]) -> list[int]:
        types = self.tokenizer.create_token_type_ids_from_sequences(ids)
        end = closing_id(self.tokenizer)
        ends = () if end is None else (self.tokenizer.bos_token_id, end)
        if any(token in ends and not kind for token, kind in zip(ids, types)):
            raise ValueError(
                "a sequence has one end of a prompt and not the other, so that the rest of it would be read causally: "
                "no packing may cut a prompt (in TRL, packing_strategy='bfd' and a max_length above the longest row)"
            )
        if not any(types):
            raise ValueError(
                "a sequence has no prompt block and would be read causally: give chats, or strings from "
                "tokenizer.build_prompt"
            )
        return types


def _stands_alone(kwargs: dict[str, Any]) -> bool:
    """Whether a call is one of ids, with at most a mask of the same shape: no virtual tokens, no past."""
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    return ids is not None and kwargs.get("past_key_values") is None and (mask is None or mask.shape == ids.shape)


def _sequences(kwargs: dict[str, Any]) -> Iterator[tuple[int, torch.Tensor]]:
    """Row and places of each sequence of a batch: without padding, and cut where positions begin again."""
    ids, mask, positions = kwargs["input_ids"], kwargs.get("attention_mask"), kwargs.get("position_ids")
    for row in range(ids.shape[0]):
        places = torch.arange(ids.shape[1], device=ids.device)
        if mask is not None:
            places = places[mask[row].bool()]
        if positions is None or len(places) < 2:
            yield row, places
            continue
        own = positions[row % positions.shape[0]][places]
        starts = (own[1:] <= own[:-1]).nonzero().flatten() + 1
        for part in torch.tensor_split(places, starts.cpu()):
            yield row, part
