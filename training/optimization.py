"""Optimizer and average weights.

AdamATan2 (https://arxiv.org/abs/2407.05872, section on epsilon) is the optimizer of the HRM papers. The one used here
is of the package `adam-atan2-pytorch`; where it is not installed, AdamW takes its place and says so.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


logger = logging.getLogger(__name__)

OPTIMIZERS = ("auto", "adam_atan2", "muon", "adamw")


def make_optimizer(
    model: nn.Module,
    learning_rate: float,
    name: str = "auto",
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
) -> Optimizer:
    """Optimizer over the parameters of a model that are trained.

    Args:
        model: what is trained; parameters with `requires_grad=False` (`z_L_init`, frozen weights) are left out.
        learning_rate: peak learning rate.
        name: "adam_atan2"; "muon", which orthogonalizes the updates of the matrices in the two stacks and leaves the
            rest to AdamATan2; "adamw"; or "auto" for the first where it is installed.
        weight_decay: decoupled, on all parameters; embeddings included, as in the training code.
        betas: decay of the first and the second moment.

    Raises:
        ImportError: "adam_atan2" or "muon", and the package is missing.
        ValueError: another name, or nothing to train.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer={name!r} is unknown: use one of {', '.join(OPTIMIZERS)}")
    if name != "adamw":
        try:
            from adam_atan2_pytorch import AdamAtan2, MuonAdamAtan2
        except ImportError as error:
            if name != "auto":
                raise ImportError(f"{name} is missing: pip install adam-atan2-pytorch, or take adamw") from error
            logger.warning("AdamATan2 is not installed (pip install adam-atan2-pytorch): AdamW is used.")
        else:
            settings = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay}
            if name != "muon":
                return AdamAtan2(parameters, **settings)
            inner = [
                parameter
                for path, parameter in model.named_parameters()
                if parameter.requires_grad and parameter.dim() == 2 and "_module." in path
            ]
            chosen = {id(parameter) for parameter in inner}
            # The package would take the difference of two sets, whose order changes from one process to the next and
            # with it which state a checkpoint gives to which parameter.
            return MuonAdamAtan2(
                muon_params=inner,
                params=[parameter for parameter in parameters if id(parameter) not in chosen],
                remove_muon_params_from_params=False,
                **settings,
            )
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay)


@torch.no_grad()
def complete_state(optimizer: Optimizer) -> None:
    """Gives each trained parameter that had no gradient yet the state that its first step would begin with.

    With two gradient steps the embeddings get none, and torch refuses to resume from a sharded checkpoint in which
    the state of a parameter is missing. Nothing else changes: a state begins at step 0.
    """
    groups = optimizer.param_groups
    parameters = [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]
    missing = [parameter for parameter in parameters if not optimizer.state.get(parameter)]
    if not missing:
        return
    gradients, rates = [parameter.grad for parameter in parameters], [group["lr"] for group in groups]
    for parameter in parameters:
        parameter.grad = None
    for parameter in missing:
        parameter.grad = torch.zeros_like(parameter)
    for group in groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(groups, rates):
        group["lr"] = rate
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    for parameter in missing:
        state = optimizer.state[parameter]
        for name in {"step", "steps"} & state.keys():
            state[name] = torch.zeros_like(state[name]) if isinstance(state[name], torch.Tensor) else 0


class AverageWeights(TrainerCallback):
    """Exponential moving average of the trained weights.

    It lies on the parameters as the trainer sees them, shards included, and is kept beside every checkpoint: one file,
    or one of every process where weights are sharded. Early steps count more: the decay is
    min(decay, (1 + steps) / (10 + steps)), so that random initial weights do not linger.

    Args:
        decay: share of the old average at each optimizer step, from 0 to below 1.
        resume: checkpoint folder to go on from.

    Raises:
        ValueError: a decay outside its range.
        FileNotFoundError: the checkpoint has no average.
    """

    def __init__(self, decay: float, resume: str | Path | None = None):
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: an average keeps a part from 0 to below 1 of itself")
        self.decay = decay
        self.resume = Path(resume) if resume else None
        self.average: list[torch.Tensor] = []
        self.steps = 0
        if self.resume is not None and not any(self.resume.glob("average_*.pt")):
            raise FileNotFoundError(
                f"{self.resume} holds no average_*.pt: it was written without an average of the weights"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.average = [parameter.detach().clone() for parameter in _trained(model)]
        self.steps = state.global_step
        if self.resume is not None:
            file = self.resume / _file_name(args.process_index if self._sharded(args) else 0)
            stored = torch.load(file, map_location="cpu", weights_only=True)
            for average, value in zip(self.average, stored, strict=True):
                _local(average).copy_(value)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for average, parameter in zip(self.average, _trained(model)):
                average.lerp_(parameter.detach().to(average.dtype), 1 - decay)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir() and (args.process_index == 0 or self._sharded(args)):
            file = folder / _file_name(args.process_index)
            # Renamed when it is whole, so that a kill leaves no part of a file that looks like one.
            torch.save([_local(average).cpu() for average in self.average], file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)

    def _sharded(self, args: TrainingArguments) -> bool:
        return bool(args.fsdp) or any(hasattr(average, "to_local") for average in self.average)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Puts the average into the model for the time of a `with` block."""
        self.swap(model)
        try:
            yield
        finally:
            self.swap(model)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchanges the weights of the model and the average."""
        for average, parameter in zip(self.average, _trained(model), strict=True):
            raw = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(raw)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that this process holds; any other tensor itself."""
    to_local: Callable[[], torch.Tensor] | None = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor


def _file_name(process: int) -> str:
    return f"average_{process}.pt"
