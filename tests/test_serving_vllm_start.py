"""The vLLM plugin without vLLM: proof, middleware, command."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.responses import PlainTextResponse

from conftest import random_adapter, tiny
from safegene import models
from safegene.adapter import SafetyAdapter
from safegene.calibration import Calibration
from safegene.cli import main
from safegene.errors import AttachError, SafegeneError
from safegene.serving.vllm import arming, launch, plugin
from safegene.serving.vllm.health import Health
from safegene.serving.vllm.proof import largest
from served import ANCHORS

# The proof, and the server's beginning


def test_the_largest_difference_of_two_lists() -> None:
    assert largest({1: -0.1, 2: -3.0}, {1: -0.1, 2: -3.0}) == 0
    assert largest({1: -0.1, 2: -3.0}, {1: -0.6, 2: -3.0}) == pytest.approx(0.5)
    assert largest({1: -0.1, 2: -3.0}, {3: -0.2, 4: -2.0}) == pytest.approx(2.8)


class Engine:
    """As much of vLLM's engine as the middleware asks."""

    def __init__(self, folder: Path) -> None:
        self.model_config = SimpleNamespace(
            hf_config=SimpleNamespace(safegene={"adapter": "adapter"}), model=str(folder), served_model_name="tiny"
        )
        self.armament = arming.load(str(folder / "adapter"), folder / "adapter" / arming.FILE)

    async def collective_rpc(self, method: str) -> list[dict[str, Any]]:
        assert method == "safegene_status"
        return [{"armament": self.armament.digest, "accepted": True, "stations": 4}]


