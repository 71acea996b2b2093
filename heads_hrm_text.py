"""Classification heads: with the whole text as one prefix block, HRM-Text is a bidirectional encoder.

Both load a causal checkpoint; their head `score` starts new and wants training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast, TokenClassifierOutput

# An entry module names every module that it reaches: transformers before 5.10 copies no others from a folder.
from .attention_hrm_text import AttentionPlan  # noqa: F401
from .blocks_hrm_text import find_blocks  # noqa: F401
from .cache_hrm_text import HrmTextCache  # noqa: F401
from .configuration_hrm_text import HrmTextConfig
from .decoding_hrm_text import StaticDecoder  # noqa: F401
from .flash_hrm_text import FlashPlan  # noqa: F401
from .generation_hrm_text import HrmTextGenerationMixin  # noqa: F401
from .inference_hrm_text import InferenceMixin  # noqa: F401
from .layout_hrm_text import TokenLayout  # noqa: F401
from .loading_hrm_text import LoadingMixin  # noqa: F401
from .modeling_hrm_text import HrmTextModel, HrmTextPreTrainedModel
from .one_row_hrm_text import project  # noqa: F401
from .operations_hrm_text import norm  # noqa: F401
from .packed_hrm_text import PackedLinear  # noqa: F401
from .single_query_hrm_text import single_query_attention  # noqa: F401
from .timing_hrm_text import least_seconds  # noqa: F401
from .versions_hrm_text import CACHE_NAME, one_cache


class _ReadsWholeText:
    """For a generic head over `HrmTextModel`: its input is one prefix block, unless `token_type_ids` say otherwise."""

    def __init__(self, config: HrmTextConfig):
        # Past the generic head's own, which builds the base model through AutoModel: that does not know remote code.
        HrmTextPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = HrmTextModel(config)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | TokenClassifierOutput:
        """
        Args:
            token_type_ids: [batch, tokens]; None makes the text one block, so that every token sees every other. All
                zeros is plain causal. With `config.prefix_lm=False` everything is causal.
            labels: [batch] or [batch, num_labels] for a sequence, by `config.problem_type`; [batch, tokens], with -100
                where there is none, for tokens.
            use_cache: an encoder reads its text once, so no cache is kept by default.

        The other arguments are those of `HrmTextModel.forward`. Padded rows of a batch need `config.pad_token_id`, by
        which the sequence head finds the last token of each.
        """
        decides_itself = attention_mask is not None and attention_mask.dim() == 4
        if token_type_ids is None and self.config.prefix_lm and not decides_itself:
            text = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
            token_type_ids = torch.ones_like(text, dtype=torch.long)
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **{CACHE_NAME: one_cache(past_key_values, cache)},
            **kwargs,
        )


class HrmTextForSequenceClassification(_ReadsWholeText, GenericForSequenceClassification, HrmTextPreTrainedModel):
    """One label for a text, read off its last token: logits [batch, num_labels]."""

    def __init__(self, config: HrmTextConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class HrmTextForTokenClassification(_ReadsWholeText, GenericForTokenClassification, HrmTextPreTrainedModel):
    """One label for each token: logits [batch, tokens, num_labels]; dropout `config.classifier_dropout`, else 0.1."""

    def __init__(self, config: HrmTextConfig):
        super().__init__(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()


__all__ = ["HrmTextForSequenceClassification", "HrmTextForTokenClassification"]
