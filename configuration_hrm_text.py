"""Configuration of HRM-Text: reads every published dialect, writes the current one."""

from __future__ import annotations

import math
from typing import Any

from transformers.utils import logging

from .versions_hrm_text import PreTrainedConfig, tensor_parallel_plan


logger = logging.get_logger(__name__)

# Which auto class loads which of our classes: see `HrmTextConfig.architectures`.
_AUTO_CLASSES = {
    "HrmTextForCausalLM": "AutoModelForCausalLM",
    "HrmTextModel": "AutoModel",
    "HrmTextForSequenceClassification": "AutoModelForSequenceClassification",
    "HrmTextForTokenClassification": "AutoModelForTokenClassification",
}

# The warm-up of credit assignment ends here (the paper's `bp_max_steps`).
_DEFAULT_GRADIENT_STEPS = 5


def spell_gradient_steps(bp_steps: int, H_cycles: int, L_cycles: int) -> tuple[int, list[int]]:
    """Translates a number of gradient steps into module calls.

    Args:
        bp_steps: how many trailing module calls carry gradient, H calls first; clipped to the calls that exist.
        H_cycles: number of slow cycles.
        L_cycles: number of fast steps in a slow cycle.

    Returns:
        The number of trailing H calls with gradient, and for every H cycle the number of its trailing L calls with
        gradient.
    """
    bp_steps = max(2, min(bp_steps, H_cycles * (L_cycles + 1)))
    H_bp = min(H_cycles, bp_steps - 1)
    remaining = bp_steps - H_bp
    L_bp = [0] * H_cycles
    for h in reversed(range(H_cycles)):
        L_bp[h] = min(L_cycles, remaining)
        remaining -= L_bp[h]
    return H_bp, L_bp


