"""ASGI middleware around vLLM's server (its `--middleware`): it does not listen before the adapter is proved, and `/health` says what is
armed. Everything else passes through as it is.
"""

from __future__ import annotations

import sys
from typing import Any

from prometheus_client import Gauge
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safegene.errors import SafegeneError
from safegene.serving.vllm import arming
from safegene.serving.vllm.proof import prove

READY = "safegene: armed"
"""How the line on stderr begins that says so."""


class Health:
    """The middleware. vLLM makes one for its application."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.armed: dict[str, Any] = {}
        self.failure = "The adapter has not proved itself."

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, lambda message: self._started(scope, message, send))
        elif scope["type"] == "http" and scope["path"] == "/live":
            await JSONResponse({"alive": True})(scope, receive, send)
        elif not self.armed:  # a server without a lifespan would come here
            await JSONResponse({"armed": False, "failure": self.failure}, 503)(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] == "/health":
            status = await self._status(scope, receive)
            body = {"armed": status == 200, "failure": "" if status == 200 else "The engine has stopped.", **self.armed}
            await JSONResponse(body, status)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _started(self, scope: Scope, message: Message, send: Send) -> None:
        """The proof, between vLLM's start and its listening."""
        if message["type"] == "lifespan.startup.complete":
            try:
                self.armed = await self._prove(scope["app"].state.engine_client)
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
        proof = await prove(engine, armament.adapter)
        ranks = await engine.collective_rpc("safegene_status")
        if any(rank["armament"] != armament.digest or not rank["accepted"] for rank in ranks) or not any(
            rank["stations"] for rank in ranks
        ):
            raise SafegeneError(
                "The workers have armed something else; do not change the adapter's files while a server starts."
            )
        config, calibration = armament.adapter.config, armament.calibration
        Gauge("safegene_armed", "1 while answers are protected.").set(1)  # in the registry that vLLM's /metrics shows
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

    async def _status(self, scope: Scope, receive: Receive) -> int:
        """What vLLM's own /health says."""
        found = 503

        async def keep(message: Message) -> None:
            nonlocal found
            if message["type"] == "http.response.start":
                found = message["status"]

        await self.app(scope, receive, keep)
        return found
