"""Warm-up of credit assignment: backpropagation through few module calls first, then through more.

Source: the HRM-Text paper, which goes linearly from 2 to 5 steps over the first 20 % of training.
"""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .optimization import complete_state


def steps_at(progress: float, first: int = 2, last: int = 5) -> int:
    """Gradient steps at a progress of the warm-up from 0 to 1; above 1 is 1."""
    return first + int(min(progress, 1.0) * (last - first))


class GradientStepsWarmup(TrainerCallback):
    """Sets the gradient steps of an HRM-Text before every optimizer step.

    They follow from the number of optimizer steps done, so that a resumed run goes on where it was and gradient
    accumulation changes nothing.

    Args:
        first: steps at the beginning, at least 2.
        last: steps after the warm-up.
        fraction: part of the training that the warm-up takes, from 0 to 1.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(self, first: int = 2, last: int = 5, fraction: float = 0.2):
        if not 2 <= first <= last:
            raise ValueError(f"first={first}, last={last}: gradient steps go from at least 2 up")
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction={fraction}: the warm-up takes a part of the training from 0 to 1")
        self.first, self.last, self.fraction = first, last, fraction

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._set(model, self.last)  # refuses a number that the model is too shallow for before any work is done

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        warmup_steps = self.fraction * state.max_steps
        progress = state.global_step / warmup_steps if warmup_steps else 1.0
        self._set(model, steps_at(progress, self.first, self.last))

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if args.fsdp and optimizer is not None:
            complete_state(getattr(optimizer, "optimizer", optimizer))  # what accelerate has wrapped

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._set(model, None)

    @staticmethod
    def _set(model: nn.Module, steps: int | None) -> None:
        # The model may lie inside wrappers (peft, DDP, FSDP); the outermost HRM-Text sets all that is below it.
        for module in model.modules():
            if hasattr(type(module), "set_gradient_steps"):
                module.set_gradient_steps(steps)
                return
        raise TypeError(f"{type(model).__name__} holds no HRM-Text, which alone has gradient steps to set")
