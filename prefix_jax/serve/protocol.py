"""The fields of requests, as in OpenAI's API, with a few of vLLM's.

Fields that change the answer and are not supported are errors, also unknown ones. Fields that never
change it are accepted and ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from prefix_jax.engine.request import MAX_TOP_LOGPROBS

_Token = Annotated[int, Field(ge=0, lt=2**31)]
_Count = Annotated[int, Field(ge=1, le=128)]
_Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class StreamOptions(_Model):
    """Options of streams."""

    include_usage: bool = False


class JsonSchema(_Model):
    """A JSON schema that an answer must follow."""

    name: str = "schema"
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Model):
    """The format of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type json_schema, and must be given there")
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema; None for free text."""
        if self.type == "json_schema":
            assert self.json_schema is not None
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class Generate(_Model):
    """The fields that completions and chats share.

    None means the setting stored with the prefix, or else OpenAI's default.
    """

    model: str
    n: _Count = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: _Seed | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=2**20)] | None = None
    response_format: ResponseFormat | None = None

    # vLLM's, which OpenAI does not have.
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**20)] | None = None
    ignore_eos: bool = False

    # Accepted at their defaults only.
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    # Ignored.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("presence_penalty", "frequency_penalty", mode="before")
    @classmethod
    def _zero(cls, value: Any) -> Any:
        return 0 if value == 0 and not isinstance(value, bool) else value

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > 16 or any(not 0 < len(stop) <= 1000 for stop in stops):
            raise ValueError("give at most 16 texts of 1 to 1,000 characters")
        return value

    @model_validator(mode="after")
    def _streams(self) -> Generate:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options need stream")
        return self


class Completions(Generate):
    """A request to `/v1/completions`."""

    prompt: str | list[str] | list[_Token] | list[list[_Token]]
    best_of: _Count | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    suffix: Literal[""] | None = None

    @field_validator("prompt")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if isinstance(value, list) and not 0 < len(value):
            raise ValueError("give at least one prompt")
        return value

    @model_validator(mode="after")
    def _best(self) -> Completions:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of {self.best_of} is less than n {self.n}")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise ValueError("best_of above n cannot stream: the best are known at the end")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 needs echo")
        if self.echo and self.response_format is not None:
            raise ValueError("echo does not combine with response_format")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class TextPart(_Model):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Model):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: None = None
    refusal: None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class Chat(Generate):
    """A request to `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**20)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Chat:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs need logprobs")
        if self.max_tokens == 0:
            raise ValueError("max_tokens must be at least 1")
        if self.messages[-1].role == "assistant":
            raise ValueError("the last message must not be the assistant's")
        return self


class Tokenize(_Model):
    """A request to `/tokenize`: a prompt or a chat. Without a model, it is the backbone."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self) -> Tokenize:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either a prompt or messages")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("the chat template adds the special tokens of messages")
        return self


class Detokenize(_Model):
    """A request to `/detokenize`."""

    model: str | None = None
    tokens: list[_Token]


class LoadPrefix(_Model):
    """A request to load a prefix.

    Attributes:
        name: the model id.
        path: its directory, relative to the directory of prefixes; None for the name.
        replace: whether to replace a prefix that is loaded.
    """

    name: Annotated[str, Field(min_length=1, max_length=255)]
    path: str | None = None
    replace: bool = False
