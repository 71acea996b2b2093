"""`python -m training.sft --fsdp` on processors, for tests on machines without accelerators.

torch shards over processors as well, but accelerate keeps its FSDP for accelerators. Here every process tells it to be
one; sharding, training, checkpoints and saving are then the real ones, over gloo.
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from training.sft import parser, run


def main(arguments: list[str]) -> None:
    plain = PartialState.__init__

    def posing(self: PartialState, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = posing
    run(parser().parse_args(arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
