"""Loading that refuses what fits in part: folders whose stacks do not, and adapters made for other projections."""

from __future__ import annotations

import re
from typing import Any

from .versions_hrm_text import FusedLoadingMixin, refuse_tensor_parallelism


_STACK_KEY = re.compile(r"(^|\.)[HL]_module\.layers\.\d+\.")
# Of a layer, under whatever name: `model.H_level.core.layers.0.attn...`, `h.0.mlp...`.
_LAYER_KEY = re.compile(r"\.\d+\.")
# Projections that transformers' own class keeps apart; here they are rows of `gqkv_proj` and `gate_up_proj`.
_SPLIT_NAME = re.compile(r"(?<![A-Za-z_])(self_attn|q_proj|k_proj|v_proj|gate_proj|up_proj)(?![A-Za-z_])")
_SPLIT_ADAPTER_KEY = re.compile(
    r"[HL]_module\.layers\.\d+\.(self_attn\.[a-z_]+|mlp\.(gate|up)_proj)\.(?!(base_layer\.)?weight$)"
)
_CONVERT = (
    "Run `python convert_weights.py ADAPTER --output DIR`, which writes the same adapter for this class, or train one "
    "with target_modules among gqkv_proj, o_proj, gate_up_proj and down_proj."
)


class AdapterGuardMixin:
    """Refuses adapters that were made for the projections of transformers' own class.

    peft adapts the projections whose names match and leaves out the others without a word, or loads none of their
    tensors with no more than a warning. It hands every model its configs once they are applied, and loads tensors
    through the module's own method; both places look at the names.
    """

    @property
    def peft_config(self) -> dict[str, Any]:
        """The configs of the adapters on this model by their names; there is none before the first adapter."""
        try:
            return self.__dict__["_peft_config"]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no adapter") from None

    @peft_config.setter
    def peft_config(self, configs: dict[str, Any]) -> None:
        names = [name for name, _ in self.named_modules()]
        for config in configs.values():
            problem = _misnamed_targets(config, names)
            if problem:
                if "_peft_config" not in self.__dict__:
                    _take_off(self)
                raise ValueError(f"{problem} {_CONVERT}")
        self.__dict__["_peft_config"] = configs

    @peft_config.deleter
    def peft_config(self) -> None:
        self.__dict__.pop("_peft_config", None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        wrong = next((key for key in state_dict if key.startswith(prefix) and _SPLIT_ADAPTER_KEY.search(key)), None)
        if wrong is not None:
            raise ValueError(f"the adapter holds {wrong!r}, a projection that this class has fused. {_CONVERT}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _misnamed_targets(config: Any, names: list[str]) -> str | None:
    """What is wrong with the module names in an adapter's config, or None."""
    for field in ("target_modules", "rank_pattern", "alpha_pattern"):
        wanted = getattr(config, field, None) or ()
        texts = [wanted] if isinstance(wanted, str) else [text for text in wanted if isinstance(text, str)]
        for text in texts:
            if _SPLIT_NAME.search(text):
                return f"`{field}` of the adapter names {text!r}, and here such projections are fused."
            if field == "target_modules" and text is not wanted and not _is_a_module(text, names):
                return f"`{field}` of the adapter names {text!r}, which no module of this model is called."
    return None


def _is_a_module(text: str, names: list[str]) -> bool:
    return any(name == text or name.endswith(f".{text}") for name in names)


def _take_off(model: Any) -> None:
    """Puts the layers back that a refused adapter has wrapped, and lets their weights be trained again."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "base_layer"):
                setattr(module, name, child.base_layer)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("z_L_init"))


class LoadingMixin(AdapterGuardMixin, FusedLoadingMixin):
    """`from_pretrained` that checks every tensor of the two stacks."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, and raises a ValueError where some tensor of a stack is missing, left over or misnamed.

        Where there is no tensor of any layer the model stays as initialized, of which transformers warns.
        """
        refuse_tensor_parallelism(kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        _refuse_partial_stacks(pretrained_model_name_or_path, info, model)
        for name, parameter in model.named_parameters():
            if name.endswith("z_L_init"):
                # Loading puts a new parameter in place of ours; this one is never trained.
                parameter.requires_grad_(False)
        return (model, info) if wants_info else model


def _refuse_partial_stacks(source: Any, info: dict[str, Any], model: Any) -> None:
    wanted = {key for key in model.state_dict() if _STACK_KEY.search(key)}
    if wanted <= set(info["missing_keys"]) and not any(map(_LAYER_KEY.search, info["unexpected_keys"])):
        return
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
