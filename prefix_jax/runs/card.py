"""Makes the card of a trained prefix."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from prefix_jax import artifact
from prefix_jax.artifact import Card
from prefix_jax.backbones.loading.pretrained import Pretrained
from prefix_jax.config import DataConfig, DecodeConfig, InitConfig, TaskConfig
from prefix_jax.model import PrefixModel
from prefix_jax.prefix import Produced
from prefix_jax.train.init import start_of


@dataclasses.dataclass(frozen=True)
class CardMaker:
    """Makes the cards of the prefixes that a run trains.

    Attributes:
        pretrained: the backbone.
        model: backbone, method and head.
        task: what the model is asked to do, with its labels.
        method: the `method` section of the config.
        init: the initial value of the prefix.
        data: the templates of the training data.
        decode: the default decoding options.
    """

    pretrained: Pretrained
    model: PrefixModel
    task: TaskConfig
    method: Mapping[str, Any]
    init: InitConfig
    data: DataConfig
    decode: DecodeConfig

    def __call__(
        self, produced: Produced, step: int, head: Mapping[str, Any] | None, dataset: str = ""
    ) -> Card:
        """Makes the card of one prefix.

        Args:
            produced: the prefix, as its method produces it.
            step: the optimizer steps that it was trained for.
            head: the weights of the head; None if the task generates text.
            dataset: in a multitask run, the one that this prefix belongs to.
        """
        assert self.model.method is not None
        pretrained, tokenizer = self.pretrained, self.pretrained.tokenizer
        method = dict(self.method)
        if dataset:
            method |= {"tasks": list(self.model.method.task_names), "task": dataset}
        fields = dataclasses.fields(artifact.TemplateCard)
        return artifact.make_card(
            produced,
            pretrained.backbone.geometry,
            artifact.BackboneCard(
                source=pretrained.source,
                model_type=pretrained.backbone.arch.model_type,
                fingerprint=pretrained.fingerprint,
                dtype=str(pretrained.params["embed"]["tokens_VD"].dtype),
                quantize=pretrained.quantize,
            ),
            method=method,
            init=self._init(),
            steps=step,
            template=artifact.TemplateCard(**{f.name: getattr(self.data, f.name) for f in fields}),
            decode=dataclasses.asdict(self.decode),
            task=None
            if self.model.head is None or head is None
            else artifact.TaskCard(
                config=dataclasses.asdict(self.task),
                head=dataclasses.asdict(self.model.head),
                shapes={name: x.shape for name, x in head.items()},
            ),
            tokenizer=artifact.TokenizerCard.of(type(tokenizer).__name__, tokenizer.get_vocab()),
        )

    def _init(self) -> str:
        """Describes the initial value: "text: Answer the question"."""
        assert self.model.method is not None
        init = self.init
        start = start_of(self.model.method, init)
        value = init.text or init.text_file or ", ".join(init.labels or ()) or init.path
        return f"{start}: {value}" if value else start
