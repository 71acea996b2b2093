"""Loading that refuses what fits only in part: checkpoints whose stacks do not match, and adapters for other names."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch

from .versions_hrm_text import FusedLoadingMixin, refuse_tensor_parallelism


_STACK_KEY = re.compile(r"(^|\.)[HL]_module\.layers\.\d+\.")
# Of a layer, under whatever name: `model.H_level.core.layers.0.attn...`, `h.0.mlp...`.
_LAYER_KEY = re.compile(r"\.\d+\.")
# Projections that transformers' own class keeps apart; here they are rows of `gqkv_proj` and `gate_up_proj`.
_SPLIT_NAME = re.compile(r"(?<![A-Za-z_])(self_attn|q_proj|k_proj|v_proj|gate_proj|up_proj)(?![A-Za-z_])")
_SPLIT_PARTS = {
    "attn.gqkv_proj": ("self_attn.gate_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
_ADAPTER_KEY = re.compile(r"([HL]_module\.layers\.\d+\.([a-z_]+\.[a-z_]+))\.(?!(base_layer\.)?weight$)")
# A regular expression that ends with a choice of plain names.
_LAST_CHOICE = re.compile(r"\((?:\?:)?(\w+(?:\|\w+)+)\)\$?$")
# peft itself adds these to `modules_to_save`, whatever the model calls its head.
_HEADS_OF_PEFT = {"classifier", "score", "qa_outputs"}
_CONVERT = (
    "Run `python convert_weights.py ADAPTER --output DIR`, which writes the same adapter for this class, or train one "
    "with target_modules among gqkv_proj, o_proj, gate_up_proj and down_proj."
)


_OTHER = "It was trained on a model of another size: load it on that one."


class AdapterGuardMixin:
    """Refuses adapters that were made for the projections of transformers' own class.

    peft adapts the projections whose names match and ignores the others silently, or loads none of their tensors and
    only warns. It calls no hook of the model, but lists the modules before it wraps any: there a new config is read.
    Should a release of peft do otherwise, the first config is still checked when peft sets it as an attribute of the
    model, and later ones when the modules are listed next.
    """

    @property
    def peft_config(self) -> dict[str, Any]:
        """The configs of this model's adapters by their names. Raises AttributeError before the first adapter."""
        try:
            return self.__dict__["_peft_config"]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no adapter") from None

    @peft_config.setter
    def peft_config(self, configs: dict[str, Any]) -> None:
        is_first = "_peft_config" not in self.__dict__
        self.__dict__["_peft_config"] = configs
        try:
            self._check_adapters()
        except ValueError:
            if is_first:
                del self.peft_config
                _take_off(self)
            raise

    @peft_config.deleter
    def peft_config(self) -> None:
        self.__dict__.pop("_peft_config", None)
        self.__dict__.pop("_checked_adapters", None)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Module]]:
        """As in `torch.nn.Module`. Raises a ValueError if peft asks in order to add an adapter that does not fit."""
        self._check_adapters()
        config = _config_being_added(sys._getframe(1))
        if config is not None:
            self._check_adapter(config)
        return super().named_modules(*args, **kwargs)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Raises a ValueError where a tensor of the adapter belongs to no module of this model."""
        before = dict(self.__dict__.get("_peft_config") or {})
        try:
            info = super().load_adapter(*args, **kwargs)
            _refuse_foreign_tensors(self, getattr(info, "unexpected_keys", None) or ())
        except ValueError:
            for name in [name for name in self.__dict__.get("_peft_config") or {} if name not in before]:
                _remove(self, name)
            raise
        return info

    def _check_adapters(self) -> None:
        configs = self.__dict__.get("_peft_config")
        if not configs:
            return
        checked = self.__dict__.setdefault("_checked_adapters", {})
        for adapter, config in list(configs.items()):
            if checked.get(adapter) is not config:
                try:
                    self._check_adapter(config)
                except ValueError:
                    del configs[adapter]
                    raise
                checked[adapter] = config

    def _check_adapter(self, config: Any) -> None:
        problem = _misnamed_targets(config, [name for name, _ in super().named_modules()])
        if problem:
            raise ValueError(f"{problem} {_CONVERT}")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        _refuse_foreign_tensors(self, (key for key in state_dict if key.startswith(prefix)), prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _config_being_added(caller: FrameType) -> Any:
    """The config of the adapter for which peft lists the modules, None for every other caller."""
    if caller.f_code.co_name == "inject_adapter" and caller.f_globals.get("__name__", "").startswith("peft."):
        return caller.f_locals.get("peft_config")
    return None


def _misnamed_targets(config: Any, names: list[str]) -> str | None:
    """What is wrong with the module names in an adapter's config, or None."""
    for field in ("target_modules", "feedforward_modules", "exclude_modules"):
        wanted = getattr(config, field, None) or ()
        if isinstance(wanted, str):
            problem = None if wanted.lower() == "all-linear" else _problem_of_expression(wanted, names)
        else:
            wanted = sorted(map(str, wanted))
            missing = (text for text in wanted if not any(f".{name}".endswith(f".{text}") for name in names))
            # What is not there needs no exclusion, except that it may be here under another name.
            missing = (text for text in missing if field != "exclude_modules" or _SPLIT_NAME.search(text))
            problem = next(map(_problem_of_name, missing), None)
        if problem:
            return f"`{field}` of the adapter names {problem}"
    for field in ("rank_pattern", "alpha_pattern"):
        for text in getattr(config, field, None) or ():
            if not any(re.match(rf"(.*\.)?({text})$", name) for name in names):
                return f"`{field}` of the adapter names {_problem_of_name(str(text))}"
    for text in getattr(config, "target_parameters", None) or ():
        module = str(text).rpartition(".")[0]
        if not any(f".{name}".endswith(f".{module}") for name in names):
            return f"`target_parameters` of the adapter names {_problem_of_name(str(text))}"
    for text in getattr(config, "modules_to_save", None) or ():
        if text not in _HEADS_OF_PEFT and not any(name.endswith(text) for name in names):
            return f"`modules_to_save` of the adapter names {_problem_of_name(str(text))}"
    return _missing_layers(config, names)