@pytest.fixture
def engine(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.delenv(plugin.ADAPTER, raising=False)
    monkeypatch.delenv(plugin.CALIBRATION, raising=False)
    monkeypatch.setattr("safegene.serving.vllm.health.Gauge", lambda *_: SimpleNamespace(set=lambda value: None))
    random_adapter(tiny(), tokenizer, 0.0, ANCHORS).save_pretrained(tmp_path / "adapter")
    adapter = SafetyAdapter.from_pretrained(tmp_path / "adapter")
    replace(Calibration.of_base(adapter), checkpoint="12").save(tmp_path / "adapter" / arming.FILE)
    return Engine(tmp_path)


def begin(health: Health, engine: Any) -> list[Any]:
    """What the server is told when the application has started."""
    told: list[Any] = []

    async def send(message: Any) -> None:
        told.append(message)

    scope: Any = {"type": "lifespan", "app": SimpleNamespace(state=SimpleNamespace(engine_client=engine))}
    asyncio.run(health(scope, lambda: None, send))  # type: ignore[arg-type]
    return told


def get(health: Health, path: str) -> tuple[int, bytes]:
    told: list[Any] = []

    async def send(message: Any) -> None:
        told.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope: Any = {"type": "http", "method": "GET", "path": path, "headers": []}
    asyncio.run(health(scope, receive, send))
    return told[0]["status"], told[1]["body"]


async def inner(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        await send({"type": "lifespan.startup.complete"})
    else:
        await PlainTextResponse("inner", 200)(scope, receive, send)


def test_it_listens_once_it_is_proved(engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    async def proof(*_: Any) -> Any:
        return {"harmful": {"read": 8, "changed": 8}}

    monkeypatch.setattr("safegene.serving.vllm.health.prove", proof)
    health = Health(inner)
    assert get(health, "/v1/models") == (503, b'{"armed":false,"failure":"The adapter has not proved itself."}')
    assert get(health, "/live")[0] == 200
    assert begin(health, engine) == [{"type": "lifespan.startup.complete"}]
    assert capsys.readouterr().err.startswith("safegene: armed (")
    assert get(health, "/v1/models") == (200, b"inner")
    status, body = get(health, "/health")
    said = json.loads(body)
    assert status == 200
    assert said["armed"]
    assert said["proof"]["harmful"]["changed"] == 8
    assert said["adapter"]["gate_layers"] == [1, 2]


def test_without_a_proof_it_never_listens(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_proof(*_: Any) -> Any:
        raise AttachError("The adapter changes nothing.")

    monkeypatch.setattr("safegene.serving.vllm.health.prove", no_proof)
    health = Health(inner)
    (told,) = begin(health, engine)
    assert told == {
        "type": "lifespan.startup.failed",
        "message": "safegene.errors.AttachError: The adapter changes nothing.",
    }
    assert get(health, "/health")[0] == 503

    async def proof(*_: Any) -> Any:
        return {"harmful": {"read": 8, "changed": 8}}

    monkeypatch.setattr("safegene.serving.vllm.health.prove", proof)
    engine.armament = replace(engine.armament, digest="other")
    (told,) = begin(Health(inner), engine)
    assert "something else" in told["message"]


# The command


@pytest.fixture
def folders(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model, its adapter and their calibration; a vLLM that is only there."""
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    random_adapter(model, tokenizer, 0.0, ANCHORS).save_pretrained(tmp_path / "adapter")
    adapter = SafetyAdapter.from_pretrained(tmp_path / "adapter")
    digest = models.weights_digest(model.bfloat16())
    replace(Calibration.of_base(adapter), checkpoint=digest).save(tmp_path / "calibration")
    monkeypatch.setattr(launch, "check_installed", lambda: None)
    monkeypatch.delenv("SAFEGENE_API_KEY", raising=False)
    return tmp_path


def serve(folder: Path, *more: str) -> int:
    return main(["serve", "--engine", "vllm", "--model", str(folder / "model"), "--adapter", str(folder / "adapter"), "--port", "18733", *more])  # fmt: skip


def test_the_command_starts_vllms_server(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(launch, "run", lambda command, environment: started.append((command, environment)))
    (folders / "key").write_text("sk-secret\n")
    said = ["--calibration", str(folders / "calibration"), "--api-key-file", str(folders / "key")]
    assert serve(folders, *said, "--", "--max-model-len", "64") == 0
    ((command, environment),) = started
    assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    given = dict(zip(command[3::2], command[4::2], strict=True))
    assert json.loads(given["--hf-overrides"]) == {"architectures": ["SafeGeneLlamaForCausalLM"]}
    assert given["--dtype"] == "bfloat16"  # in which it was calibrated
    assert given["--max-model-len"] == "64"
    assert "sk-secret" not in command
    assert environment["VLLM_API_KEY"] == "sk-secret"
    assert environment[plugin.ADAPTER] == str(folders / "adapter")
    assert serve(folders, *said, "--dtype", "bfloat16") == 0


def test_what_the_command_refuses_is_one_line(folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr(launch, "run", lambda *_: pytest.fail("it was started"))
    calibrated = ("--calibration", str(folders / "calibration"))

    def refused(code: int, message: str, *more: str) -> None:
        capsys.readouterr()
        assert serve(folders, *more) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line

    refused(1, "run safegene calibrate")
    refused(1, "is set by safegene serve", *calibrated, "--", "--hf-overrides={}")
    refused(1, "is set by safegene serve", *calibrated, "--", "--middlew", "x.Y")
    refused(1, "is set by safegene serve", *calibrated, "--", '--hf_overrides.architectures=["LlamaForCausalLM"]')
    refused(1, "another dtype", *calibrated, "--dtype", "float32")
    refused(2, "transformers engine's", *calibrated, "--playground")
    refused(2, "transformers engine's", *calibrated, "--max-batch", "3")
    refused(2, "--dtype is", *calibrated, "--dtype", "auto")
    refused(2, "--engine is", "--engine", "other")
    refused(2, "no option of the transformers engine", "--engine", "transformers", "--", "--max-model-len")
    other = tiny("gemma3")
    other.save_pretrained(folders / "model")
    refused(1, "is for llama models", *calibrated)
    weights = folders / "adapter" / "safegene_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    refused(1, "SHA-256 differs", *calibrated)


def test_what_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "vllm.version", None)
    with pytest.raises(SafegeneError, match="pip install 'safegene\\[vllm\\]'"):
        launch.check_installed()
    monkeypatch.setattr(launch, "check_version", lambda: None)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    with pytest.raises(SafegeneError, match="does not see the plugin"):
        launch.check_installed()
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [SimpleNamespace(name="safegene")])
    monkeypatch.setenv("VLLM_PLUGINS", "lora")
    with pytest.raises(SafegeneError, match="leaves the plugin out"):
        launch.check_installed()
    monkeypatch.setenv("VLLM_PLUGINS", "lora,safegene")
    launch.check_installed()


def test_the_servers_end_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    def end(code: str) -> None:
        launch.run([sys.executable, "-c", code], {})

    with pytest.raises(SafegeneError, match="exit code 3"):
        end("import sys; sys.exit(3)")
    with pytest.raises(SafegeneError, match=r"^Calibrate again\.$"):
        end("import sys; sys.exit('(EngineCore pid=1) ERROR safegene.errors.CalibrationError: Calibrate again.')")
    assert "EngineCore" in capfd.readouterr().err
    with pytest.raises(SafegeneError, match="exit code 0"):  # nobody asked it to
        end("pass")
    end("import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(30)")
