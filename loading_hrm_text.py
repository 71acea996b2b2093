"""Loading that refuses a folder whose stacks do not fit, in place of filling them with random numbers."""

from __future__ import annotations

import re
from typing import Any

from .versions_hrm_text import FusedLoadingMixin, refuse_tensor_parallelism


_STACK_KEY = re.compile(r"(^|\.)[HL]_module\.layers\.\d+\.")


class LoadingMixin(FusedLoadingMixin):
    """`from_pretrained` that checks every tensor of the two stacks."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, and raises a ValueError where a tensor of a stack is missing or left over."""
        refuse_tensor_parallelism(kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        _refuse_partial_stacks(pretrained_model_name_or_path, info)
        for name, parameter in model.named_parameters():
            if name.endswith("z_L_init"):
                # Loading puts a new parameter in place of ours; this one is never trained.
                parameter.requires_grad_(False)
        return (model, info) if wants_info else model


def _refuse_partial_stacks(source: Any, info: dict[str, Any]) -> None:
    for kind, keys in (("lacks", info["missing_keys"]), ("holds the unexpected", info["unexpected_keys"])):
        wrong = sorted(key for key in keys if _STACK_KEY.search(key))
        if wrong:
            raise ValueError(
                f"{source} {kind} {wrong[0]!r} and {len(wrong) - 1} more tensors of the H and L stacks: its layers do "
                "not match its config (`num_layers_per_stack`), or its tensors are in another layout. Run "
                f"`python convert_weights.py {source} --output DIR`, which reads the tensors and writes a folder that "
                "loads."
            )


__all__ = ["LoadingMixin"]
