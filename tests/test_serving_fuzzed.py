"""Bodies that nobody would send: never a 500, never an answer without protection. `make fuzz-serving` takes 10,000 of each kind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from safegene.serving.door import Limits
from served import CHAT, FUZZED, NAME, Served, middle, serving

FUZZING = settings(
    max_examples=FUZZED, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)  # fmt: skip


@pytest.fixture(scope="module")
def served(tokenizer: Any) -> Iterator[Served]:
    with serving(tokenizer, middle(tokenizer), playground=True, limits=Limits(max_tokens=3)) as found:
        yield found
        assert found.post(CHAT).status_code == 200  # after all that it still answers


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[httpx.Client]:
    """One for all requests: a new one takes longer than an answer."""
    with httpx.Client(base_url=served.url, headers={"content-type": "application/json"}, timeout=60) as found:
        yield found


def ask(served: Served, client: httpx.Client, path: str, content: bytes) -> None:
    before = len(served.tickets)
    answer = client.post(path, content=content)
    event(f"status {answer.status_code}")
    assert answer.status_code in (200, 400, 404), (content, answer.text)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.text.endswith("data: [DONE]\n\n")
        assert '"error"' not in answer.text
    else:
        assert answer.json()["choices"]
    assert served.engine.armed
    assert path == "/playground/compare" or all(t.protected for t in served.tickets[before:])


# Fields that OpenAI's API has, and others


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "developer"]), "content": ANY_TEXT},
    optional={"name": JSON, "tool_calls": st.just([])},
)
FIELDS: dict[str, Any] = {
    "max_tokens": st.integers(1, 3) | JSON,
    "temperature": st.floats(0, 2) | JSON,
    "top_p": st.floats(0, 1) | JSON,
    "seed": st.integers() | JSON,
    "stop": st.lists(ANY_TEXT, max_size=3) | JSON,
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}) | JSON,
    "logprobs": st.booleans() | st.integers(0, 5) | JSON,
    "top_logprobs": st.integers(0, 20) | JSON,
    "n": st.just(1) | JSON,
    "logit_bias": JSON,
    "tools": JSON,
    "continue_final_message": st.booleans(),
    "add_generation_prompt": st.booleans(),
    "protected": st.just(False),
    "safegene": JSON,
}


@given(
    body=st.fixed_dictionaries(
        {"model": st.just(NAME) | JSON}, optional={"messages": st.lists(TURN, max_size=3) | JSON, **FIELDS}
    ),
    prompt=st.none() | ANY_TEXT | st.lists(st.integers(-2, 310), max_size=12) | JSON,
)
@FUZZING
def test_no_body_brings_it_down(served: Served, client: httpx.Client, body: dict[str, Any], prompt: Any) -> None:
    path = "/v1/chat/completions" if prompt is None else "/v1/completions"
    body = {"max_tokens": 2, **body} if prompt is None else {"max_tokens": 2, **body, "prompt": prompt}
    ask(served, client, path, json.dumps(body).encode())


# What the server's own schema describes, spoilt


def instances(schema: dict[str, Any], whole: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a JSON schema of FastAPI's describes. `whole`: the document that its references point into."""
    if "$ref" in schema:
        return instances(whole["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]], whole)
    if "anyOf" in schema:
        return st.one_of(*(instances(one, whole) for one in schema["anyOf"]))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    low, high = schema.get("minimum"), schema.get("maximum")
    kinds: dict[str | None, Any] = {
        "null": st.none,
        "boolean": st.booleans,
        "integer": lambda: st.integers(low, schema["exclusiveMaximum"] - 1 if "exclusiveMaximum" in schema else high),
        "number": lambda: st.floats(low, high),
        "string": lambda: ANY_TEXT,
        "array": lambda: st.lists(instances(schema["items"], whole), min_size=schema.get("minItems", 0), max_size=3),
        "object": lambda: described(schema, whole),
        None: lambda: JSON,
    }
    found: st.SearchStrategy[Any] = kinds[schema.get("type")]()
    return found


def described(schema: dict[str, Any], whole: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    fields = {name: instances(field, whole) for name, field in schema["properties"].items()}
    needed = schema.get("required", ())
    return st.fixed_dictionaries(
        {name: fields[name] for name in needed}, optional={name: field for name, field in fields.items() if name not in needed}
    )  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container inside a JSON value, with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def spoilt(data: st.DataObject, body: dict[str, Any]) -> bytes:
    """The body as bytes, with something put in another's place, left out, added, cut off or overwritten; or as it is."""
    spoils = data.draw(st.sampled_from(["nothing", "replaced", "missing", "added", "cut", "overwritten"]))
    if spoils == "added":
        body[data.draw(ANY_TEXT)] = data.draw(JSON)
    elif spoils in ("replaced", "missing"):
        holder, key = data.draw(st.sampled_from(list(places(body))))
        if spoils == "replaced":
            holder[key] = data.draw(JSON)
        else:
            del holder[key]
    content = json.dumps(body).encode()
    if spoils in ("cut", "overwritten"):
        at = data.draw(st.integers(0, len(content) - 1))
        more = content[at + 1 :] if spoils == "overwritten" else b""
        content = content[:at] + data.draw(st.binary(max_size=2)) + more
    return content


@given(data=st.data())
@FUZZING
def test_no_malformed_body_brings_it_down(served: Served, client: httpx.Client, data: st.DataObject) -> None:
    whole = served.app.openapi()
    posts = {path: routes["post"] for path, routes in whole["paths"].items() if "post" in routes}
    assert {"/v1/chat/completions", "/v1/completions", "/playground/compare"} <= set(posts)
    path = data.draw(st.sampled_from(sorted(posts)))
    schema = posts[path]["requestBody"]["content"]["application/json"]["schema"]
    usual = data.draw(st.sampled_from([{}, {"model": NAME}, {"model": NAME, "max_tokens": 2}]))
    ask(served, client, path, spoilt(data, {**data.draw(instances(schema, whole)), **usual}))
