"""The bodies of OpenAI's API that are understood, and its errors. What is sent back: `replies`.

Unknown fields are ignored. A field that would change the answer and that the engine cannot honour is refused by its name: an
answer that silently is another one than was asked for helps nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

MAX_STOPS, MAX_STOP_LENGTH = 16, 256
TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error as OpenAI's API tells it: HTTP status, one line, the parameter at fault, a code."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = ErrorBody(message=message, type=kind, param=param, code=code)

    def response(self) -> JSONResponse:
        return JSONResponse({"error": self.body.model_dump()}, self.status, self.headers)


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorLine(BaseModel):
    """An error inside a stream."""

    error: ErrorBody


def field_name(loc: Sequence[int | str]) -> str:
    """Where pydantic found a fault, as OpenAI writes it: ("messages", 0, "role") → "messages[0].role"."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc[:4]).lstrip(".")


def _encodable(text: str) -> str:
    # JSON may hold half of a surrogate pair, which no tokenizer takes and no answer can carry.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("text", "is not valid Unicode; send whole characters") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]


# A temperature of 1e-45 overflows, and a top_p of 1e-309 is 0 in float32: no token would be left to draw, of the neighbours in the
# batch neither. What is nearly greedy is greedy.
Temperature = Annotated[
    float, Field(ge=0, le=2, allow_inf_nan=False), AfterValidator(lambda value: value if value >= 0.01 else 0.0)
]
TopP = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), AfterValidator(lambda value: max(value, 1e-6))]


def _joined(content: Any) -> Any:
    """A list of text parts → one text."""
    if not isinstance(content, list):
        return content
    texts = [
        p["text"] for p in content if isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str)
    ]
    if not texts or len(texts) < len(content):
        raise PydanticCustomError("parts", "holds parts other than text; this model reads text only")
    return "\n".join(texts)


def _stops(value: Any) -> Any:
    found = [] if value is None else [value] if isinstance(value, str) else value
    if (
        not isinstance(found, list)
        or len(found) > MAX_STOPS
        or any(not isinstance(s, str) or not 0 < len(s) <= MAX_STOP_LENGTH for s in found)
    ):
        raise PydanticCustomError("stop", f"give one string or at most {MAX_STOPS}, each of 1 to {MAX_STOP_LENGTH} characters")  # fmt: skip
    return tuple(found)


def _one_prompt(value: Any) -> Any:
    """A list of one prompt → the prompt."""
    return value[0] if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], int) else value


def _whole_or_ids(value: Any) -> Any:
    if isinstance(value, str):
        return _encodable(value)
    if not isinstance(value, list) or any(type(i) is not int or i < 0 for i in value):
        raise PydanticCustomError("prompt", "give a string, a list of one string, or a list of token ids")
    return value


def only(*harmless: Any) -> AfterValidator:
    """Refuses every other value than None and `harmless` ones."""

    def check(value: Any) -> Any:
        if value is not None and value not in harmless:
            raise PydanticCustomError("unsupported", "is not supported here; leave it out")
        return value

    return AfterValidator(check)


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class Message(Body):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_joined)]
    tool_calls: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only()] = None


class StreamOptions(Body):
    include_usage: bool | None = None


class Asked(Body):
    """What chat and completions have in common. Temperature and top_p are 1 where they are not given, as OpenAI's are."""

    model: Text
    temperature: Temperature | None = None
    top_p: TopP | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=2**31)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Annotated[Any, only(1)] = None
    logit_bias: Annotated[Any, only({})] = None
    presence_penalty: Annotated[Any, only(0)] = None
    frequency_penalty: Annotated[Any, only(0)] = None
    repetition_penalty: Annotated[Any, only(1)] = None
    top_k: Annotated[Any, only(0, -1)] = None
    min_p: Annotated[Any, only(0)] = None

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(Asked):
    """POST /v1/chat/completions. `continue_final_message`: the last message is an answer that has begun (as in vLLM)."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    tools: Annotated[Any, only([])] = None
    tool_choice: Annotated[Any, only("none", "auto")] = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    response_format: Annotated[Any, only({"type": "text"})] = None
    modalities: Annotated[Any, only(["text"])] = None
    audio: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None
    chat_template: Annotated[Any, only()] = None

    @field_validator("top_logprobs")
    @classmethod
    def _of_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise PydanticCustomError("top_logprobs", "needs logprobs: true")
        return value

    @field_validator("continue_final_message")
    @classmethod
    def _of_an_answer(cls, value: bool, info: ValidationInfo) -> bool:
        messages = info.data.get("messages")
        if value and messages and messages[-1].role != "assistant":
            raise PydanticCustomError("continue", "needs a last message with the role assistant")
        return value


class CompletionRequest(Asked):
    """POST /v1/completions. OpenAI's default of `max_tokens` is 16."""

    prompt: Annotated[Any, BeforeValidator(_one_prompt), AfterValidator(_whole_or_ids)]
    max_tokens: int | None = Field(default=16, ge=1, le=2**31)
    logprobs: int | None = Field(default=None, ge=0, le=5)

    best_of: Annotated[Any, only(1)] = None
    echo: Annotated[Any, only(False)] = None
    suffix: Annotated[Any, only("")] = None


class CompareRequest(Body):
    """POST /playground/compare."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    temperature: Temperature = 0.0
    max_tokens: int = Field(default=128, ge=1, le=2**31)
