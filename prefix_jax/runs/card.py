"""Makes the card of a trained prefix."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from prefix_jax import artifact
from prefix_jax.artifact import Card
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.config import DecodeConfig, InitConfig
from prefix_jax.model import PrefixModel
from prefix_jax.prefix import Produced
from prefix_jax.tasks import to_card
from prefix_jax.train.init import start_of


@dataclasses.dataclass(frozen=True)
class CardMaker:
    """Makes the cards of the prefixes that a run trains.

    Attributes:
        pretrained: the backbone.
        model: backbone, method and task.
        method: the `method` section of the config.
        init: the initial value of the prefix.
        dataset_field: in a mixture, the field of a record that names its dataset.
        decode: the default decoding options.
    """

    pretrained: Pretrained
    model: PrefixModel
    method: Mapping[str, Any]
    init: InitConfig
    dataset_field: str | None
    decode: DecodeConfig

    def __call__(self, produced: Produced, step: int, dataset: str = "") -> Card:
        """Makes the card of one prefix.

        Args:
            produced: the prefix, as its method produces it.
            step: the optimizer steps that it was trained for.
            dataset: in a mixture, the name of the one that this prefix belongs to.
        """
        assert self.model.method is not None
        pretrained, tokenizer = self.pretrained, self.pretrained.tokenizer
        method = dict(self.method)
        if dataset:
            method |= {"datasets": list(self.model.method.dataset_names), "dataset": dataset}
        field = self.dataset_field
        return artifact.make_card(
            produced,
            pretrained.backbone.geometry,
            pretrained.card,
            method=method,
            init=self._init(),
            steps=step,
            task=to_card(self.model.task),
            head=self.model.head,
            dataset=None if field is None else artifact.DatasetCard(field=field, name=dataset),
            decode=dataclasses.asdict(self.decode),
            tokenizer=artifact.TokenizerCard.of(type(tokenizer).__name__, tokenizer.get_vocab()),
        )

    def _init(self) -> str:
        """Describes the initial value: "text: Answer the question"."""
        assert self.model.method is not None
        init = self.init
        start = start_of(self.model.method, init)
        value = init.text or init.text_file or ", ".join(init.labels or ()) or init.path
        return f"{start}: {value}" if value else start
