"""The vLLM plugin without vLLM: proof, middleware, command."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from starlette.responses import JSONResponse, PlainTextResponse

from conftest import random_adapter, tiny
from safegene import models
from safegene.adapter import SafetyAdapter
from safegene.calibration import Calibration
from safegene.cli import main
from safegene.errors import AttachError, CalibrationError, SafegeneError
from safegene.serving.vllm import arming, launch, plugin
from safegene.serving.vllm.health import Health
from safegene.serving.vllm.proof import largest, prove
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
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=1))
        self.armament = arming.load(str(folder / "adapter"), folder / "adapter" / arming.FILE)

    async def collective_rpc(self, method: str) -> list[dict[str, Any]]:
        assert method == "safegene_status"
        return [{"armament": self.armament.digest, "accepted": True, "stations": 4}]


@pytest.fixture
def engine(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Engine:
    for name in (plugin.ADAPTER, plugin.CALIBRATION, plugin.AUDIT, plugin.MAX_BODY, plugin.TIMEOUT, "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("safegene.serving.vllm.health.REGISTRY", CollectorRegistry())
    random_adapter(tiny(), tokenizer, 0.0, ANCHORS).save_pretrained(tmp_path / "adapter")
    adapter = SafetyAdapter.from_pretrained(tmp_path / "adapter")
    replace(Calibration.of_base(adapter), checkpoint="12").save(tmp_path / "adapter" / arming.FILE)
    return Engine(tmp_path)


def begin(health: Health, engine: Any) -> list[Any]:
    """What the server is told when the application has started."""
    told: list[Any] = []

    async def send(message: Any) -> None:
        told.append(message)

    routes = [SimpleNamespace(path=path) for path in ("/v1/models", "/v1/completions")]
    scope: Any = {
        "type": "lifespan",
        "app": SimpleNamespace(state=SimpleNamespace(engine_client=engine), routes=routes),
    }
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


async def until_gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def inner(scope: Any, receive: Any, send: Any) -> None:
    """Of vLLM's server, as much as is asked here. What takes long ends when its client goes away, and says "null" then."""
    if scope["type"] == "lifespan":
        await send({"type": "lifespan.startup.complete"})
    elif scope["path"] == "/v1/completions":
        said = dict(scope["headers"])
        await until_gone(receive) if b"x-slow" in said else None
        await JSONResponse(None if b"x-slow" in said else said[b"x-request-id"].decode())(scope, receive, send)
    elif scope["path"] == "/v1/chat/completions":
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await until_gone(receive)
        await send({"type": "http.response.body", "body": b"data: 2\n\n", "more_body": True})
    elif scope["path"] == "/broken":
        raise ZeroDivisionError
    else:
        await PlainTextResponse("inner", 200)(scope, receive, send)


@pytest.fixture
def proved(monkeypatch: pytest.MonkeyPatch) -> None:
    async def proof(*_: Any) -> Any:
        return {"harmful": {"read": 8, "changed": 8}}

    monkeypatch.setattr("safegene.serving.vllm.health.prove", proof)


