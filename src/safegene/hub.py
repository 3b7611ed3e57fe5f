"""Adapter files: a folder with `safegene_config.json`, `safegene_model.safetensors` and `README.md`.

Not PEFT's names on purpose: transformers would load an `adapter_config.json` through PEFT and drop the gate in silence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from safegene.config import CONFIG_NAME, WEIGHTS_NAME, AdapterConfig
from safegene.errors import AdapterFileError

if TYPE_CHECKING:
    from safegene.adapter import SafetyAdapter

A = TypeVar("A", bound="SafetyAdapter")
SETTINGS = "settings"
"""Key of the settings' digest in the header of the weights file, which the configuration's own digest covers."""
HALF = {"anchor_features": torch.float16, "residuals": torch.bfloat16}
"""What is only compared with takes half the space; features are normalised, residuals may be of any size."""
SHIPPED = Path(__file__).parent / "adapters"


def shipped() -> list[str]:
    """Names of the adapters inside this package."""
    return sorted(p.parent.name for p in SHIPPED.glob(f"*/{CONFIG_NAME}"))


def folder_of(name: str | Path, revision: str | None = None) -> Path:
    """Local folder, shipped name or hub id → folder.

    Raises:
        AdapterFileError: nothing of that name can be had.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if str(name) in shipped():
        return SHIPPED / str(name)
    if str(name).count("/") == 1 and not str(name).startswith((".", "~", "/")):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(str(name), revision=revision, allow_patterns=["safegene_*", "README.md"]))
        except (OSError, ValueError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise AdapterFileError(
                f"{name}: the hub did not give this adapter ({first}); check id and network."
            ) from error
    raise AdapterFileError(f"{name}: no such adapter; give a folder, a hub id or one of {', '.join(shipped())}.")


def settings_digest(config: AdapterConfig) -> str:
    """SHA-256 of everything in the configuration but the digest of the weights."""
    said = {k: v for k, v in config.to_dict().items() if k != "weights_sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def save_adapter(adapter: SafetyAdapter, folder: Path, card: str | None = None) -> AdapterConfig:
    """Write the adapter; returns its config with the weights' digest filled in.

    Raises:
        AdapterFileError: the weights hold NaN, or the disk does not take them.
    """
    tensors = {k: v.detach().to(HALF.get(k, torch.float32)).cpu().contiguous() for k, v in adapter.state_dict().items()}
    if bad := [k for k, v in tensors.items() if not torch.isfinite(v).all()]:
        raise AdapterFileError(f"{bad[0]} holds NaN or infinity; lower the learning rate and train again.")
    data = save(tensors, metadata={SETTINGS: settings_digest(adapter.config)})
    config = dataclasses.replace(adapter.config, weights_sha256=hashlib.sha256(data).hexdigest())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WEIGHTS_NAME).write_bytes(data)
        (folder / CONFIG_NAME).write_text(config.to_json(), encoding="utf-8")
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise AdapterFileError(f"{folder}: cannot write ({error}); free space or choose another folder.") from error
    adapter.config = config
    return config


def load_adapter(name: str | Path, cls: type[A], *, revision: str | None = None) -> A:
    """Read and check an adapter.

    Raises:
        AdapterFileError: missing, truncated, tampered with, NaN, or not what its config promises.
    """
    folder = folder_of(name, revision)
    config = AdapterConfig.from_file(folder / CONFIG_NAME)
    weights = folder / WEIGHTS_NAME
    if not weights.exists():
        raise AdapterFileError(f"{weights} does not exist; fetch the adapter again.")
    if hashlib.sha256(weights.read_bytes()).hexdigest() != config.weights_sha256:
        raise AdapterFileError(f"{weights} is truncated or was changed (SHA-256 differs); fetch the adapter again.")
    try:
        tensors = load_file(weights)
        with safe_open(weights, framework="pt") as file:
            settings = (file.metadata() or {}).get(SETTINGS)
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{weights} cannot be read ({error}); fetch the adapter again.") from error
    if settings != settings_digest(config):  # a threshold that was raised would switch protection off
        raise AdapterFileError(f"{folder / CONFIG_NAME} holds other settings than were saved; fetch the adapter again.")
    adapter = cls(config)
    for name in ("sketch", "residuals"):  # as many as there are
        if name in tensors:
            setattr(adapter, name, torch.zeros_like(tensors[name]))
    try:
        adapter.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise AdapterFileError(f"{weights} does not fit {CONFIG_NAME} ({reason}); fetch it again.") from error
    if not adapter.sketch.numel():  # without it any model of this shape would pass for a fine-tune of the base
        raise AdapterFileError(f"{weights} holds no sketch of its base; fetch the adapter again.")
    if any(not torch.isfinite(t).all() for t in tensors.values()):
        raise AdapterFileError(f"{weights} holds NaN or infinity; fetch the adapter again.")
    return adapter.eval().requires_grad_(False)


def load_config(name: str | Path) -> AdapterConfig:
    """Only the configuration of an adapter (see `folder_of` for names)."""
    return AdapterConfig.from_file(folder_of(name) / CONFIG_NAME)
