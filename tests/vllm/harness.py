"""Engines and servers in processes of their own: vLLM keeps processes and memory that a test must not inherit."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RUNS = ROOT / "runs" / "vllm"
LIMIT = 900
"""Seconds that a process may take."""

Prepared = Callable[[str], dict[str, Any]]


def installed() -> bool:
    try:  # this folder is called vllm, too, so the name alone says nothing
        return importlib.util.find_spec("vllm.version") is not None
    except ModuleNotFoundError:
        return False


def environment(**more: str) -> dict[str, str]:
    """For vLLM on this machine: offline, little memory, and nothing of the caller's that would change it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "SAFEGENE_"))}
    if "SAFEGENE_CACHE" in os.environ:
        kept["SAFEGENE_CACHE"] = os.environ["SAFEGENE_CACHE"]
    return {
        **kept, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_CACHE_ROOT": str(RUNS / "cache"), "PYTHONPATH": str(HERE), **more,
    }  # fmt: skip


def run(command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    """Run to the end, with everything that it started."""
    with subprocess.Popen(
        command, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:  # fmt: skip
        try:
            said, _ = process.communicate(timeout=LIMIT)
        finally:
            end_group(process)
    return subprocess.CompletedProcess(command, process.returncode, said)


def end_group(process: subprocess.Popen[Any]) -> None:
    """Whatever the process started and left behind."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def options(reference: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The engine's options; eager unless said otherwise."""
    return {
        "model": reference["model"], "dtype": reference["dtype"], "max_model_len": 1024, "max_num_seqs": 16, "enforce_eager": True,
        "enable_prefix_caching": False, "generation_config": "vllm", "hf_overrides": {"architectures": ["SafeGeneLlamaForCausalLM"]},
        **more,
    }  # fmt: skip


def protected(reference: dict[str, Any], **more: str) -> dict[str, str]:
    return {"SAFEGENE_ADAPTER": reference["adapter"], "SAFEGENE_CALIBRATION": reference["calibration"], **more}


def ask(folder: Path, job: dict[str, Any], **more: str) -> dict[str, Any]:
    """Run a job in an engine; fails with the end of its log where it does."""
    done = attempt(folder, job, **more)
    assert done.returncode == 0, done.stdout[-4000:]
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return {**found, "log": done.stdout}


def attempt(folder: Path, job: dict[str, Any], **more: str) -> subprocess.CompletedProcess[str]:
    (folder / "job.json").write_text(json.dumps(job))
    return run([sys.executable, str(HERE / "engine.py"), str(folder / "job.json"), str(folder / "out.json")], **more)


class Served:
    """A `safegene serve --engine vllm` that runs."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.url = process, f"http://127.0.0.1:{port}"
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            self.said.extend(lines)

    def wait_for(self, found: Callable[[], bool], seconds: float = LIMIT) -> None:
        end = time.monotonic() + seconds
        while not found():
            assert time.monotonic() < end, "".join(self.said)[-3000:]
            time.sleep(0.5)

    def figure(self, name: str) -> float:
        """What /metrics says of one figure, all its labels together."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    def answers(self) -> bool:
        assert self.process.poll() is None, "".join(self.said)[-4000:]
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        return False

    def ended(self) -> bool:
        return self.process.poll() is not None


@contextlib.contextmanager
def serving(reference: dict[str, Any], *more: str, own: Sequence[str] = (), key: str = "") -> Iterator[Served]:
    """The command, once it answers. `own`: further options of ours; `more`: of vLLM's."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "safegene", "serve", "--engine", "vllm", "--model", reference["model"], "--adapter", reference["adapter"],
        "--calibration", reference["calibration"], "--port", str(port), *own, "--", "--max-model-len", "1024", "--max-num-seqs", "16",
        *more,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=environment(**({"SAFEGENE_API_KEY": key} if key else {})), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    served = Served(process, port)
    try:
        served.wait_for(served.answers)
        yield served
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        end_group(process)
        process.wait(30)


def of(reference: dict[str, Any], *kinds: str) -> list[dict[str, Any]]:
    return [p for p in reference["prompts"] if p["kind"] in kinds]


def round_of(prompts: Sequence[dict[str, Any]], tokens: int = 40) -> dict[str, Any]:
    """What is asked together."""
    return {"prompts": [p["prompt"] for p in prompts], "tokens": tokens}


def compare(prompts: Sequence[dict[str, Any]], answers: Sequence[list[int]]) -> list[dict[str, Any]]:
    """Where they differ: the prompt's kind, the first token that does, and the margin there."""
    differing = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if answer != prompt["answer"]:
            at = next((i for i, (a, b) in enumerate(zip(answer, prompt["answer"], strict=False)) if a != b), -1)
            margin = prompt["margin"][at] if at >= 0 else None
            differing.append({"kind": prompt["kind"], "token": at, "margin": margin, "nearest": prompt["nearest"]})
    return differing
