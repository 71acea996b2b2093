"""Serves HRM-Text exactly on vLLM, through the entry point `vllm.general_plugins`.

vLLM reads a whole prompt as one bidirectional block. HRM-Text reads each prompt envelope as a block of its own and
everything else causally, and what a position sees may not depend on how the scheduler cut the work up. The parts:

- `blocks`: the blocks of a prompt, and what follows from them, in plain Python;
- `model`: vLLM's model with an attention backend that splits each request at its block borders;
- `embedding`: embeddings in 8 bits on processors, for which vLLM has a kernel for GPUs alone;
- `scheduler`: prefill chunks that end at block borders, and cache pages whose hash knows the blocks they hold;
- `worker`: tells the attention backend which requests a step holds;
- `chat`: chats are turned into token ids such that a message cannot write control tokens;
- `settings`: what is chosen by default, and every refusal.
"""

from __future__ import annotations

from .registration import register


__all__ = ["register"]
__version__ = "0.1.0"
