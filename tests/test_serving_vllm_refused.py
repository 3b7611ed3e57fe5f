"""The vLLM plugin without vLLM: what it refuses, and where its settings come from."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import CONFIGS, random_adapter, tiny
from safegene.adapter import SafetyAdapter
from safegene.calibration import Calibration
from safegene.errors import AttachError, CalibrationError, DriftError
from safegene.models import check_fit
from safegene.serving.vllm import arming, guard, plugin
from served import ANCHORS

# What is refused


def vllm_config(**parts: dict[str, Any]) -> Any:
    """A configuration that can be protected, with some parts changed."""
    usual: dict[str, dict[str, Any]] = {
        "model_config": {"quantization": None, "runner_type": "generate", "enable_sleep_mode": False},
        "parallel_config": {
            "use_ubatching": False, "enable_hc_sp": False, "use_sequence_parallel_moe": False, "data_parallel_size": 1,
            "prefill_context_parallel_size": 1, "decode_context_parallel_size": 1, "enable_batch_sharded_sampling": None,
        },
    }  # fmt: skip
    whole = {name: SimpleNamespace(**{**usual[name], **parts.get(name, {})}) for name in usual}
    for name in ("lora_config", "weight_transfer_config", "kv_transfer_config", "speculative_config"):
        whole[name] = SimpleNamespace(**parts[name]) if name in parts else None  # type: ignore[assignment]
    return SimpleNamespace(**whole)


def test_configurations_that_cannot_be_protected_are_refused() -> None:
    guard.refuse(vllm_config(), developing=False)
    guard.refuse(vllm_config(speculative_config={"rejection_sample_method": "standard"}), developing=False)
    with pytest.raises(AttachError, match="VLLM_SERVER_DEV_MODE"):
        guard.refuse(vllm_config(), developing=True)
    for part, setting, value, word in (
        ("lora_config", "rank", 8, "LoRA"),
        ("kv_transfer_config", "role", "both", "another server"),
        ("weight_transfer_config", "backend", "nccl", "exchanged"),
        ("speculative_config", "rejection_sample_method", "synthetic", "Synthetic"),
        ("model_config", "quantization", "fp8", "quantised by fp8"),
        ("model_config", "runner_type", "pooling", "guards answers"),
        ("model_config", "enable_sleep_mode", True, "exchanged"),
        ("parallel_config", "use_ubatching", True, "half batches"),
        ("parallel_config", "enable_hc_sp", True, "sequence parallelism"),
        ("parallel_config", "prefill_context_parallel_size", 2, "Context parallelism"),
        ("parallel_config", "decode_context_parallel_size", 2, "Context parallelism"),
        ("parallel_config", "data_parallel_size", 2, "replica"),
        ("parallel_config", "enable_batch_sharded_sampling", True, "Sharded sampling"),
    ):
        with pytest.raises(AttachError, match=word):
            guard.refuse(vllm_config(**{part: {setting: value}}), developing=False)


def test_adapter_and_calibration_must_belong_together(tmp_path: Path, tokenizer: Any) -> None:
    random_adapter(tiny(), tokenizer, 0.0, ANCHORS).save_pretrained(tmp_path / "a")
    random_adapter(tiny(), tokenizer, 1.0, ANCHORS).save_pretrained(tmp_path / "b")
    adapter = SafetyAdapter.from_pretrained(tmp_path / "a")
    fits = replace(Calibration.of_base(adapter), checkpoint="12")
    fits.save(tmp_path / "fits")
    replace(fits, outside="The gate is lost").save(tmp_path / "lost")
    replace(fits, down=fits.down[:1]).save(tmp_path / "short")
    replace(fits, adapter="other").save(tmp_path / "foreign")
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does around the making of a model
    try:
        found = arming.load(str(tmp_path / "a"), tmp_path / "fits")
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found.adapter.parameters(), adapter.parameters(), strict=True))
    assert found.digest == arming.load(str(tmp_path / "a"), tmp_path / "fits").digest
    for adapter_name, file, error, message in (
        ("a", "lost", DriftError, "The gate is lost"),
        ("a", "short", CalibrationError, "another adapter"),
        ("a", "foreign", CalibrationError, "another adapter"),
        ("a", "none", CalibrationError, "no calibration file"),
    ):
        with pytest.raises(error, match=message):
            arming.load(str(tmp_path / adapter_name), tmp_path / file)
    with pytest.raises(CalibrationError, match="another checkpoint"):
        arming.check_checkpoint(fits, "13")
    with pytest.raises(AttachError, match="is for llama models"):
        check_fit(adapter.config, CONFIGS["qwen2"]())


def test_where_the_settings_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(plugin.ADAPTER, raising=False)
    monkeypatch.delenv(plugin.CALIBRATION, raising=False)
    with pytest.raises(AttachError, match="No adapter is named"):
        arming.settings(SimpleNamespace(), str(tmp_path))
    (tmp_path / "own").mkdir()
    inside = SimpleNamespace(safegene={"adapter": "own"})
    assert arming.settings(inside, str(tmp_path)) == (str(tmp_path / "own"), tmp_path / "own" / arming.FILE)
    (tmp_path / "file").touch()
    inside.safegene["calibration"] = "file"
    assert arming.settings(inside, str(tmp_path)) == (str(tmp_path / "own"), tmp_path / "file")
    monkeypatch.setenv(plugin.ADAPTER, "smollm2-135m-instruct")
    monkeypatch.setenv(plugin.CALIBRATION, "elsewhere")
    assert arming.settings(inside, str(tmp_path)) == ("smollm2-135m-instruct", Path("elsewhere"))


def test_the_entry_point_imports_nothing_heavy() -> None:
    code = "import sys, safegene.serving.vllm.plugin; print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_plugin_registers_names_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    others = ("LLaMAForCausalLM", "Ministral3ForCausalLM", "GemmaForCausalLM", "TransformersForCausalLM")
    vllms = dict.fromkeys((*plugin.PROTECTED, *others, "EagleLlamaForCausalLM"), "vllm's")
    known = {**vllms}
    registry = SimpleNamespace(register_model=known.__setitem__, get_supported_archs=known.keys)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    monkeypatch.setitem(sys.modules, "vllm.version", SimpleNamespace(__version__="0.32.1"))
    drafts = SimpleNamespace(_SPECULATIVE_DECODING_MODELS={"EagleLlamaForCausalLM": ("llama_eagle", "EagleLlamaForCausalLM")})  # fmt: skip
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.registry", drafts)
    monkeypatch.delenv(plugin.ADAPTER, raising=False)
    plugin.register()
    own = {f"SafeGene{name}": f"{plugin.CLASSES}:SafeGene{name}" for name in plugin.PROTECTED}
    assert known == {**vllms, **own}
    monkeypatch.setenv(plugin.ADAPTER, "smollm2-135m-instruct")
    plugin.register()
    assert known == {
        **own, **{name: own[f"SafeGene{name}"] for name in plugin.PROTECTED}, **dict.fromkeys(others, f"{plugin.CLASSES}:Refused"),
        "EagleLlamaForCausalLM": "vllm's",
    }  # fmt: skip
    monkeypatch.setitem(sys.modules, "vllm.version", SimpleNamespace(__version__="0.33.0"))
    with pytest.raises(AttachError, match=r"is for 0\.32\.x only"):
        plugin.register()


def imported(name: str, monkeypatch: pytest.MonkeyPatch, **vllms: Any) -> Any:
    """A module of the plugin that needs vLLM, on stand-ins for vLLM's modules."""
    for module, holds in vllms.items():
        monkeypatch.setitem(sys.modules, f"vllm.{module.replace('__', '.')}", holds)
    whole = f"safegene.serving.vllm.{name}"
    monkeypatch.delitem(sys.modules, whole, raising=False)
    try:
        return importlib.import_module(whole)
    finally:
        sys.modules.pop(whole, None)


