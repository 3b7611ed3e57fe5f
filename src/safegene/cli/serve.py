"""safegene serve"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from safegene.errors import SafegeneError
from safegene.models import EMBEDDED

KEY_VARIABLE, VLLM_KEY_VARIABLE = "SAFEGENE_API_KEY", "VLLM_API_KEY"
MAX_BATCH, MAX_TOKENS = 16, 1024


def command(
    model: Annotated[str, typer.Option(help="Model: folder, embedded name or hub id.")] = EMBEDDED,
    adapter: Annotated[str, typer.Option(help="Adapter of its base: folder, shipped name or hub id.")] = "smollm2-135m-instruct",
    engine: Annotated[str, typer.Option(help="transformers, or vllm: its own server, with the adapter as a plugin.")] = "transformers",
    calibration: Annotated[Path | None, typer.Option(help="What safegene calibrate wrote for this model; without it, calibrates now, or with vllm takes the file beside the adapter.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(help=f"File that holds the API key; else ${KEY_VARIABLE}.")] = None,
    playground: Annotated[bool, typer.Option("--playground", help="Show a page at / that also gives answers without the adapter.")] = False,
    audit: Annotated[Path | None, typer.Option(help="Append one JSON line an answer to this file; with vllm, one a request.")] = None,
    audit_text: Annotated[bool, typer.Option("--audit-text", help="Write prompts and answers into it, too.")] = False,
    max_batch: Annotated[int | None, typer.Option(min=1, help=f"Answers generated together; default {MAX_BATCH}.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help=f"New tokens of an answer at most; default {MAX_TOKENS}.")] = None,
    max_body: Annotated[int | None, typer.Option(min=1, help="Bytes of a request's body at most; default 1,048,576.")] = None,
    timeout: Annotated[float | None, typer.Option(min=1, help="Seconds that an answer may take, waiting included; default 120, with vllm 600.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32, or auto, the checkpoint's. Default: auto with --calibration, else bfloat16; with vllm the calibration's.")] = "",
    allow_drift: Annotated[bool, typer.Option("--allow-drift", help="Serve even when the gate has lost its way here, or the weights lie far from the base's.")] = False,
    more: Annotated[list[str] | None, typer.Argument(metavar="-- VLLM_OPTIONS", help="With --engine vllm: options of vLLM's own server, after --.")] = None,
) -> None:  # fmt: skip
    """Answer over HTTP as OpenAI's API does, through a safety adapter that has proved itself armed."""
    if engine not in ("transformers", "vllm"):
        raise typer.BadParameter(f"--engine is transformers or vllm, not {engine}.")
    if engine == "vllm":
        others = {
            "--playground": playground, "--audit-text": audit_text, "--max-batch": max_batch, "--max-tokens": max_tokens,
            "--allow-drift": allow_drift,
        }  # fmt: skip
        if given := [name for name, value in others.items() if value]:
            raise typer.BadParameter(f"{given[0]} is the transformers engine's; vLLM's own options come after --.")
        if dtype not in ("", "bfloat16", "float16", "float32"):
            raise typer.BadParameter(f"--dtype is bfloat16, float16 or float32 with --engine vllm, not {dtype}.")
        key = checked_door(host, port, api_key_file, KEY_VARIABLE, VLLM_KEY_VARIABLE)
        from safegene.serving.vllm.launch import launch

        launch(
            model=model, adapter=adapter, calibration=calibration, dtype=dtype, host=host, port=port, api_key=key, audit=audit,
            max_body=max_body, timeout=timeout, more=more or (),
        )  # fmt: skip
        return
    if more:
        raise typer.BadParameter(f"{more[0]} is no option of the transformers engine.")
    try:
        import uvicorn

        from safegene.serving.app import create_app
        from safegene.serving.armed import prove
        from safegene.serving.audit import Audit
        from safegene.serving.door import Limits
        from safegene.serving.engine import Engine
        from safegene.serving.service import GRACE
    except ModuleNotFoundError as error:
        raise SafegeneError(f"serving needs {error.name}; run: pip install 'safegene[serve]'") from error
    from safegene import models
    from safegene.adapter import SafetyAdapter
    from safegene.attach import attach
    from safegene.calibration import Calibration

    if audit_text and audit is None:
        raise typer.BadParameter("--audit-text needs --audit FILE.")
    key = checked_door(host, port, api_key_file, KEY_VARIABLE)
    max_batch = max_batch or MAX_BATCH
    if playground:
        warn("the playground also gives answers without the adapter; leave --playground out where others can reach it.")
    log = Audit(audit, text=audit_text) if audit is not None else None
    gene = SafetyAdapter.from_pretrained(adapter)
    saved = Calibration.load(calibration) if calibration is not None else None
    # A calibration is bound to the numbers of the weights, so they must be loaded as safegene calibrate loads them.
    dtype = dtype or ("auto" if saved else "bfloat16")
    loaded = models.load(model, dtype=dtype)
    handle = attach(loaded.model, gene, tokenizer=loaded.tokenizer, calibration=saved, allow_drift=allow_drift)
    proof = prove(loaded, handle)
    answering = Engine(loaded, handle, max_batch=max_batch)
    limits = Limits(
        body=max_body or Limits.body, max_tokens=max_tokens or MAX_TOKENS, concurrency=4 * max_batch, seconds=timeout or Limits.seconds
    )  # fmt: skip
    app = create_app(
        answering, model_name=model, adapter_digest=gene.config.weights_sha256, limits=limits, api_key=key, audit=log,
        playground=playground, proof=proof,
    )  # fmt: skip
    print(
        f"safegene: armed (threshold {handle.calibration.threshold:.2f}, strength {handle.calibration.strength:.2f}; changed "
        f"{proof['harmful']['changed']} of {proof['harmful']['read']} harmful anchors); serving {model} at http://{host}:{port}/v1",
        file=sys.stderr,
    )
    answering.start()
    try:
        uvicorn.run(
            app, host=host, port=port, access_log=False, server_header=False, timeout_graceful_shutdown=GRACE + 5
        )  # fmt: skip
    finally:
        answering.stop()


def checked_door(host: str, port: int, api_key_file: Path | None, *variables: str) -> str:
    """The API key, of an address that can be listened at; warns where it is open to others without one.

    Args:
        variables: of the environment, where a key may stand; the first that holds one counts.

    Raises:
        SafegeneError: no usable key in the file, or nothing can listen there.
    """
    key = read_key(api_key_file, *variables)
    check_address(host, port)
    if not key and not is_loopback(host):
        warn(f"anyone who reaches {host}:{port} can ask; give --api-key-file or {KEY_VARIABLE}.")
    return key


def read_key(file: Path | None, *variables: str) -> str:
    """The API key of a file, or of the environment; "" where there is none.

    Raises:
        SafegeneError: a file without a usable key, which must not mean that none is asked for.
    """
    if file is None:
        found = ((os.environ.get(name, "").strip(), f"${name}") for name in variables)
        key, where = next((pair for pair in found if pair[0]), ("", ""))
        if not key:
            return ""
    else:
        key, where = file.read_bytes().decode("latin-1").strip(), str(file)
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise SafegeneError(f"{where} holds no API key; write one line of letters, digits and signs without spaces.")
    return key


def check_address(host: str, port: int) -> None:
    """Find out before the model is loaded that nothing can listen there.

    Raises:
        SafegeneError: the port is taken, or the host is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise SafegeneError(f"{host}:{port} cannot be listened at ({error.strerror}); give another --host or --port.") from error  # fmt: skip


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def warn(message: str) -> None:
    print(f"safegene serve: warning: {message}", file=sys.stderr)
