"""Prefixes in an unmodified vLLM: the export, and the plugin that runs inside vLLM."""

from __future__ import annotations

from prefix_jax.interop.vllm.export import export_vllm

__all__ = ["export_vllm"]
