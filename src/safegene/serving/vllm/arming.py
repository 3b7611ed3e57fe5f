"""Which adapter, with which calibration, is armed on the model that is about to be served."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from safegene import hub
from safegene.adapter import SafetyAdapter
from safegene.calibration import Calibration
from safegene.errors import AttachError, CalibrationError, DriftError
from safegene.serving.vllm.plugin import ADAPTER, CALIBRATION

FILE = "calibration.safetensors"
"""The calibration's name beside the adapter, where no other was given."""


@dataclass(frozen=True)
class Armament:
    """An adapter and a calibration that belong together."""

    adapter: SafetyAdapter
    calibration: Calibration
    digest: str
    """SHA-256 of both files; what was compiled for another armament is not used for this one."""


def settings(hf_config: Any, model: str) -> tuple[str, Path]:
    """Adapter and calibration file: of the environment, else of the block {"safegene": {"adapter": …, "calibration": …}} in the
    model's config.json, whose paths count from the model's folder.

    Raises:
        AttachError: neither names an adapter.
    """
    said = {**(getattr(hf_config, "safegene", None) or {})}
    adapter, calibration = os.environ.get(ADAPTER, ""), os.environ.get(CALIBRATION, "")
    if not adapter:
        if not said.get("adapter"):
            raise AttachError(
                f'No adapter is named; set {ADAPTER}, or put a block "safegene" into the model\'s config.json.'
            )
        adapter = str(_inside(model, said["adapter"]))
        calibration = calibration or (str(_inside(model, said["calibration"])) if said.get("calibration") else "")
    return adapter, Path(calibration) if calibration else hub.folder_of(adapter) / FILE


def _inside(model: str, name: str) -> str | Path:
    """A path in the model's folder where there is one, else the name as it is."""
    path = Path(model) / name
    return path if path.exists() else name


def load(adapter: str, calibration: Path) -> Armament:
    """Read and check both.

    Raises:
        AdapterFileError: the adapter is missing, truncated or tampered with.
        CalibrationError: the calibration is unreadable, or was made for another adapter.
        DriftError: the gate has lost its way on the model that was calibrated.
    """
    with _plainly():
        gene, file = SafetyAdapter.from_pretrained(adapter), calibration
        found = Calibration.load(file)
    if found.adapter != gene.config.weights_sha256 or not found.fits(gene):
        raise CalibrationError("The calibration was made for another adapter; run safegene calibrate again.")
    if found.outside:
        raise DriftError(f"{found.outside}; retrain the adapter for this model.")
    digest = hashlib.sha256(gene.config.weights_sha256.encode() + file.read_bytes()).hexdigest()
    return Armament(gene, found, digest)


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """On the CPU in float32: vLLM makes models under its own default device and dtype, which would round the adapter."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def check_checkpoint(calibration: Calibration, digest: str) -> None:
    """Raises:
    CalibrationError: the weights are not those that were calibrated.
    """
    if calibration.checkpoint != digest:
        raise CalibrationError(
            "The calibration was made for another checkpoint, or for this one in another dtype; run safegene calibrate again."
        )
