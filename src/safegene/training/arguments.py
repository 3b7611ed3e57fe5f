"""What a training recipe (YAML) may say, with defaults that fit a 135M model on two cores."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from safegene.errors import DataError


@dataclass(frozen=True)
class TrainingArguments:
    """One adapter: its base, its shape, its data and its schedule."""

    model: str
    gate_layers: tuple[int, ...]
    intervention_layers: tuple[int, ...]
    gate_width: int = 32
    rank: int = 16
    dtype: str = "bfloat16"
    seed: int = 0
    pairs_file: str = ""
    """Pairs of your own beside the project's: JSONL with `category`, `harmful` and `twin` (see `own_text`)."""
    ordinary_file: str = ""
    """Everyday requests of your own beside the project's: JSONL with `text`."""
    frames_per_core: int = 3
    held_out: float = 0.08
    harmless_answers: int = 1400
    """How many harmless requests the base answers for us, half of them twins."""
    answer_tokens: int = 48
    long_answers: int = 400
    """How many of the ordinary ones at full length: the gate has to stay shut through an answer, not only at its start.
    Half of these are kept out of training and tell how often the gate opens on ordinary chats."""
    long_answer_tokens: int = 200
    shadow_steps: int = 45
    gate_steps: int = 3000
    twin_weight: float = 0.12
    """Weight of the twins in the gate's loss (see `gate_fit.fit`)."""
    misses: float = 0.02
    """Share of unseen harmful requests on which the gate may stay shut: sets the threshold on the base (ADR 3)."""
    probe_steps: int = 1000
    steps: int = 1000
    rows_per_step: int = 40
    learning_rate: float = 3e-3
    strength: float = 1.5
    """α on the base."""
    misfire_training: bool = True
    drift_augmentation: bool = True
    anchors_per_kind: int = 80

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        """Read a recipe.

        Raises:
            DataError: missing, not YAML, or with unknown or missing keys.
        """
        try:
            values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise DataError(f"{path} is no readable recipe ({str(error).splitlines()[0]}); see recipes/.") from error
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(values, dict) or (unknown := set(values) - known):
            raise DataError(
                f"{path} has unknown keys {sorted(unknown) if isinstance(values, dict) else ''}; see recipes/."
            )
        try:
            given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            arguments = cls(**given)
        except TypeError as error:
            raise DataError(f"{path} is incomplete ({error}); see recipes/.") from error
        arguments.check(path)
        return arguments

    def check(self, path: Path) -> None:
        """Raises:
        DataError: a value is of the wrong kind, or the layers cannot work together.
        """
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), _KINDS[str(field.type)]
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise DataError(f"{path}: {field.name} is {value!r}; it must be {str(field.type).split('[')[0]}.")
        for name, low in _AT_LEAST.items():
            if not getattr(self, name) >= low:
                raise DataError(f"{path}: {name} is {getattr(self, name)!r}; it must be at least {low}.")
        if not 0 < self.held_out < 1 or not 0 < self.misses < 1:
            raise DataError(f"{path}: held_out and misses are shares; give numbers between 0 and 1.")
        if not (self.learning_rate > 0 and self.strength > 0):
            raise DataError(f"{path}: learning_rate and strength must be above 0.")
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise DataError(f"{path}: dtype is {self.dtype}; use bfloat16, float16 or float32.")
        for layers in (self.gate_layers, self.intervention_layers):
            if (
                not layers
                or any(not isinstance(i, int) or i < 0 for i in layers)
                or list(layers) != sorted(set(layers))
            ):
                raise DataError(f"{path}: layers {layers} must be whole numbers that rise, each once.")
        if min(self.intervention_layers) < max(self.gate_layers):
            raise DataError(f"{path}: intervention layers {self.intervention_layers} lie below the gate; move them up.")


_AT_LEAST = {
    "gate_width": 1, "rank": 1, "frames_per_core": 1, "harmless_answers": 4, "answer_tokens": 1, "long_answers": 4, "long_answer_tokens": 1,
    "shadow_steps": 1, "gate_steps": 1, "probe_steps": 1, "steps": 1, "rows_per_step": 3, "anchors_per_kind": 1,
}  # fmt: skip

_KINDS: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "bool": bool, "tuple[int, ...]": tuple}
