"""SafeGene: a small safety adapter, trained once on a base model, attached to any fine-tune of it.

    adapter = safegene.SafetyAdapter.from_pretrained("smollm2-135m-instruct")
    handle = safegene.attach(model, adapter, tokenizer=tokenizer)

Public names load on first use: `import safegene` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safegene.adapter import SafetyAdapter
    from safegene.attach import Handle, attach, calibrate
    from safegene.baselines.fold import fold
    from safegene.calibration import Calibration
    from safegene.config import AdapterConfig, Anchor
    from safegene.errors import SafegeneError

__version__ = "0.1.0"
__all__ = [
    "AdapterConfig",
    "Anchor",
    "Calibration",
    "Handle",
    "SafegeneError",
    "SafetyAdapter",
    "attach",
    "calibrate",
    "fold",
]
_HOME = {
    "AdapterConfig": "config",
    "Anchor": "config",
    "Calibration": "calibration",
    "Handle": "attach",
    "SafegeneError": "errors",
    "SafetyAdapter": "adapter",
    "attach": "attach",
    "calibrate": "attach",
    "fold": "baselines.fold",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"safegene.{_HOME[name]}"), name)
        globals()[name] = value  # also puts the function, not its module, under `safegene.attach`
        return value
    raise AttributeError(f"module 'safegene' has no attribute {name!r}")
