"""The OpenAI-compatible server around an engine: routes and errors.

Every answer is a protected ticket. The one place that makes another is `playground`, whose route exists only where the server was
started with it; no field of a request reaches that far.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from safegene.serving import playground as comparison
from safegene.serving.audit import Audit
from safegene.serving.door import REQUEST_ID, Door, Limits, route_of
from safegene.serving.engine import Engine
from safegene.serving.protocol import ApiError, ChatRequest, CompareRequest, CompletionRequest, field_name
from safegene.serving.replies import ChatForm, CompletionForm, Head, Model, ModelList
from safegene.serving.service import Service

PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LINKS = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>SafeGene</title><link rel="icon" href="data:,"><h1>SafeGene</h1><p>An OpenAI-compatible server; its answers pass through a safety adapter.
<ul><li><a href="/health">/health</a>: what is armed<li><a href="/metrics">/metrics</a><li><a href="/openapi.json">/openapi.json</a>
<li>/v1/models, /v1/chat/completions, /v1/completions</ul></html>
"""


def create_app(
    engine: Engine, *, model_name: str, adapter_digest: str, limits: Limits, api_key: str = "", audit: Audit | None = None,
    playground: bool = False, proof: dict[str, Any],
) -> FastAPI:  # fmt: skip
    """The server around an engine that has been started.

    Args:
        model_name: what clients call the model.
        api_key: "" asks for none.
        playground: whether `/` shows the page that also gives unadapted answers.
        proof: what `armed.prove` returned.
    """
    service = Service(engine, model_name=model_name, adapter_digest=adapter_digest, limits=limits, audit=audit)
    served = Model(id=model_name, created=int(time.time()))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for answer in list(service.live):
            answer.cancel()
        await asyncio.to_thread(engine.stop)
        if audit is not None:
            audit.close()

    # No documentation pages: FastAPI's load their scripts from elsewhere.
    app = FastAPI(title="SafeGene", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    app.state.service = service
    app.add_middleware(
        Door, limits=limits, api_key=api_key, passed=lambda it: service.metrics.requests.labels(route_of(it.path), it.status).inc()
    )  # fmt: skip
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)

    def check_model(name: str) -> None:
        if name != model_name:
            raise ApiError(404, "There is no such model here; GET /v1/models names what is served.", param="model", code="model_not_found")  # fmt: skip

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        check_model(body.model)
        ids = await service.chat_ids(body.messages, begin=body.add_generation_prompt, go_on=body.continue_final_message)
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        sampling = service.sampling(body, len(ids), asked, body.top_logprobs or 0, "messages")
        answer = await service.begin(request, ids, sampling)
        head = Head.of(f"chatcmpl-{request.scope[REQUEST_ID]}", model_name, adapter_digest)
        return await service.reply(request, answer, ChatForm(head, service.eos, bool(body.logprobs)), body)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        check_model(body.model)
        ids = await service.prompt_ids(body.prompt)
        sampling = service.sampling(body, len(ids), body.max_tokens, body.logprobs or 0, "prompt")
        answer = await service.begin(request, ids, sampling)
        head = Head.of(f"cmpl-{request.scope[REQUEST_ID]}", model_name, adapter_digest)
        return await service.reply(request, answer, CompletionForm(head, service.eos, body.logprobs), body)

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[served])

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Model:
        check_model(model_id)
        return served

    @app.get("/health")
    async def health() -> Response:
        unwritten = audit.failure if audit is not None else ""
        armed = engine.armed
        body = {
            "armed": armed, "failure": engine.failure, "model": model_name, "adapter": {"sha256": adapter_digest, **engine.handle.status()},
            "proof": proof, "audit": "off" if audit is None else unwritten or "written", "playground": playground,
        }  # fmt: skip
        return JSONResponse(finite(body), 200 if armed and not unwritten else 503)

    @app.get("/live")
    async def live() -> Response:
        return JSONResponse({"alive": True})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    page = resources.files("safegene.serving").joinpath("playground.html").read_text("utf-8") if playground else LINKS

    @app.get("/")
    async def home() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"})

    if playground:

        @app.post("/playground/compare")
        async def compare(body: CompareRequest, request: Request) -> Response:
            return await comparison.compare(service, request, body)

    return app


def finite(value: Any) -> Any:
    """`value` as JSON can hold it: numbers that are none become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


async def tell_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def tell_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        400: "The body is not JSON in UTF-8; send a JSON object.",
        404: "There is no such path; GET / names them.",
        405: "This path does not take that method; GET /openapi.json tells which.",
    }
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers).response()


async def tell_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()[0]
    where = field_name([part for part in found["loc"] if part != "body"])
    if found["type"] == "json_invalid" or not where:
        message = "The body is no JSON object; send one, with the content type application/json."
        return ApiError(400, message).response()
    return ApiError(400, f"{where}: {found['msg']}.", param=where).response()


async def tell_unexpected(request: Request, error: Exception) -> Response:
    message = f"Internal error ({type(error).__name__}), request {request.scope.get(REQUEST_ID)}; see the server's log."
    return ApiError(500, message).response()


HANDLERS: dict[type[Exception], Callable[[Request, Exception], Any]] = {
    ApiError: tell_api_error,
    HTTPException: tell_http_error,
    RequestValidationError: tell_invalid,
    Exception: tell_unexpected,
}
