"""Workers that tell the model's attention layers which requests a step holds."""

from __future__ import annotations

from typing import Any


class BlockWork:
    """What is added to a worker of vLLM."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Loads the model, and makes its runner known to it."""
        super().load_model(*args, **kwargs)
        self._step_layout = self.model_runner.get_model().step_layout
        self._step_layout.runner = self.model_runner

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a step."""
        with self._step_layout.step():
            return super().execute_model(*args, **kwargs)


def __getattr__(name: str) -> type:
    # vLLM imports a worker by its name, and the modules of one device do not import on another.
    if name == "CpuBlockWorker":
        from vllm.v1.worker.cpu_worker import CPUWorker as Worker
    elif name == "GpuBlockWorker":
        from vllm.v1.worker.gpu_worker import Worker
    else:
        raise AttributeError(name)
    globals()[name] = type(name, (BlockWork, Worker), {"__doc__": "vLLM's worker, aware of blocks."})
    return globals()[name]