def _problem_of_name(text: str) -> str:
    if _SPLIT_NAME.search(text):
        return f"{text!r}, and in this class such projections are fused."
    return f"{text!r}, and this model has no such module."


def _problem_of_expression(text: str, names: list[str]) -> str | None:
    """What a regular expression names in vain: the projections of the library's class, or one of its last words."""
    try:
        pattern = re.compile(text)
    except re.error:
        return None  # peft says so itself
    for name in names:
        for fused, parts in _SPLIT_PARTS.items():
            stem = name.removesuffix(fused)
            if stem != name and not pattern.fullmatch(name) and any(pattern.fullmatch(stem + part) for part in parts):
                return _problem_of_name(next(stem + part for part in parts if pattern.fullmatch(stem + part)))
    choice = _LAST_CHOICE.search(text)
    if choice:
        alternatives = {word: text[: choice.start()] + word for word in choice[1].split("|")}
    else:
        alternatives = {} if set(text) & set("()[]") else {part: part for part in text.split("|")}
    for word, alternative in alternatives.items():
        if not any(re.fullmatch(alternative, name) for name in names):
            return _problem_of_name(word)
    return None


def _missing_layers(config: Any, names: list[str]) -> str | None:
    wanted = getattr(config, "layers_to_transform", None)
    wanted = [wanted] if isinstance(wanted, int) else wanted or ()
    found = {int(match[1]) for name in names if (match := re.search(r"_module\.layers\.(\d+)$", name))}
    absent = [index for index in wanted if index not in found]
    if absent and found:
        return f"`layers_to_transform` of the adapter names layer {absent[0]}; each stack has 0 to {max(found)}."
    return None


def _refuse_foreign_tensors(model: Any, keys: Iterable[str], prefix: str = "") -> None:
    """Raises a ValueError for the first tensor of an adapter whose layer or projection `model` does not have."""
    names: set[str] = set()
    for key in keys:
        match = _ADAPTER_KEY.search(key)
        if match is None:
            continue
        names = names or {name[name.rfind("_module.layers.") - 1 :] for name, _ in model.named_modules()}
        if match[1] in names:
            continue
        is_split = any(match[2] in parts for parts in _SPLIT_PARTS.values()) or match[2].startswith("self_attn.")
        reason = "a projection that this class has fused" if is_split else "and this model has no such module"
        raise ValueError(f"the adapter holds {key[len(prefix) :]!r}, {reason}. {_CONVERT if is_split else _OTHER}")


def _take_off(model: Any) -> None:
    """Puts back the modules that a refused adapter has wrapped, and makes the weights trainable again."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            while type(child).__module__.startswith("peft."):
                # Of an adapted projection, or of a copy that is trained beside the module (`modules_to_save`).
                child = child.base_layer if hasattr(child, "base_layer") else child.original_module
                setattr(module, name, child)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(not name.endswith("z_L_init"))
    model._hf_peft_config_loaded = False


def _remove(model: Any, adapter: str) -> None:
    """Removes an adapter that was refused after peft had added it."""
    del model.peft_config[adapter]
    if not model.peft_config:
        del model.peft_config
        _take_off(model)
        return
    for module in list(model.modules()):
        if type(module).__module__.startswith("peft.") and hasattr(module, "base_layer"):
            module.delete_adapter(adapter)


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
    unexpected = info["unexpected_keys"]
    if getattr(model, "hf_quantizer", None) is not None:
        # A layer of compressed-tensors unpacks itself at its first use, and is then saved with the shape of the pack.
        unexpected = [key for key in unexpected if not key.endswith(".weight_shape")]
    for kind, keys in (("lacks", info["missing_keys"]), ("holds the unexpected", unexpected)):
        wrong = sorted(key for key in keys if _STACK_KEY.search(key))
        if wrong:
            raise ValueError(
                f"{source} {kind} {wrong[0]!r} and {len(wrong) - 1} more tensors of the H and L stacks: its layers do "
                "not match its config (`num_layers_per_stack`), or its tensors are in another layout. Run "
                f"`python convert_weights.py {source} --output DIR`, which reads the tensors and writes a folder that "
                "loads."
            )


__all__ = ["LoadingMixin"]
