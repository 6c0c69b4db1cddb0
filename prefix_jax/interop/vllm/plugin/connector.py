"""Writes a prefix's keys and values into the KV cache of a request.

vLLM has one connector object in its scheduler and one in every worker. A request names its prefix
in `kv_transfer_params`, its prompt begins with a placeholder for each slot, and its `cache_salt` is
the prefix's digest. The scheduler's half reports the slots as tokens that are computed elsewhere;
the worker's half writes them into the blocks that vLLM allocates for them.

A request that cannot be served ends with an error: its first block is reported as not loaded.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index

from .scheduling import Load, Scheduler
from .stored import PrefixError, Prefixes, Shape, StoredPrefix, placeholder_id

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = logging.getLogger(f"vllm.{__name__}")

# The default of `cache_bytes`: bytes of prefixes that a worker keeps in host memory.
_CACHE_BYTES = 1 << 30


@dataclasses.dataclass
class Loads(KVConnectorMetadata):
    """The slots that a worker loads before the next step."""

    loads: list[Load]


class PrefixConnector(KVConnectorBase_V1):
    """Loads stored prefixes. See the module's docstring."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _check_config(vllm_config, kv_cache_config)
        self._shape = Shape.of(vllm_config)
        if role == KVConnectorRole.SCHEDULER:
            prefixes = Prefixes.of(vllm_config)
            _log_prefixes(prefixes, self._shape)
            self._scheduler = Scheduler(
                prefixes,
                self._shape,
                placeholder_id(vllm_config.model_config.hf_config),
            )
        else:
            extra = vllm_config.kv_transfer_config.kv_connector_extra_config
            self._worker = _Worker(vllm_config, int(extra.get("cache_bytes", _CACHE_BYTES)))

    # The scheduler's half.

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Returns the number of slots that vLLM's own cache does not have."""
        return self._scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Notes the blocks to write."""
        if num_external_tokens:
            self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Hands the notes to the workers."""
        return Loads(self._scheduler.take())

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forgets a request; its blocks can be freed at once."""
        self._scheduler.finished(request)
        return False, None

    # The worker's half.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Finds the attention layers of this worker."""
        self._worker.register(list(kv_caches))

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Writes the slots of all new requests."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Loads)
        for load in metadata.loads:
            self._worker.load(load)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Returns blocks of requests that must end with an error."""
        failed, self._worker.failed = self._worker.failed, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Does nothing: loads are complete when `start_load_kv` returns."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Does nothing: prefixes are only read."""

    def wait_for_save(self) -> None:
        """Does nothing: prefixes are only read."""


class _Worker:
    """Writes slots into the cache of one worker's layers.

    Attributes:
        failed: blocks that could not be written.
    """

    def __init__(self, vllm_config: VllmConfig, cache_bytes: int) -> None:
        self._config, self._cache_bytes = vllm_config, cache_bytes
        self._layers: list[tuple[int, Any]] = []
        self._heads = slice(None)
        # Keys and values of this worker's heads by digest, least recently used first.
        self._cache: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        self.failed: set[int] = set()

    def register(self, names: list[str]) -> None:
        model, parallel = self._config.model_config, self._config.parallel_config
        context = self._config.compilation_config.static_forward_context
        self._layers = [(extract_layer_index(name), context[name]) for name in names]
        # With fewer heads than ranks, several ranks have the same head.
        heads, total = model.get_num_kv_heads(parallel), model.get_total_num_kv_heads()
        ranks = parallel.tensor_parallel_size
        first = get_tensor_model_parallel_rank() * total // ranks if ranks > 1 else 0
        self._heads = slice(first, first + heads)

    def load(self, load: Load) -> None:
        """Writes the slots of one request. On any failure, the request ends with an error."""
        size = self._config.cache_config.block_size
        try:
            if load.prefix is None:
                raise PrefixError("refused")
            k_LPKH, v_LPKH = self._read(load.prefix)
            layers = self._layers
            device = layers[0][1].kv_cache.device
            position_P = torch.arange(load.begin, load.end)
            blocks = torch.tensor(load.blocks)
            slot_P = (blocks[position_P // size] * size + position_P % size).to(device)
            span = slice(load.begin, load.end)
            for index, layer in layers:
                # The backend's own write: it knows the layout of its cache.
                layer.impl.do_kv_cache_update(
                    layer,
                    k_LPKH[index, span].to(device),
                    v_LPKH[index, span].to(device),
                    layer.kv_cache,
                    slot_P,
                )
        except Exception as error:
            if load.prefix is not None:
                logger.error("prefix %r cannot be loaded: %s", load.prefix.name, error)
            # Blocks before these are shared with other requests.
            self.failed.update(load.blocks[load.begin // size :])

    def _read(self, prefix: StoredPrefix) -> tuple[torch.Tensor, torch.Tensor]:
        if prefix.digest not in self._cache:
            dtype = self._config.model_config.dtype
            k_LPKH, v_LPKH = (
                torch.from_numpy(x)[:, :, self._heads].to(dtype).contiguous() for x in prefix.load()
            )
            self._cache[prefix.digest] = k_LPKH, v_LPKH
            while len(self._cache) > 1 and self._size() > self._cache_bytes:
                self._cache.popitem(last=False)
        self._cache.move_to_end(prefix.digest)
        return self._cache[prefix.digest]

    def _size(self) -> int:
        return sum(x.nbytes for pair in self._cache.values() for x in pair)


def _log_prefixes(prefixes: Prefixes, shape: Shape) -> None:
    usable, errors = prefixes.usable(shape)
    names = ", ".join(prefix.name for prefix in usable) or "none yet"
    logger.info("prefixes in %s: %s", prefixes.root, names)
    for error in errors:
        logger.warning("not served: %s", error)


def _check_config(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig | None) -> None:
    """Raises ValueError for settings under which prefixes would be computed wrongly."""
    transfer = vllm_config.kv_transfer_config
    if transfer.kv_load_failure_policy != "fail":
        raise ValueError("PrefixConnector requires kv_load_failure_policy 'fail'")
    if vllm_config.cache_config.cache_dtype != "auto":
        raise ValueError(
            "PrefixConnector requires --kv-cache-dtype auto, got "
            f"{vllm_config.cache_config.cache_dtype!r}"
        )
    if kv_cache_config is not None and len(kv_cache_config.kv_cache_groups) > 1:
        raise ValueError("PrefixConnector supports only models with one group of KV cache layers")
