"""The bodies of requests, as OpenAI and vLLM define them.

Parameters that are neither here nor in `UNSUPPORTED` are ignored, as vLLM does. Those that would
change the answer and cannot be obeyed are refused, unless they ask for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planetserve.gateway.errors import RequestError

UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "functions": (),
    "function_call": ("none", "auto"),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "use_beam_search": (),
    "best_of": (1,),
    "suffix": ("",),
    "length_penalty": (1,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": (),
    "bad_words": (),
    "logits_processors": (),
    "documents": (),
    "chat_template": (),
    "thinking_token_budget": (),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "return_token_ids": (),
    "echo": (),
    "priority": (0,),
}
"""Parameters that are refused, and the values that ask for nothing, besides null, false and
empty ones."""

_MAX_SHOWN_CHARS = 200
_Unbounded = Annotated[float, Field(allow_inf_nan=False)]
_Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Ids = Annotated[list[int], Field(min_length=1)]
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]


def refuse_unsupported(
    given: Mapping[str, Any], unsupported: Mapping[str, tuple[object, ...]]
) -> None:
    """Refuse parameters that would be half obeyed.

    Raises:
        RequestError: one asks for what the gateway does not do.
    """
    for name, value in given.items():
        if name in unsupported and value and value not in unsupported[name]:
            raise RequestError(f"{name} is not supported; leave it out", name)


class StreamOptions(BaseModel):
    """What a stream contains besides the answer."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_chain: bool = False
    """Now and then a chunk without choices whose `chain` says which servers compute the text and
    where the time goes."""


class JsonSchemaFormat(BaseModel):
    """A schema with a name."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What an answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(BaseModel):
    """What an answer must be, as vLLM has it: exactly one of these."""

    model_config = ConfigDict(extra="forbid")

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    """Always so here."""


class SamplingRequest(BaseModel):
    """What chats and completions have in common. None takes the default."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1)
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1)
    min_p: _Share | None = None
    # Logits stay finite within these.
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, allow_inf_nan=False)
    presence_penalty: _Penalty | None = 0.0
    frequency_penalty: _Penalty | None = 0.0
    logit_bias: dict[str, _Unbounded] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=1024)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    skip_special_tokens: bool = True
    return_tokens_as_token_ids: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    def check_supported(self) -> None:
        """Refuse what would be half obeyed.

        Raises:
            RequestError: a parameter asks for what the gateway does not do.
        """
        refuse_unsupported(self.model_extra or {}, UNSUPPORTED)
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream=true", "stream_options")


class ContentPart(BaseModel):
    """One part of a message; only text is taken."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None


class CalledFunction(BaseModel):
    """What a call of a tool calls."""

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(BaseModel):
    """A call of a tool in a message of the assistant."""

    model_config = ConfigDict(extra="allow")

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(BaseModel):
    """A function that the model may ask for."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A tool; only functions are."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: Function


class ChosenFunction(BaseModel):
    """A function by its name."""

    name: str


class ChosenTool(BaseModel):
    """The tool that must be called."""

    type: Literal["function"] = "function"
    function: ChosenFunction


class ChatRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool = True
    tools: list[Tool] | None = Field(None, max_length=512)
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = True


def chat_request(fields: Mapping[str, Any]) -> ChatRequest:
    """A chat made of another API's request.

    Raises:
        RequestError: its fields are wrong; it is told of them by their names in a chat.
    """
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise invalid_request(error.errors()) from None


def invalid_request(errors: Sequence[Any]) -> RequestError:
    """What pydantic has found wrong, without the input itself: an error must not be larger than
    what caused it."""
    found = errors[0] if errors else {}
    place = [str(part) for part in found.get("loc", ()) if part != "body"][:4]
    message = str(found.get("msg", "the body is not valid"))[:_MAX_SHOWN_CHARS]
    param = ".".join(place)[:_MAX_SHOWN_CHARS] or None
    return RequestError(message if param is None else f"{param}: {message}", param)


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    prompt: str | _Ids | Annotated[list[str] | list[_Ids], Field(min_length=1)]
    max_tokens: int | None = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0)
    add_special_tokens: bool = True


class TokenizeRequest(BaseModel):
    """POST /tokenize: a prompt, or the messages of a chat."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = Field(None, max_length=512)
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


class TokenizeResponse(BaseModel):
    """The tokens of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(BaseModel):
    """The text of some tokens."""

    prompt: str


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorResponse(BaseModel):
    """The body of every answer that is none."""

    error: ErrorDetail
