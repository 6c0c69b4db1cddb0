"""Prefixes from and to Hugging Face PEFT, exactly: `docs/from_peft.md` says what is what.

An adapter of PEFT is a directory of two files: `adapter_config.json`, and
`adapter_model.safetensors` with what its method produces (`files`). `layout` says where keys and
values lie in it, `reading` makes our prefix of it, `writing` makes it of our prefix.
"""

from __future__ import annotations

from prefix_jax.interop.peft.files import write
from prefix_jax.interop.peft.reading import ImportConfig, Imported, import_peft, tasks_of
from prefix_jax.interop.peft.writing import export_peft, to_peft

__all__ = ["ImportConfig", "Imported", "export_peft", "import_peft", "tasks_of", "to_peft", "write"]
