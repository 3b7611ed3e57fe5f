"""Whatever is wrong, nothing is answered without protection: the engine does not start, or it stops."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from harness import HERE, ask, attempt, compare, of, options, protected, round_of, run
from safegene import hub

HIDDEN = """
import importlib.metadata as metadata
found = metadata.entry_points
metadata.entry_points = lambda **asked: [] if asked.get("group") == "vllm.general_plugins" else found(**asked)
"""
"""A sitecustomize that hides the plugin, as if the package were not installed."""


def job(reference: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"engine": options(reference, **more), "rounds": [round_of(of(reference, "harmful")[:2], 8)]}


def refused(done: subprocess.CompletedProcess[str], folder: Path, message: str) -> None:
    assert done.returncode != 0
    assert message in done.stdout, done.stdout[-4000:]
    assert not (folder / "out.json").exists()


def test_without_the_plugin_the_architecture_is_unknown(reference: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDDEN)
    path = f"{tmp_path}:{HERE}"
    refused(attempt(tmp_path, job(reference), **protected(reference, PYTHONPATH=path)), tmp_path, "are not supported")
    refused(attempt(tmp_path, job(reference), **protected(reference, VLLM_PLUGINS="another")), tmp_path, "are not supported")  # fmt: skip


def test_a_tampered_adapter_is_refused(reference: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(hub.folder_of(reference["adapter"]), tmp_path / "adapter")
    weights = tmp_path / "adapter" / "safegene_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    named = {**reference, "adapter": str(tmp_path / "adapter")}
    refused(attempt(tmp_path, job(reference), **protected(named)), tmp_path, "SHA-256 differs")


@pytest.fixture
def other(reference: dict[str, Any], tmp_path: Path) -> Path:
    """The model with one weight changed, as after a fine-tune."""
    shutil.copytree(reference["model"], tmp_path / "model")
    file = next((tmp_path / "model").glob("model*.safetensors"))
    tensors = load_file(file)
    tensors["model.layers.3.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, file, metadata={"format": "pt"})
    return tmp_path / "model"


def test_other_weights_and_stale_calibrations_are_refused(
    reference: dict[str, Any], other: Path, tmp_path: Path
) -> None:
    changed = job(reference, model=str(other))
    refused(attempt(tmp_path, changed, **protected(reference)), tmp_path, "made for another checkpoint")
    # The right weights in another dtype are others, too.
    refused(attempt(tmp_path, job(reference, dtype="bfloat16"), **protected(reference)), tmp_path, "in another dtype")
    # Weights that come by a way on which they are not seen.
    refused(attempt(tmp_path, job(reference, load_format="dummy"), **protected(reference)), tmp_path, "not checked on their way in")  # fmt: skip


def test_a_wrong_base_is_refused(reference: dict[str, Any], other: Path, tmp_path: Path) -> None:
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 20}))
    refused(attempt(tmp_path, job(reference, model=str(other)), **protected(reference)), tmp_path, "The adapter fits 30 layers")  # fmt: skip


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"enable_lora": True}, "merge it into the checkpoint"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3,
                                 "rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.0}}, "Synthetic acceptance"),
    ],
)  # fmt: skip
def test_what_cannot_be_protected_is_refused(
    more: dict[str, Any], message: str, reference: dict[str, Any], tmp_path: Path
) -> None:
    refused(attempt(tmp_path, job(reference, **more), **protected(reference)), tmp_path, message)


def test_nan_in_a_layer_stops_the_engine(reference: dict[str, Any], tmp_path: Path) -> None:
    """Above the last gate layer: the scores of that step were finite, and its answer is not given either. Before it all was well."""
    prompts = of(reference, "harmful", "benign")[28:32]
    for layer in (8, 20):
        asked = round_of(prompts, 8)
        spoilt = {"engine": options(reference, worker_extension_cls="poison.Poison"), "rounds": [asked, asked], "poison": layer}  # fmt: skip
        done = attempt(tmp_path, spoilt, **protected(reference))
        refused(done, tmp_path, "The gate's score is NaN")
        (before,) = [line.partition("answered ")[2] for line in done.stdout.splitlines() if "answered [" in line]
        assert json.loads(before) == [p["answer"][:8] for p in prompts]


def test_a_graph_compiled_for_another_adapter_is_not_used() -> None:
    """vLLM names stored graphs by this hash; `Protected` puts the armament's digest into what is hashed."""
    code = (
        "from vllm.config import VllmConfig\n"
        "configs = [VllmConfig() for _ in range(3)]\n"
        "for config, digest in zip(configs, ('a', 'a', 'b')): config.additional_config['safegene'] = digest\n"
        "one, same, other = (config.compute_hash() for config in configs)\n"
        "assert one == same != other"
    )
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "more",
    [
        {"model_impl": "transformers", "hf_overrides": {}},
        *({"hf_overrides": {"architectures": [name]}} for name in (
            "LLaMAForCausalLM", "Ministral3ForCausalLM", "InternLM3ForCausalLM", "TeleChat3ForCausalLM", "GemmaForCausalLM")),
    ],
    ids=lambda more: more.get("model_impl") or more["hf_overrides"]["architectures"][0],
)  # fmt: skip
def test_what_has_no_protected_form_is_refused(more: dict[str, Any], reference: dict[str, Any], tmp_path: Path) -> None:
    """With SAFEGENE_ADAPTER set and no architecture of ours named."""
    refused(attempt(tmp_path, job(reference, **more), **protected(reference)), tmp_path, "has no protected form")


def test_a_forgotten_override_is_no_way_around(reference: dict[str, Any], tmp_path: Path) -> None:
    prompts = of(reference, "harmful")[:8] + of(reference, "benign")[:4]
    engine = options(reference)
    del engine["hf_overrides"]
    got = ask(tmp_path, {"engine": engine, "rounds": [round_of(prompts)]}, **protected(reference))
    assert compare(prompts, got["answers"][0]) == []


def named(reference: dict[str, Any], tmp_path: Path, architecture: str) -> dict[str, Any]:
    """A job on a model folder with adapter and calibration inside and a block in config.json that names them."""
    folder = tmp_path / "model"
    shutil.copytree(reference["model"], folder)
    shutil.copytree(hub.folder_of(reference["adapter"]), folder / "safegene")
    shutil.copy(reference["calibration"], folder / "safegene" / "calibration.safetensors")
    config = json.loads((folder / "config.json").read_text())
    block = {"architectures": [architecture], "safegene": {"adapter": "safegene"}}
    (folder / "config.json").write_text(json.dumps({**config, **block}))
    return job(reference, model=str(folder), hf_overrides={})


@pytest.mark.parametrize("architecture", ["SafeGeneLlamaForCausalLM", "LlamaForCausalLM"])
def test_a_model_folder_that_names_its_adapter(architecture: str, reference: dict[str, Any], tmp_path: Path) -> None:
    """Opt-in by config.json: adapter and calibration travel with the model, and protect it whatever architecture it names."""
    prompts = of(reference, "harmful")[:8] + of(reference, "benign")[:4]
    got = ask(tmp_path, {**named(reference, tmp_path, architecture), "rounds": [round_of(prompts)]})
    assert compare(prompts, got["answers"][0]) == []


def test_a_model_folder_without_a_protected_form_is_refused(reference: dict[str, Any], tmp_path: Path) -> None:
    refused(attempt(tmp_path, named(reference, tmp_path, "GemmaForCausalLM")), tmp_path, "SafeGeneGemmaForCausalLM")
