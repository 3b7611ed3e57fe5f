"""What is deployed: Compose file, Dockerfile, and the probes in the docs, as far as can be seen without building."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import safegene
from safegene.cli import calibrate, serve
from safegene.serving.door import OPEN
from safegene.serving.vllm import launch, plugin

ROOT = Path(__file__).parent.parent
DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
INSTRUCTIONS = {"FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    return found


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    """Instructions and their arguments."""
    text = re.sub(r"^#.*\n", "", (ROOT / "deploy/Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    parts = [line.partition(" ") for line in text.splitlines() if line.strip()]
    return [(instruction, rest.strip()) for instruction, _, rest in parts]


def said(dockerfile: list[tuple[str, str]], instruction: str) -> list[str]:
    return [rest for name, rest in dockerfile if name == instruction]


def options(command: Sequence[str]) -> dict[str, str]:
    """--name=value, --name value → name: value."""
    return dict(re.findall(r"--([a-z-]+)[= ](\S+)", " ".join(command)))


def test_the_dockerfile_has_its_form(dockerfile: list[tuple[str, str]]) -> None:
    assert dockerfile[0][0] == "FROM"
    assert {name for name, _ in dockerfile} <= INSTRUCTIONS
    assert said(dockerfile, "FROM")[0].startswith(f"vllm/vllm-openai:v{plugin.TESTED}")
    for copied in said(dockerfile, "COPY"):
        assert all((ROOT / source).exists() for source in copied.split()[:-1])
    (user,) = said(dockerfile, "USER")
    assert int(user) > 0
    assert f"--uid {user} " in said(dockerfile, "RUN")[0]
    for form in (*said(dockerfile, "ENTRYPOINT"), *said(dockerfile, "CMD")):
        assert all(isinstance(word, str) for word in json.loads(form))  # the form that no shell reads: signals arrive
    assert json.loads(said(dockerfile, "ENTRYPOINT")[0]) == ["safegene"]
    wanted = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{found}"' in wanted for found in re.findall(r'"([a-z]+>=[\d.]+)"', said(dockerfile, "RUN")[0]))


def test_what_is_copied_is_let_through(dockerfile: list[tuple[str, str]]) -> None:
    let = (ROOT / "deploy/Dockerfile.dockerignore").read_text().splitlines()
    assert let[0] == "*"
    assert {f"!{source}" for copied in said(dockerfile, "COPY") for source in copied.split()[:-1]} <= set(let)


def test_the_health_check_asks_what_the_server_answers(
    dockerfile: list[tuple[str, str]], compose: dict[str, Any]
) -> None:
    (check,) = said(dockerfile, "HEALTHCHECK")
    (port,) = said(dockerfile, "EXPOSE")
    (url,) = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", check)
    assert url == (port, "/health")
    assert url[1] in OPEN  # it has no key
    assert int(port) == inspect.signature(serve.command).parameters["port"].default
    assert compose["services"]["calibrate"]["healthcheck"] == {"disable": True}
    assert "healthcheck" not in compose["services"]["serve"]  # the image's
    (published,) = compose["services"]["serve"]["ports"]
    assert published == f"127.0.0.1:{port}:{port}"


def test_the_services_fit_together(compose: dict[str, Any], dockerfile: list[tuple[str, str]]) -> None:
    services = compose["services"]
    assert set(services) == {"volume", "calibrate", "serve"}
    for name in ("calibrate", "serve"):
        assert services[name]["image"] == f"safegene-vllm:{safegene.__version__}"
        build = services[name]["build"]
        assert (ROOT / "deploy" / build["context"] / build["dockerfile"]).samefile(ROOT / "deploy/Dockerfile")
        assert services[name]["cap_drop"] == ["ALL"]
    for service in services.values():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in services
            assert how == {"condition": "service_completed_successfully"}
        for mounted in service["volumes"]:
            source = mounted.rsplit(":/", 1)[0]
            assert source in compose["volumes"] or re.fullmatch(r"\$\{(MODEL|ADAPTER):\?set .+\}", source)
    assert services["volume"]["command"] == ["chown", said(dockerfile, "USER")[0], "/calibration"]
    assert options(services["calibrate"]["command"])["out"] == options(services["serve"]["command"])["calibration"]
    places = {mounted.removesuffix(":ro").rsplit(":", 1)[1] for mounted in services["serve"]["volumes"]}
    assert {options(services["serve"]["command"])[what] for what in ("model", "adapter")} < places


def test_the_commands_have_these_options(compose: dict[str, Any]) -> None:
    for verb, command in (("calibrate", calibrate.command), ("serve", serve.command)):
        words = compose["services"][verb]["command"]
        assert words[0] == verb
        own = words[: words.index("--")] if "--" in words else words
        known = {name.replace("_", "-") for name in inspect.signature(command).parameters} - {"more"}
        assert set(options(own)) <= known
        launch.check_options(words[len(own) + 1 :])
    assert options(compose["services"]["serve"]["command"])["engine"] == "vllm"


def test_the_key_is_a_secret(compose: dict[str, Any]) -> None:
    serving = compose["services"]["serve"]
    assert serving["secrets"] == ["api_key"]
    assert options(serving["command"])["api-key-file"] == "/run/secrets/api_key"
    assert compose["secrets"]["api_key"] == {"file": "./api_key"}
    assert "deploy/api_key" in (ROOT / ".gitignore").read_text().splitlines()
    assert "environment" not in serving


def test_yaml_in_the_docs_is_yaml() -> None:
    probes = 0
    for page in DOCS:
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.S):
            found = yaml.safe_load(block)
            assert isinstance(found, dict)
            for name, probe in found.items():
                if name.endswith("Probe"):
                    probes += 1
                    assert name in ("startupProbe", "readinessProbe", "livenessProbe")
                    assert set(probe) <= {"httpGet", "periodSeconds", "failureThreshold", "timeoutSeconds"}
                    assert set(probe["httpGet"]) == {"path", "port"}
                    assert probe["httpGet"]["path"] in OPEN
                    assert isinstance(probe["httpGet"]["port"], int)
    assert probes >= 6


def test_pictures_in_the_docs_are_there() -> None:
    for page in DOCS:
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / picture).is_file(), f"{page}: {picture}"
