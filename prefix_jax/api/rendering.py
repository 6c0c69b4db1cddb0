"""Renders records as prompts for generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prefix_jax.artifact import TemplateCard
from prefix_jax.data.prepare import fields_needed, prepare
from prefix_jax.data.source import Record
from prefix_jax.data.template import Template, render_chat_prompt
from prefix_jax.errors import DataError, PrefixError
from prefix_jax.untrusted.tokenizer import token_ids

if TYPE_CHECKING:  # its import takes seconds
    from transformers import PreTrainedTokenizerFast

Prompt = str | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Rendering:
    """Renders prompts with the template of the training data.

    Attributes:
        template: the template from the card; None if it has no template.
        tokenizer: the backbone's tokenizer, with its chat template.
    """

    template: TemplateCard | None
    tokenizer: PreTrainedTokenizerFast

    @property
    def fields(self) -> tuple[str, ...] | None:
        """The record fields that a prompt needs; None if prompts must be text."""
        template = self.template
        if template is None or template.input is template.messages is None:
            return None
        if template.messages is not None:
            return (template.messages,)
        return fields_needed(Template(template.input or "").fields, template.prepare)

    def text(self, prompt: Prompt) -> str:
        """Renders a record as a prompt, and returns text unchanged.

        Raises:
            DataError: the record lacks a field of the template, or `prompt` is not a record.
            PrefixError: there is no input template.
        """
        if isinstance(prompt, str):
            return prompt
        if not isinstance(prompt, Mapping):
            raise DataError(f"a prompt must be a text or a record, got {prompt!r:.80}")
        return self.of_record(Record(prompt, "the record"))

    def of_record(self, record: Record) -> str:
        """Renders a `Record`, whose origin appears in errors; see `text`."""
        template = self.template
        if template is None:
            raise PrefixError(
                "this prefix has no template; give prompts as text, not as records, or import a "
                "PEFT adapter with data.input=…"
            )
        (record,) = prepare([record], template.prepare)
        if template.messages is not None:
            return render_chat_prompt(record, template.messages, self.tokenizer)
        if template.input is None:
            raise PrefixError("this prefix was trained without inputs; give the text to continue")
        texts = Template(template.input).render(record)
        if len(texts) > 1:
            raise DataError(
                f"{record.source}: the input is a list of {len(texts)} texts; give one text"
            )
        return texts[0]

    def encoded(self, prompt: Prompt) -> str | list[int]:
        """Returns the argument for `Generator.generate`: text, or token ids for a chat.

        The rendered text of a chat already contains its special tokens.
        """
        text = self.text(prompt)
        if isinstance(prompt, str) or self.template is None or self.template.messages is None:
            return text
        return token_ids(self.tokenizer, [text], "the record")[0]
