"""ASGI middleware around vLLM's server (its `--middleware`): it does not listen before the adapter is proved, `/health` says what is
armed, and everything else goes through the door that the other engine has, too: key, limits, audit log.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, Gauge
from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safegene.errors import SafegeneError
from safegene.serving.audit import Audit, RequestRecord
from safegene.serving.door import OPEN, REQUEST_ID, Door, Limits, Passage
from safegene.serving.metrics import counted_requests
from safegene.serving.protocol import ApiError
from safegene.serving.vllm import arming
from safegene.serving.vllm.deadline import Deadline
from safegene.serving.vllm.plugin import AUDIT, MAX_BODY, TIMEOUT
from safegene.serving.vllm.proof import prove

SECONDS = 600.0
"""The longest that an answer may take, waiting included, where TIMEOUT says nothing else."""

READY = "safegene: armed"
"""How the line on stderr begins that says so."""


class Health:
    """The middleware. vLLM makes one for its application."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.armed: dict[str, Any] = {}
        self.failure = "The adapter has not proved itself."
        self.audit = Audit(Path(os.environ[AUDIT])) if os.environ.get(AUDIT) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, lambda message: self._started(scope, message, send))
        elif scope["type"] == "http" and scope["path"] == "/live":
            await JSONResponse({"alive": True})(scope, receive, send)
        elif not self.armed:  # a server without a lifespan would come here
            await JSONResponse({"armed": False, "failure": self.failure}, 503)(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] == "/health":
            status = await self._status(scope, receive)
            unwritten = self.audit.failure if self.audit is not None else ""
            body = {
                "armed": status == 200, "failure": "" if status == 200 else "The engine has stopped.", **self.armed,
                "audit": "off" if self.audit is None else unwritten or "written",
            }  # fmt: skip
            await JSONResponse(body, 503 if unwritten else status)(scope, receive, send)
        elif scope["type"] == "http":
            await self.door(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _started(self, scope: Scope, message: Message, send: Send) -> None:
        """The proof, between vLLM's start and its listening."""
        if message["type"] == "lifespan.startup.complete":
            try:
                engine = scope["app"].state.engine_client
                armed = await self._prove(engine)
                self._open(armed, engine, {getattr(route, "path", "") for route in scope["app"].routes})
                self.armed = armed
            except Exception as error:  # whatever it is, nothing may be served; uvicorn says the message and stops
                kind = type(error)
                await send(
                    {"type": "lifespan.startup.failed", "message": f"{kind.__module__}.{kind.__name__}: {error}"}
                )
                return
        await send(message)

    async def _prove(self, engine: Any) -> dict[str, Any]:
        model = engine.model_config
        armament = arming.load(*arming.settings(model.hf_config, model.model))
        proof = await prove(engine, armament)
        ranks = await engine.collective_rpc("safegene_status")
        if any(rank["armament"] != armament.digest or not rank["accepted"] for rank in ranks) or not any(
            rank["stations"] for rank in ranks
        ):
            raise SafegeneError(
                "The workers have armed something else; do not change the adapter's files while a server starts."
            )
        config, calibration = armament.adapter.config, armament.calibration
        # In the registry that vLLM's /metrics shows.
        Gauge("safegene_armed", "1 while answers are protected.", registry=REGISTRY).set(1)
        print(
            f"{READY} (threshold {calibration.threshold:.2f}, strength {calibration.strength:.2f}; changed "
            f"{proof['harmful']['changed']} of {proof['harmful']['read']} harmful anchors); {len(ranks)} rank(s)",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        return {
            "model": model.served_model_name or model.model,
            "adapter": {
                "sha256": config.weights_sha256, "base_model": config.base_model, "gate_layers": config.gate_layers,
                "intervention_layers": config.intervention_layers, "parameters": armament.adapter.parameter_count(),
                "calibrated": True, "threshold": calibration.threshold, "strength": calibration.strength,
                "report": calibration.report,
            },
            "proof": proof, "ranks": len(ranks),
        }  # fmt: skip

    def _open(self, armed: dict[str, Any], engine: Any, routes: set[str]) -> None:
        """Hang the door. `routes`: the paths that are written down; clients must not be able to make up new ones."""
        requests = counted_requests(REGISTRY)
        limits = Limits(
            body=int(os.environ.get(MAX_BODY, Limits.body)), seconds=float(os.environ.get(TIMEOUT, SECONDS)),
            concurrency=4 * engine.vllm_config.scheduler_config.max_num_seqs,
        )  # fmt: skip

        def passed(it: Passage) -> None:
            route = it.path if it.path in routes else "other"
            requests.labels(route, it.status).inc()
            if self.audit is not None and it.path not in OPEN:
                self.audit.write(
                    RequestRecord(
                        it.request_id, route, armed["model"], armed["adapter"]["sha256"], it.status, it.seconds
                    )
                )

        self.door = Door(
            Deadline(self._serve, limits.seconds), limits=limits, api_key=os.environ.get("VLLM_API_KEY", ""), passed=passed
        )  # fmt: skip

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What came through the door, under the name that the audit log has for it."""
        if self.audit is not None and scope["method"] == "POST" and (refusal := self.audit.refusal()):
            await ApiError(503, refusal).response()(scope, receive, send)
            return
        MutableHeaders(scope=scope)["x-request-id"] = scope[REQUEST_ID]  # vLLM makes the answer's id of it
        await self.app(scope, receive, send)

    async def _status(self, scope: Scope, receive: Receive) -> int:
        """What vLLM's own /health says."""
        found = 503

        async def keep(message: Message) -> None:
            nonlocal found
            if message["type"] == "http.response.start":
                found = message["status"]

        await self.app(scope, receive, keep)
        return found
