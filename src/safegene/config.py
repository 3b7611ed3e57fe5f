"""`AdapterConfig`: what an adapter is made of, and its JSON form `safegene_config.json`."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from safegene.errors import AdapterFileError

SCHEMA_VERSION = 3
"""3: it carries its residuals on refusals, too, by which a fine-tune's are restored. 2: the adapter carries its anchors' features on the base, by which a fine-tune is realigned; 1 carried their mean and scale."""
CONFIG_NAME = "safegene_config.json"
WEIGHTS_NAME = "safegene_model.safetensors"

AnchorLabel = Literal["harmful", "twin", "ordinary"]


@dataclass(frozen=True)
class Anchor:
    """A labelled prompt that travels with the adapter and is read at attach time.

    `answer` is a harmless answer (ordinary prompts only): the gate has to stay shut through it. `refusal` is how the protected base
    begins to refuse it (harmful ones only, where it does).
    """

    text: str
    label: AnchorLabel
    answer: str = ""
    refusal: str = ""


@dataclass(frozen=True)
class AdapterConfig:
    """Shape, place and thresholds of a safety adapter.

    Layers count from 0; "layer l" means the residual stream after decoder layer l. Every intervention layer is at or
    above the last gate layer, so what the gate reads never depends on what the adapter did at the same position.
    """

    base_model: str
    architecture: str
    hidden_size: int
    num_layers: int
    gate_layers: tuple[int, ...]
    intervention_layers: tuple[int, ...]
    gate_width: int = 24
    rank: int = 16
    threshold: float = 0.0
    """τ of the gate on the base model, in units of the score (a logit)."""
    ramp: float = 1.0
    """w: the gate is fully open at threshold + ramp."""
    strength: float = 1.0
    """α on the base model."""
    boundary: tuple[float, float] = (-1.0, 1.0)
    """(b, h) of the anchors' scores on the base model (see `safegene.calibration.boundary`)."""
    refusals: tuple[str, ...] = ()
    """How the adapter's refusals begin; calibration looks for them, and for nothing else."""
    refused: float = 0.0
    """Share of the harmful anchors that the base refuses with the adapter, at `strength`; 0: not measured."""
    tokenizer_digest: str = ""
    anchors: tuple[Anchor, ...] = ()
    weights_sha256: str = ""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if not self.gate_layers or not self.intervention_layers:
            raise AdapterFileError("An adapter needs at least one gate layer and one intervention layer; set both.")
        for layers in (self.gate_layers, self.intervention_layers):
            if list(layers) != sorted(set(layers)):  # features are read in the order in which the layers run
                raise AdapterFileError(f"Layers {layers} must rise, each once; sort them.")
        if min(self.intervention_layers) < max(self.gate_layers):
            raise AdapterFileError(
                f"Intervention layers {self.intervention_layers} must not lie below the last gate layer "
                f"{max(self.gate_layers)}; move them up."
            )
        if not 0 <= min(self.gate_layers) <= max(self.intervention_layers) < self.num_layers:
            raise AdapterFileError(
                f"Layers {self.gate_layers} and {self.intervention_layers} do not fit a model of {self.num_layers} "
                "layers; choose layers below that number."
            )
        numbers = {k: getattr(self, k) for k in ("threshold", "ramp", "strength", "refused")}
        for name, value in numbers.items():
            if (
                not isinstance(value, int | float)
                or not math.isfinite(value)
                or (name in ("ramp", "strength") and value <= 0)
            ):
                above = " above 0" if name in ("ramp", "strength") else ""
                raise AdapterFileError(f"{name} is {value}; it must be a finite number{above}.")
        for name in ("hidden_size", "num_layers", "gate_width", "rank"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise AdapterFileError(f"{name} is {getattr(self, name)!r}; it must be a whole number above 0.")

    @property
    def read_layers(self) -> tuple[int, ...]:
        """Layers whose features calibration puts back: the gate's, then the interventions' (one may stand in both)."""
        return self.gate_layers + self.intervention_layers

    @property
    def restored_layers(self) -> tuple[int, ...]:
        """Layers at which a fine-tune's residual is led back (see `restoration`): the interventions' above the first, which has none below
        it to make up for, and the model's last, which settles what is said."""
        return tuple(sorted({*self.intervention_layers[1:], self.num_layers - 1}))

    @property
    def corrected_layers(self) -> tuple[int, ...]:
        """Layers after which the residual may be changed."""
        return tuple(sorted({*self.intervention_layers, *self.restored_layers}))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build from parsed JSON.

        Unknown keys come from a newer release and are dropped with a warning; a newer schema is refused.

        Raises:
            AdapterFileError: a key is missing, of the wrong type, or the schema is newer than this release.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - known):
            warnings.warn(f"{CONFIG_NAME}: ignoring unknown keys {unknown}; a newer safegene wrote them.", stacklevel=2)
        values = {key: value for key, value in data.items() if key in known}
        try:
            if int(values.get("schema_version", SCHEMA_VERSION)) < SCHEMA_VERSION:
                raise AdapterFileError(
                    f"{CONFIG_NAME} has schema {values['schema_version']}, this release reads {SCHEMA_VERSION}; train the "
                    "adapter again, or fetch a newer one."
                )
            if int(values.get("schema_version", SCHEMA_VERSION)) > SCHEMA_VERSION:
                raise AdapterFileError(
                    f"{CONFIG_NAME} has schema {values['schema_version']}, this release reads {SCHEMA_VERSION}; "
                    "upgrade safegene."
                )
            values["gate_layers"] = tuple(int(layer) for layer in values["gate_layers"])
            values["intervention_layers"] = tuple(int(layer) for layer in values["intervention_layers"])
            low, high = values.get("boundary", (-1.0, 1.0))
            values["boundary"] = (float(low), float(high))
            values |= {k: float(values[k]) for k in ("threshold", "ramp", "strength", "refused") if k in values}
            values["refusals"] = tuple(values.get("refusals", ()))
            values["anchors"] = tuple(Anchor(**anchor) for anchor in values.get("anchors", ()))
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise AdapterFileError(f"{CONFIG_NAME} is malformed ({error}); fetch the adapter again.") from error

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read `safegene_config.json`.

        Raises:
            AdapterFileError: the file is missing or not JSON.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise AdapterFileError(f"{path} does not exist; give a folder that holds {CONFIG_NAME}.") from error
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise AdapterFileError(f"{path} is not valid JSON ({error}); fetch the adapter again.") from error
        if not isinstance(data, dict):
            raise AdapterFileError(f"{path} holds no JSON object; fetch the adapter again.")
        return cls.from_dict(data)
