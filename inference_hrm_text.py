"""`optimize_for_inference`: packed weights on the CPU, captured decoding on CUDA, and one compiled layer for all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import logging

from .decoding_hrm_text import StaticDecoder
from .packed_hrm_text import PackedLinear, pack_model, unpack_model


logger = logging.get_logger(__name__)

_DEFAULT_OPTIONS = (("dynamic", False),)


@functools.cache
def compiled_layer(forward: Callable[..., Any], options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """`torch.compile` of one layer's forward; its graph serves every layer and every cache slot."""
    return torch.compile(forward, **dict(options))


class InferenceMixin:
    """Speed at inference that a model switches on and off as a whole."""

    _decoder: StaticDecoder | None = None

    def optimize_for_inference(self, compile_layers: bool = False) -> Any:
        """Makes decoding (and on the CPU prefill) faster; outputs are the same within rounding.

        On the CPU the linear layers take oneDNN's packed layout where a quick measurement says that it pays (bfloat16
        and float32); weights carry no gradient meanwhile, and their memory is not doubled. On CUDA the steps of
        `generate` are captured in CUDA graphs over static buffers, one for each bucket of rows and of lengths.
        `state_dict()` and `save_pretrained` work as before. `model.train()`, `undo_inference_optimization()` and
        resizing the embeddings end it; moving or casting the model keeps it where it applies.

        Args:
            compile_layers: on CUDA, also compile one layer, whose graph serves all layer calls of the captured steps;
                the first step then takes some seconds longer.

        Returns:
            The model itself.
        """
        self.undo_inference_optimization()
        self.eval()
        if self.device.type == "cpu":
            if compile_layers:
                logger.warning_once("`compile_layers=True` is of use on CUDA only: packed weights cannot be compiled.")
                compile_layers = False
            if pack_model(self) == 0:
                logger.warning_once(
                    "`optimize_for_inference`: oneDNN's packed weights are missing here or not faster for this model; "
                    "it runs as it is."
                )
        elif self.device.type == "cuda":
            self._decoder = StaticDecoder()
        else:
            logger.warning_once(f"`optimize_for_inference` does nothing on {self.device.type!r}.")
        if compile_layers:
            self._set_compile_options(_DEFAULT_OPTIONS)
        return self

    def undo_inference_optimization(self) -> Any:
        """Reverses `optimize_for_inference`; returns the model itself."""
        unpack_model(self)
        self._release_decoder()
        self._set_compile_options(None)
        return self

    @property
    def is_optimized_for_inference(self) -> bool:
        """Whether weights are packed or decoding is captured."""
        return self._decoder is not None or any(isinstance(module, PackedLinear) for module in self.modules())

    def _release_decoder(self) -> None:
        if self._decoder is not None:
            self._decoder.release()
            self._decoder = None

    def _set_compile_options(self, options: tuple[tuple[str, Any], ...] | None) -> None:
        network = getattr(self, self.base_model_prefix, self)
        for stack in (network.L_module, network.H_module):
            stack.compile_options = options

    def train(self, mode: bool = True) -> Any:
        """As in torch; training ends the optimization for inference, since packed weights carry no gradient."""
        if mode and self.is_optimized_for_inference:
            logger.warning_once("`train()` undoes `optimize_for_inference()`, whose weights cannot be trained.")
            self.undo_inference_optimization()
        return super().train(mode)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; ends the optimization for inference."""
        self.undo_inference_optimization()
        return super().resize_token_embeddings(*args, **kwargs)

    def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        """What `generate` calls for a decoding step on a static cache: the model with one layer compiled.

        Unrolled, the loop is 128 layer calls for the 1B, which take minutes to compile; one layer takes seconds, and
        the same graph serves all of them. CUDA graphs of single layers would cost more than they save, so the mode
        "reduce-overhead" becomes the default one: `optimize_for_inference` captures whole steps.
        """
        if any(isinstance(module, PackedLinear) for module in self.modules()):
            logger.warning_once(
                "packed weights cannot be compiled: `generate` runs as `optimize_for_inference` left it."
            )
            return self.__call__
        options = compile_config.to_dict() if compile_config is not None else {}
        if options.get("mode") == "reduce-overhead":
            options["mode"] = None
        kept = ("backend", "dynamic", "fullgraph", "mode", "options")
        chosen = tuple((key, options[key]) for key in kept if options.get(key) is not None)
        # Under the name by which transformers tells that `generate` has compiled.
        self._compiled_call = functools.partial(self._call_with_compiled_layers, chosen)
        return self._compiled_call

    def _call_with_compiled_layers(self, options: tuple[tuple[str, Any], ...], *args: Any, **kwargs: Any) -> Any:
        network = getattr(self, self.base_model_prefix, self)
        before = network.L_module.compile_options
        self._set_compile_options(options)
        try:
            return self(*args, **kwargs)
        finally:
            self._set_compile_options(before)


__all__ = ["InferenceMixin", "compiled_layer"]
