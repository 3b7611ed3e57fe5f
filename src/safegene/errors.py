"""What can go wrong, as a tree. Every message is one line that ends with the remedy.

SafegeneError
├── AttachError         the adapter does not fit this model, or protection could not be armed
│   └── DriftError      the model is further from the base than the adapter was trained for
├── GateError           the gate produced NaN, or lost its value, while serving: the call stops
├── CalibrationError    anchors, tokenizer or calibration file are unusable
├── AdapterFileError    an adapter folder is missing, truncated, tampered with or of a newer schema
├── ModelNotFoundError  a model name resolves to nothing
└── DataError           a data file is empty, malformed, or contains what it must not
"""


class SafegeneError(Exception):
    """Base of every error that a user can put right."""


class AttachError(SafegeneError):
    """The adapter does not fit the model; the model is left as it was."""


class DriftError(AttachError):
    """The model lies outside what the adapter was trained for."""


class UncalibratedWarning(UserWarning):
    """The adapter is armed with the base's thresholds on a model that is not the base: it will miss much."""


class GateError(SafegeneError):
    """The gate failed during a forward pass; output of that pass must not be used."""


class CalibrationError(SafegeneError):
    """Calibration is impossible, stale, or belongs to another checkpoint."""


class AdapterFileError(SafegeneError):
    """An adapter file is unreadable or not what its configuration promises."""


class ModelNotFoundError(SafegeneError):
    """No local folder, embedded model or hub repository has this name."""


class DataError(SafegeneError):
    """A data file is unusable for what it was given for."""