class HrmTextConfig(PreTrainedConfig):
    r"""
    Configuration of an HRM-Text model; the defaults are HRM-Text-1B.

    Two dialects are read: the published one (`num_hidden_layers` counts cache slots and `num_layers_per_stack` layers)
    and the older one (a lone `num_hidden_layers`, `L_bp_steps`, flat `rope_theta`). The published one is written.

    Args:
        vocab_size (`int`, defaults to 65536): Number of tokens.
        hidden_size (`int`, defaults to 1536): Width of both stacks.
        intermediate_size (`int`, defaults to 4096): Width of the SwiGLU layers.
        num_hidden_layers (`int`, *optional*):
            Number of cache slots, `num_layers_per_stack * H_cycles * (L_cycles + 1)`. It follows from those three at
            any time. Given without `num_layers_per_stack`, it counts the layers of one stack.
        num_attention_heads (`int`, defaults to 12): Attention heads; there are no grouped queries.
        head_dim (`int`, *optional*): Width of a head; None means `hidden_size // num_attention_heads`.
        max_position_embeddings (`int`, defaults to 4096): Context length in training.
        initializer_range (`float`, defaults to `1 / sqrt(hidden_size of the 1B)`):
            Standard deviation of the initial weights.
        rms_norm_eps (`float`, defaults to 1e-6): Epsilon of the weightless RMSNorm.
        rope_parameters (`dict`, *optional*): `{"rope_theta": 10000.0, "rope_type": "default"}`; a flat `rope_theta`
            and `rope_scaling` are read too.
        H_cycles (`int`, defaults to 2): Slow cycles per forward pass.
        L_cycles (`int`, defaults to 3): Fast steps per slow cycle.
        L_bp_cycles (`list[int]`, *optional*):
            For each H cycle, how many of its trailing L calls carry gradient; every H call carries gradient. A shorter
            list is padded on the left with ones. None means the end of the paper's warm-up, 5 gradient steps.
        bp_steps (`int`, *optional*):
            Number of trailing module calls that carry gradient, H calls first. Needed only where `L_bp_cycles` cannot
            express it (`bp_steps - 1 < H_cycles`), and then it takes precedence.
        embedding_scale (`float`, *optional*): Factor on the embeddings; None means `1 / initializer_range`.
        prefix_lm (`bool`, defaults to `True`):
            Whether prefix blocks (`token_type_ids` of 1 and 2) are read in both directions.
        prefix_end_token_id (`int` or `list[int]`, *optional*):
            Where set, a call without `token_type_ids` finds the blocks itself: each span from what opens one up to and
            including the next of this token, or of these tokens in this order.
        prefix_start_token_ids (`list[int]`, *optional*):
            The tokens that open a block, in order; None means `[bos_token_id]`.
        num_layers_per_stack (`int`, *optional*): Layers of each stack.
        attention_dropout (`float`, defaults to 0.0): Dropout on attention weights in training.

    Raises:
        ValueError: a value is invalid; the message names it and the remedy. Checked at construction and again when a
            model is built.
    """

    model_type = "hrm_text"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    base_model_tp_plan = tensor_parallel_plan()

    def __init__(
        self,
        vocab_size: int = 65536,
        hidden_size: int = 1536,
        intermediate_size: int = 4096,
        num_hidden_layers: int | None = None,
        num_attention_heads: int = 12,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 4096,
        initializer_range: float = 1 / math.sqrt(1536),
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        rope_parameters: dict[str, Any] | None = None,
        H_cycles: int = 2,
        L_cycles: int = 3,
        L_bp_cycles: list[int] | None = None,
        bp_steps: int | None = None,
        embedding_scale: float | None = None,
        prefix_lm: bool = True,
        prefix_end_token_id: int | list[int] | None = None,
        prefix_start_token_ids: list[int] | None = None,
        num_layers_per_stack: int | None = None,
        attention_dropout: float = 0.0,
        tie_word_embeddings: bool = False,
        pad_token_id: int | None = 5,
        bos_token_id: int | None = 6,
        eos_token_id: int | list[int] | None = 11,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.head_dim = head_dim if head_dim is not None else hidden_size // max(num_attention_heads, 1)
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.attention_dropout = attention_dropout
        self.prefix_lm = prefix_lm
        self.prefix_end_token_id = prefix_end_token_id
        self.prefix_start_token_ids = prefix_start_token_ids
        self.bp_steps = bp_steps

        self.H_cycles = H_cycles
        self.L_cycles = L_cycles
        # The depth that the gradient steps, and a checkpoint that carries this config, were made for.
        self._made_for_cycles = (H_cycles, L_cycles)
        if num_layers_per_stack is None:
            num_layers_per_stack = 16 if num_hidden_layers is None else num_hidden_layers
            num_hidden_layers = None
        self.num_layers_per_stack = num_layers_per_stack
        self._stated_num_hidden_layers = num_hidden_layers
        self._stated_num_key_value_heads = kwargs.pop("num_key_value_heads", None)

        older_bp = kwargs.pop("L_bp_steps", None)
        L_bp_cycles = older_bp if L_bp_cycles is None else L_bp_cycles
        self._stated_L_bp_cycles = [L_bp_cycles] if isinstance(L_bp_cycles, int) else L_bp_cycles
        self._restated_L_bp_cycles = False

        self.attention_bias = kwargs.pop("attention_bias", None) or False
        self.mlp_bias = kwargs.pop("mlp_bias", None) or False

        scale_is_computable = embedding_scale is None and initializer_range and initializer_range > 0
        self.embedding_scale = 1.0 / initializer_range if scale_is_computable else embedding_scale

        rope = dict(rope_parameters or kwargs.pop("rope_scaling", None) or {})
        kwargs.pop("rope_scaling", None)
        rope_theta = kwargs.pop("rope_theta", None)
        rope.setdefault("rope_theta", 10000.0 if rope_theta is None else rope_theta)
        rope.setdefault("rope_type", rope.pop("type", "default"))
        self.rope_parameters = rope

        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        # Before the library's own checks, whose messages do not know our fields.
        self.validate_hrm_text()
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )

    # What follows from other fields ------------------------------------------------------------------------------

    @property
    def num_hidden_layers(self) -> int:
        """Number of cache slots, one for each attention call of a forward pass."""
        return self.num_layers_per_stack * self.H_cycles * (self.L_cycles + 1)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        # Overriding arguments arrive one by one and in any order, so a contradiction can only be seen at the end.
        self._stated_num_hidden_layers = value

    @property
    def architectures(self) -> list[str] | None:
        """Class names for tools that choose a class by them; `to_dict` writes only that of the model.

        Our classes have the names of transformers' own. A tool that looks the first name up in transformers (TRL, the
        server) would silently run the library's class, with other results. So an auto class, which runs remote code
        where it is trusted, comes first. Other tools (vLLM) take the first name that they know.
        """
        stated = self._stated_architectures
        return stated and [*(_AUTO_CLASSES[name] for name in stated if name in _AUTO_CLASSES), *stated]

    @architectures.setter
    def architectures(self, value: list[str] | None) -> None:
        automatic = set(_AUTO_CLASSES.values())
        self._stated_architectures = value and [name for name in value if name not in automatic]

    @property
    def num_key_value_heads(self) -> int:
        """Number of key and value heads, which is that of the queries."""
        return self.num_attention_heads

    @num_key_value_heads.setter
    def num_key_value_heads(self, value: int | None) -> None:
        self._stated_num_key_value_heads = value

    @property
    def prefix_start(self) -> list[int]:
        """The ids that open a block, in order."""
        return _token_list(self.bos_token_id if self.prefix_start_token_ids is None else self.prefix_start_token_ids)

    @property
    def prefix_end(self) -> list[int]:
        """The ids that close a block, in order; empty where blocks are not to be inferred."""
        return _token_list(self.prefix_end_token_id)

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies."""
        return self.rope_parameters["rope_theta"]

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters = {**self.rope_parameters, "rope_theta": value}

    @property
    def cycles_changed(self) -> bool:
        """Whether H_cycles or L_cycles are no longer those that the config was constructed with."""
        return (self.H_cycles, self.L_cycles) != tuple(self._made_for_cycles)

    @property
    def L_bp_cycles(self) -> list[int]:
        """For each H cycle, how many of its trailing L calls carry gradient; length H_cycles where it was derived."""
        stated = self._stated_L_bp_cycles
        if stated is None:
            return spell_gradient_steps(self._total_gradient_steps(), self.H_cycles, self.L_cycles)[1]
        if self.cycles_changed and not self._restated_L_bp_cycles:
            return spell_gradient_steps(self._total_gradient_steps(), self.H_cycles, self.L_cycles)[1]
        return list(stated)

    @L_bp_cycles.setter
    def L_bp_cycles(self, value: list[int] | None) -> None:
        self._stated_L_bp_cycles = value
        self._restated_L_bp_cycles = True

    def _total_gradient_steps(self) -> int:
        if self.bp_steps is not None:
            return self.bp_steps
        if self._stated_L_bp_cycles is None:
            return _DEFAULT_GRADIENT_STEPS
        H_cycles = self._made_for_cycles[0]
        padded = [1] * (H_cycles - len(self._stated_L_bp_cycles)) + list(self._stated_L_bp_cycles)
        return H_cycles + sum(padded)

    def gradient_calls(self, bp_steps: int | None = None) -> tuple[int, list[int]]:
        """Which module calls carry gradient.

        Args:
            bp_steps: number of gradient steps; None means what the config says.

        Returns:
            The number of trailing H calls, and for every H cycle the number of its trailing L calls.
        """
        if bp_steps is None:
            bp_steps = self.bp_steps
        if bp_steps is not None:
            return spell_gradient_steps(bp_steps, self.H_cycles, self.L_cycles)
        L_bp = self.L_bp_cycles
        return self.H_cycles, [1] * (self.H_cycles - len(L_bp)) + L_bp

    # Checks ------------------------------------------------------------------------------------------------------

    def validate_hrm_text(self) -> None:
        """Raises a ValueError for an invalid value. Runs at construction and when a model is built."""
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_layers_per_stack"):
            _require(
                _is_count(getattr(self, field)), f"`{field}` is {getattr(self, field)!r}: give a whole number >= 1."
            )
        for field in ("H_cycles", "L_cycles"):
            value = getattr(self, field)
            _require(
                _is_count(value), f"`{field}` is {value!r}: at least one cycle is needed, give a whole number >= 1."
            )
        _require(
            self.head_dim is not None and _is_count(self.head_dim) and self.head_dim % 2 == 0,
            f"`head_dim` is {self.head_dim!r}: rotary embeddings need an even width of at least 2. Change `head_dim`, "
            "or `hidden_size` and `num_attention_heads`, whose quotient it is by default.",
        )
        _require(
            self.hidden_size % self.num_attention_heads == 0
            or self.head_dim != self.hidden_size // self.num_attention_heads,
            f"`hidden_size` ({self.hidden_size}) is not a multiple of `num_attention_heads` "
            f"({self.num_attention_heads}): change one of them, or give `head_dim`.",
        )
        self._validate_depth()
        self._validate_gradient_steps()
        _require(
            self._stated_num_key_value_heads in (None, self.num_attention_heads),
            f"`num_key_value_heads` is {self._stated_num_key_value_heads!r} and `num_attention_heads` "
            f"{self.num_attention_heads}: HRM-Text has no grouped queries, leave it out or make them equal.",
        )
        _require(self.hidden_act == "silu", f"`hidden_act` is {self.hidden_act!r}: the MLP is SwiGLU, use 'silu'.")
        for field in ("attention_bias", "mlp_bias"):
            _require(not getattr(self, field), f"`{field}` is set, but no HRM-Text layer has a bias: remove it.")
        for field in ("initializer_range", "embedding_scale", "rms_norm_eps"):
            value = getattr(self, field)
            _require(
                isinstance(value, (int, float)) and math.isfinite(value) and value > 0,
                f"`{field}` is {value!r}: it must be a finite number above 0.",
            )
        _require(
            isinstance(self.rope_theta, (int, float)) and self.rope_theta > 0,
            f"`rope_theta` is {self.rope_theta!r}: it must be a number above 0.",
        )
        self._validate_token_ids()

    def _validate_depth(self) -> None:
        stated = self._stated_num_hidden_layers
        _require(
            stated is None or stated == self.num_hidden_layers,
            f"`num_hidden_layers` is {stated!r}, but num_layers_per_stack * H_cycles * (L_cycles + 1) is "
            f"{self.num_layers_per_stack} * {self.H_cycles} * ({self.L_cycles} + 1) = {self.num_hidden_layers}. It "
            "counts cache slots and follows from the others: leave it out, or change `num_layers_per_stack`.",
        )
        # From here on it follows; a later change of the cycles must not meet an old statement.
        self._stated_num_hidden_layers = None

    def _validate_gradient_steps(self) -> None:
        _require(
            self.bp_steps is None or (_is_count(self.bp_steps) and self.bp_steps >= 2),
            f"`bp_steps` is {self.bp_steps!r}: the last H and the last L call always carry gradient, give at least 2.",
        )
        _require(
            self.bp_steps is None or self.cycles_changed or self.bp_steps <= self.H_cycles * (self.L_cycles + 1),
            f"`bp_steps` is {self.bp_steps!r}, but there are only {self.H_cycles * (self.L_cycles + 1)} module calls.",
        )
        L_bp = self.L_bp_cycles
        _require(
            isinstance(L_bp, (list, tuple)) and all(isinstance(n, int) for n in L_bp),
            f"`L_bp_cycles` is {L_bp!r}: give a list of whole numbers, one for each H cycle.",
        )
        _require(
            len(L_bp) <= self.H_cycles,
            f"`L_bp_cycles` has {len(L_bp)} entries for {self.H_cycles} `H_cycles`: remove entries from the left.",
        )
        _require(
            all(0 <= n <= self.L_cycles for n in L_bp),
            f"`L_bp_cycles` is {L_bp!r}: every entry counts L calls of one cycle and lies in 0..{self.L_cycles} "
            "(`L_cycles`).",
        )

    def _validate_token_ids(self) -> None:
        eos = self.eos_token_id if isinstance(self.eos_token_id, (list, tuple)) else [self.eos_token_id]
        named = [("pad_token_id", self.pad_token_id), ("bos_token_id", self.bos_token_id)]
        named += [("eos_token_id", token) for token in eos]
        for field in ("prefix_start_token_ids", "prefix_end_token_id"):
            value = getattr(self, field)
            _require(
                value is None or isinstance(value, int) or (isinstance(value, (list, tuple)) and len(value) > 0),
                f"`{field}` is {value!r}: give the id, or a list of the ids in their order, or None.",
            )
            named += [(field, token) for token in _token_list(value)]
        for field, token in named:
            _require(
                token is None or (isinstance(token, int) and 0 <= token < self.vocab_size),
                f"`{field}` is {token!r}, outside the vocabulary of {self.vocab_size}: change it or `vocab_size`.",
            )
        _require(
            not self.prefix_end or bool(self.prefix_start),
            "`prefix_end_token_id` is set, and neither `bos_token_id` nor `prefix_start_token_ids`: set what opens a "
            "block, too.",
        )
        _require(
            not _can_overlap(self.prefix_start, self.prefix_end),
            f"`prefix_start_token_ids` {self.prefix_start} and `prefix_end_token_id` {self.prefix_end} share tokens "
            "in a way that one token could both open and close a block: make one of them shorter.",
        )

    # Writing -----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Returns the published dialect, with both `num_hidden_layers` and `num_layers_per_stack`."""
        output = super().to_dict()
        for private in (
            "_made_for_cycles",
            "_stated_num_hidden_layers",
            "_stated_num_key_value_heads",
            "_stated_L_bp_cycles",
            "_restated_L_bp_cycles",
            "_stated_architectures",
            "rope_scaling",
        ):
            output.pop(private, None)
        if self._stated_architectures is not None:
            output["architectures"] = list(self._stated_architectures)
        output["num_hidden_layers"] = self.num_hidden_layers
        if self.bp_steps is None:
            output.pop("bp_steps", None)
        else:
            output["bp_steps"] = min(self.bp_steps, self.H_cycles * (self.L_cycles + 1))
        if self.prefix_start_token_ids is None:
            output.pop("prefix_start_token_ids", None)
        output["L_bp_cycles"] = self.gradient_calls()[1]
        return output


def _token_list(ids: Any) -> list[int]:
    """A lone id is a sequence of one, None an empty one."""
    return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]


def _can_overlap(a: list[int], b: list[int]) -> bool:
    """Whether a place where `a` stands in a text can share tokens with one where `b` stands."""
    return any(
        all(b[i - shift] == token for i, token in enumerate(a) if 0 <= i - shift < len(b))
        for shift in range(1 - len(b), len(a))
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


__all__ = ["HrmTextConfig"]
