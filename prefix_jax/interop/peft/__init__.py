"""Exact conversion of prefixes from and to Hugging Face PEFT (see `docs/from_peft.md`).

A PEFT adapter is a directory with two files: `adapter_config.json`, and
`adapter_model.safetensors` with the arrays of its method (`files`). `layout` converts the layout of
keys and values, `reading` imports adapters, and `writing` exports them.
"""

from __future__ import annotations

from prefix_jax.interop.peft.files import write
from prefix_jax.interop.peft.reading import ImportConfig, Imported, import_peft, tasks_of
from prefix_jax.interop.peft.writing import export_peft, to_peft

__all__ = ["ImportConfig", "Imported", "export_peft", "import_peft", "tasks_of", "to_peft", "write"]