def test_what_has_no_protected_form_is_refused_when_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    stands: dict[str, Any] = {
        f"model_executor__models__{file}": SimpleNamespace(
            **{f"{name}{part}": type(f"{name}{part}", (torch.nn.Module,), {}) for part in ("DecoderLayer", "ForCausalLM")}
        )
        for file, name in names.items()
    }  # fmt: skip
    refused = imported("architectures", monkeypatch, **stands).Refused
    asked = SimpleNamespace(model_config=SimpleNamespace(architectures=["GemmaForCausalLM"], model_impl="auto"))
    with pytest.raises(AttachError, match="SAFEGENE_ADAPTER is set, and GemmaForCausalLM has no protected form"):
        refused(vllm_config=asked, prefix="")


def test_a_block_in_config_json_asks_for_the_protected_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    class Parser:
        def parse(self, model: dict[str, Any], **_: Any) -> tuple[dict[str, Any], Any]:
            return model, SimpleNamespace(
                **{"auto_map": {"AutoModel": "theirs.Theirs"}, "architectures": None, **model}
            )

    parsers: dict[str, Any] = {}
    stand = SimpleNamespace(
        HFConfigParser=Parser, MistralConfigParser=Parser, register_config_parser=lambda name: lambda parser: parsers.setdefault(name, parser)
    )  # fmt: skip
    imported("config_json", monkeypatch, transformers_utils__config=stand)
    block = {"safegene": {"adapter": "safegene"}}
    for parser in (parsers["hf"](), parsers["mistral"]()):
        for said, meant in (
            (["LlamaForCausalLM"], ["SafeGeneLlamaForCausalLM"]), (["SafeGeneLlamaForCausalLM"], ["SafeGeneLlamaForCausalLM"]),
            (["GemmaForCausalLM"], ["SafeGeneGemmaForCausalLM"]), (None, ["SafeGene"]),
        ):  # fmt: skip
            config = parser.parse({"architectures": said, **block})[1]
            assert (config.architectures, config.auto_map) == (meant, None)
        plain = parser.parse({"architectures": ["LlamaForCausalLM"]})[1]
        assert (plain.architectures, plain.auto_map) == (["LlamaForCausalLM"], {"AutoModel": "theirs.Theirs"})