def ask(health: Health, questions: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def go() -> None:
        transport = httpx.ASGITransport(health)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            await questions(client)

    try:
        asyncio.run(go())
    finally:
        if health.audit is not None:
            health.audit.close()


@pytest.mark.usefixtures("proved")
def test_it_listens_once_it_is_proved(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert said["audit"] == "off"


@pytest.mark.usefixtures("proved")
def test_everything_goes_through_the_door(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.AUDIT, str(tmp_path / "audit"))
    monkeypatch.setenv(plugin.MAX_BODY, "100")
    monkeypatch.setenv("VLLM_API_KEY", "sk-1")
    health = Health(inner)
    begin(health, engine)

    async def questions(client: httpx.AsyncClient) -> None:
        key = {"authorization": "Bearer sk-1"}
        for path in ("/v1/completions", "/invocations", "/tokenize"):  # vLLM's own check guards /v1 only
            assert (await client.post(path, content=b"{}")).status_code == 401
        assert (await client.options("/v1/completions", headers={"origin": "http://page"})).status_code == 200
        answer = await client.post("/v1/completions", content=b"secret", headers={**key, "x-request-id": "theirs"})
        assert answer.json() == answer.headers["x-request-id"] != "theirs"
        large = await client.post("/v1/completions", content=b"x" * 101, headers=key)
        assert (large.status_code, "100 bytes" in large.json()["error"]["message"]) == (413, True)
        assert (await client.get("/made/up", headers=key)).status_code == 200
        assert (await client.get("/metrics")).text == "inner"
        with pytest.raises(ZeroDivisionError):
            await client.get("/broken", headers=key)
        assert (await client.get("/health")).json()["audit"] == "written"

    ask(health, questions)
    written = (tmp_path / "audit").read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    assert [(line["route"], line["status"]) for line in lines] == [
        ("/v1/completions", 401), ("other", 401), ("other", 401), ("/v1/completions", 200), ("/v1/completions", 200),
        ("/v1/completions", 413), ("other", 200), ("other", 500),
    ]  # fmt: skip
    assert len({line["request_id"] for line in lines}) == len(lines)
    assert {(line["model"], line["adapter"]) for line in lines} == {
        ("tiny", engine.armament.adapter.config.weights_sha256)
    }
    assert "secret" not in written
    figures = generate_latest(sys.modules["safegene.serving.vllm.health"].REGISTRY).decode()
    assert 'safegene_requests_total{route="/v1/completions",status="200"} 2.0' in figures
    assert "safegene_armed 1.0" in figures


@pytest.mark.usefixtures("proved")
def test_a_log_that_cannot_be_written_stops_new_requests(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(plugin.AUDIT, str(tmp_path / "audit"))
    health = Health(inner)
    begin(health, engine)
    assert health.audit is not None

    def full(_: bytes) -> int:
        raise OSError(28, "No space left on device")

    file = health.audit._file
    health.audit._file = SimpleNamespace(write=full)  # type: ignore[assignment]

    async def questions(client: httpx.AsyncClient) -> None:
        assert (await client.post("/v1/completions")).status_code == 200
        answer = await client.post("/v1/completions")
        assert (answer.status_code, "audit log" in answer.json()["error"]["message"]) == (503, True)
        state = await client.get("/health")
        assert (state.status_code, state.json()["audit"]) == (503, "No space left on device")
        health.audit._file = file  # type: ignore[union-attr]
        assert (await client.post("/v1/completions")).status_code == 200
        assert (await client.get("/health")).status_code == 200

    ask(health, questions)
    assert len((tmp_path / "audit").read_text().splitlines()) == 3


@pytest.mark.usefixtures("proved")
def test_what_takes_too_long_is_cut_off_and_what_is_too_much_comes_later(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(plugin.TIMEOUT, "0.2")
    health = Health(inner)
    begin(health, engine)

    async def questions(client: httpx.AsyncClient) -> None:
        late = await client.post("/v1/completions", headers={"x-slow": "1"})
        assert (late.status_code, "longer than" in late.json()["error"]["message"]) == (504, True)
        stream = (await client.post("/v1/chat/completions")).text
        first, error, done, end = stream.split("\n\n")
        assert (first, done, end) == ("data: 1", "data: [DONE]", "")
        assert "longer than" in json.loads(error.removeprefix("data: "))["error"]["message"]
        together = await asyncio.gather(*(client.post("/v1/completions", headers={"x-slow": "1"}) for _ in range(5)))
        assert sorted(answer.status_code for answer in together) == [429, 504, 504, 504, 504]  # 4 x max_num_seqs
        assert (await client.post("/v1/completions")).status_code == 200

    ask(health, questions)


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


def test_another_chat_template_is_no_proof(engine: Engine, tokenizer: Any) -> None:
    calibration = replace(engine.armament.calibration, template="other")
    with pytest.raises(CalibrationError, match="another chat template"):
        asyncio.run(
            prove(SimpleNamespace(get_tokenizer=lambda: tokenizer), replace(engine.armament, calibration=calibration))
        )


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
    for name in ("SAFEGENE_API_KEY", "VLLM_API_KEY", plugin.AUDIT, plugin.MAX_BODY, plugin.TIMEOUT):
        monkeypatch.delenv(name, raising=False)
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
    assert {plugin.AUDIT, plugin.MAX_BODY, plugin.TIMEOUT}.isdisjoint(environment)
    limits = ("--audit", str(folders / "audit"), "--max-body", "5000", "--timeout", "30")
    assert serve(folders, *said, "--dtype", "bfloat16", *limits) == 0
    environment = started[1][1]
    assert environment[plugin.AUDIT] == str(folders / "audit")
    assert (int(environment[plugin.MAX_BODY]), float(environment[plugin.TIMEOUT])) == (5000, 30)


def test_a_key_of_vllms_own_variable_stays(folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    started: list[dict[str, str]] = []
    monkeypatch.setattr(launch, "run", lambda command, environment: started.append(environment))
    said = ["--calibration", str(folders / "calibration"), "--host", "0.0.0.0"]
    assert serve(folders, *said) == 0
    assert "VLLM_API_KEY" not in started[0]
    assert "anyone who reaches" in capsys.readouterr().err
    monkeypatch.setenv("VLLM_API_KEY", "sk-theirs")
    assert serve(folders, *said) == 0
    assert started[1]["VLLM_API_KEY"] == "sk-theirs"
    assert "anyone who reaches" not in capsys.readouterr().err
    monkeypatch.setenv("SAFEGENE_API_KEY", "sk-ours")
    assert serve(folders, *said) == 0
    assert started[2]["VLLM_API_KEY"] == "sk-ours"


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
    refused(1, "writes chats otherwise", *calibrated, "--", "--chat-template", "other.jinja")
    refused(1, "writes chats otherwise", *calibrated, "--", "--trust-request-chat-template")
    refused(1, "writes chats otherwise", *calibrated, "--", "--tokenizer=other")
    refused(1, "check path", *calibrated, "--audit", str(folders / "no" / "where"))
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
