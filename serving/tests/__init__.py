"""Tests that run vLLM: `make test-vllm`, in an environment of their own."""
