"""The model card of a converted folder: how to use it, where it came from, and the SHA-256 of its files."""

import re
from typing import Any


def model_card(
    config: dict[str, Any],
    prompts: str,
    provenance: dict[str, str],
    parameters: int,
    digests: dict[str, str],
    remote_code: bool,
    quantization: list[str],
) -> str:
    """README.md of a converted folder. The same conversion gives the same card.

    Args:
        config: the written config.
        prompts: how prompts are read, in one line.
        provenance: what the source is, which weights of it, and the dtype.
        parameters: elements in all tensors.
        digests: SHA-256 by file name.
        remote_code: whether the folder carries this project's modules.
        quantization: what was done to the weights and how well that went, a line an item; empty where nothing was.
    """
    trust = ", trust_remote_code=True" if remote_code else ""
    origin = "".join(f"| {key} | {_cell(value)} |\n" for key, value in provenance.items())
    files = "".join(f"| {name} | `{digest}` |\n" for name, digest in sorted(digests.items()))
    note = (
        "The modules of the model lie in this folder, which is why `trust_remote_code=True` is needed."
        if remote_code
        else "This folder has the layout of transformers' own `hrm_text` class (transformers 5.9 or later)."
    )
    quantized = ""
    if quantization:
        lines = "\n".join(f"- {_cell(line)}" for line in quantization)
        quantized = f"## Quantization\n\n{lines}\n\nLoading needs `pip install compressed-tensors`.\n\n"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- hrm_text
- prefix-lm
---

# HRM-Text converted from {_cell(provenance["source"])}

An HRM-Text: a decoder of two recurrent Transformer stacks, H and L, of {config["num_layers_per_stack"]} layers each,
iterated H_cycles {config["H_cycles"]} x L_cycles {config["L_cycles"]} times. {parameters:,} parameters, hidden size
{config["hidden_size"]}, vocabulary {config["vocab_size"]:,}, context {config["max_position_embeddings"]:,}.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER_OR_HUB_ID{trust}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(FOLDER_OR_HUB_ID{trust})
```

{note}

Prompts are {_cell(prompts)}. A response ends with token {config["eos_token_id"]}.

{quantized}## Provenance

| | |
| --- | --- |
{origin}
SHA-256 of the files beside this one:

| file | SHA-256 |
| --- | --- |
{files}"""


def _cell(text: str) -> str:
    """Text from a checkpoint or its folder name, escaped for Markdown."""
    return re.sub(r"[^\w .,:;@/()+=%-]", "_", text)[:300]
