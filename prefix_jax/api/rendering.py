"""How a record becomes the text that stands before what is generated."""

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
    """The template of the training data at work.

    Attributes:
        template: of the card; None where none is known.
        tokenizer: of the backbone, with its template for chats.
    """

    template: TemplateCard | None
    tokenizer: PreTrainedTokenizerFast

    @property
    def fields(self) -> tuple[str, ...] | None:
        """The fields that a prompt is made of; None where only text will do."""
        template = self.template
        if template is None or template.input is template.messages is None:
            return None
        if template.messages is not None:
            return (template.messages,)
        return fields_needed(Template(template.input or "").fields, template.prepare)

    def text(self, prompt: Prompt) -> str:
        """The prompt of a record; text is one already.

        Raises:
            DataError: the template needs a field that the record lacks; or it is no record.
            PrefixError: there is no template for inputs.
        """
        if isinstance(prompt, str):
            return prompt
        if not isinstance(prompt, Mapping):
            raise DataError(f"a prompt is a text or a record, not {prompt!r:.80}")
        return self.of_record(Record(prompt, "the record"))

    def of_record(self, record: Record) -> str:
        """As `text`, of a record that knows where it came from."""
        template = self.template
        if template is None:
            raise PrefixError(
                "this prefix has no template: give prompts as text, not as records; an adapter of "
                "PEFT is imported with data.input=…"
            )
        (record,) = prepare([record], template.prepare)
        if template.messages is not None:
            return render_chat_prompt(record, template.messages, self.tokenizer)
        if template.input is None:
            raise PrefixError("this prefix was trained without inputs: give the text to continue")
        texts = Template(template.input).render(record)
        if len(texts) > 1:
            raise DataError(f"{record.source}: the input holds a list of {len(texts)} texts")
        return texts[0]

    def encoded(self, prompt: Prompt) -> str | list[int]:
        """What `Generator.generate` takes: a chat's text holds its special tokens already."""
        text = self.text(prompt)
        if isinstance(prompt, str) or self.template is None or self.template.messages is None:
            return text
        return token_ids(self.tokenizer, [text], "the record")[0]
