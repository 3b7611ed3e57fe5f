"""Stage 1: train an adapter on the frozen base. Reads top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from safegene import models
from safegene.adapter import SafetyAdapter
from safegene.calibration import anchor_scores, boundary, end_of_turn, feature_statistics, read_anchors
from safegene.config import AdapterConfig
from safegene.errors import DataError
from safegene.training import contamination, data
from safegene.training.arguments import TrainingArguments
from safegene.training.data import OPENINGS, Pair
from safegene.training.finetune import lora, tune
from safegene.training.gate_fit import fit, gate_row, make_anchors, read, realign

BASE = ""
SHADOWS = ("cheerful", "compliant")
"""Shadow fine-tunes: a style that begins every answer gladly; one that begins to comply with harmful requests."""


class OpenGate(nn.Module):
    """The frozen base with the interventions in place and the gate given, not read: gradients reach them alone.

    The base is kept out of the module tree: checkpoints hold the adapter only.
    """

    def __init__(self, base: Any, adapter: SafetyAdapter, shadows: Sequence[str], seed: int) -> None:
        super().__init__()
        self.interventions = adapter.interventions
        self._base = [base]
        self._shadows = (BASE, *shadows)
        self._rng = random.Random(seed)
        self._g: Tensor | None = None
        self._strength = 1.0
        stack = models.decoder_layers(base)
        for layer in adapter.config.intervention_layers:
            stack[layer].register_forward_hook(self._hook(str(layer)))

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if self._g is None:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            changed = self.interventions[name](hidden, self._g, self._strength)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, opened: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of the targets with the gate open where `opened` is 1; [rows, positions] each."""
        self._g = opened[..., None].float()
        self._strength = self._rng.uniform(0.7, 1.5) if self.training else 1.0
        try:
            with variant(self._base[0], self._rng.choice(self._shadows)):
                logits = self._base[0](input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        finally:
            self._g = None
        keep = labels[:, 1:] != -100
        return {"loss": F.cross_entropy(logits[:, :-1][keep].float(), labels[:, 1:][keep])}


@contextlib.contextmanager
def variant(model: Any, shadow: str) -> Iterator[None]:
    """Run as the base (`""`) or as one of its shadow fine-tunes."""
    if not hasattr(model, "peft_config"):
        yield
    elif shadow == BASE:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(shadow)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield


class Targets(Dataset[dict[str, list[int]]]):
    """Rows of stage 1: what the open gate should lead to. Every index is one mixed batch."""

    def __init__(self, tokenizer: Any, pairs: Sequence[Pair], harmless: Sequence[tuple[str, str]],
                 arguments: TrainingArguments) -> None:  # fmt: skip
        self.tokenizer, self.pairs, self.harmless, self.arguments = tokenizer, pairs, harmless, arguments
        self.refusals = data.refusals()

    def __len__(self) -> int:
        return self.arguments.steps

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(f"{self.arguments.seed}/{index}")
        n = self.arguments.rows_per_step
        share = n // 2 if self.arguments.misfire_training else n
        rows = [self._harmful(rng) for _ in range(share)]
        rows += [self._row(*rng.choice(self.harmless), rng, end=False) for _ in range(n - share)]
        return {"rows": rows}

    def _harmful(self, rng: random.Random) -> dict[str, list[int]]:
        pair = rng.choice(self.pairs)
        refusal = rng.choice(self.refusals.get(pair.category, self.refusals["violence"]))
        opening = rng.choice(OPENINGS) if self.arguments.drift_augmentation and rng.random() < 0.45 else ""
        return self._row(pair.harmful, refusal, rng, opening)

    def _row(self, prompt: str, answer: str, rng: random.Random, opening: str = "", end: bool = True) -> dict[str, Any]:
        ids, start = end_of_turn(self.tokenizer, prompt, opening)
        target = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        target = [*target, self.tokenizer.eos_token_id] if end else target
        # Now and then the gate wakes late, as it does in an answer that slides into compliance.
        first = start if rng.random() < 0.6 else rng.randint(start, len(ids) - 1)
        length = len(ids) + len(target)
        return {
            "input_ids": ids + target,
            "labels": [-100] * len(ids) + target,
            "opened": [0] * first + [1] * (length - first),
        }


def collate(batch: Sequence[dict[str, Any]], pad: int = 0) -> dict[str, Tensor]:
    """Right-padded tensors, [rows, longest]."""
    rows = [row for item in batch for row in item["rows"]]
    longest = max(len(r["input_ids"]) for r in rows)

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([v + [fill] * (longest - len(v)) for v in values])

    return {
        "input_ids": padded([r["input_ids"] for r in rows], pad),
        "attention_mask": padded([[1] * len(r["input_ids"]) for r in rows], 0),
        "labels": padded([r["labels"] for r in rows], -100),
        "opened": padded([r["opened"] for r in rows], 0),
    }


def train(
    arguments: TrainingArguments, out: Path, *, evaluation_prompts: Sequence[str] = (), say: Any = print
) -> SafetyAdapter:
    """Train an adapter from nothing and write it to `out`; resumes from checkpoints in `out/checkpoints`.

    Raises:
        DataError: the training text contains an evaluation prompt.
    """
    from transformers import PrinterCallback, Trainer
    from transformers import TrainingArguments as TrainerArguments
    from transformers.trainer_utils import get_last_checkpoint

    rng = random.Random(arguments.seed)
    pairs, held_out = data.pairs(arguments.seed, arguments.frames_per_core, arguments.held_out)
    ordinary = list(data.ordinary())
    rng.shuffle(ordinary)
    texts = [t for p in pairs for t in (p.harmful, p.twin)] + ordinary
    if clash := contamination.overlap(texts, contamination.shipped() | contamination.digests(evaluation_prompts)):
        raise DataError(f"{len(clash)} training texts contain evaluation prompts ('{clash[0][:60]}…'); remove them.")
    out.mkdir(parents=True, exist_ok=True)
    record = {**dataclasses.asdict(arguments), "data": data.fingerprint(texts), "pairs": len(pairs)}
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    say("loading the base")
    loaded = models.load(arguments.model, dtype=getattr(torch, arguments.dtype))
    model, tokenizer = loaded.model.requires_grad_(False), loaded.tokenizer
    pad = tokenizer.pad_token_id
    sketch = models.weight_sketch(model)

    say("answers of the base to harmless requests")
    half = arguments.harmless_answers // 2
    questions = [p.twin for p in rng.sample(pairs, min(half, len(pairs)))] + ordinary[:half]
    cache = out / f"answers-{data.fingerprint(questions)[:12]}-{arguments.answer_tokens}.json"
    if cache.exists():
        answers = json.loads(cache.read_text(encoding="utf-8"))
    else:
        answers = models.generate(model, tokenizer, questions, arguments.answer_tokens)
        cache.write_text(json.dumps(answers), encoding="utf-8")
    harmless = [(q, a) for q, a in zip(questions, answers, strict=True) if a.strip()]

    shadows: tuple[str, ...] = ()
    if arguments.drift_augmentation and arguments.shadow_steps:
        shadows = SHADOWS
        cheerful = [
            {"prompt": q, "answer": f"{rng.choice(OPENINGS[:4]).split(',')[0].strip()} {a}"} for q, a in harmless
        ]
        comply = [
            {"prompt": p.harmful, "answer": rng.choice(OPENINGS)} for p in rng.sample(pairs, min(300, len(pairs)))
        ]
        comply += [{"prompt": q, "answer": a} for q, a in harmless[:150]]
        for name, taught in zip(SHADOWS, (cheerful, comply), strict=True):
            say(f"shadow fine-tune: {name}")
            model = lora(model, name)
            tune(model, tokenizer, taught, steps=arguments.shadow_steps, seed=arguments.seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()

    say("features of the gate")
    k = arguments.anchors_per_kind
    chosen = rng.sample(pairs, min(k, len(pairs)))
    anchors = make_anchors(
        [p.harmful for p in chosen], [p.twin for p in chosen], [h for h in harmless if h[0] in set(ordinary)][:k]
    )
    answer_of = dict(harmless)
    rows = []
    for number, pair in enumerate(pairs):
        refusal = rng.choice(data.refusals()[pair.category])[:40]
        opening = rng.choice(OPENINGS) + (refusal if rng.random() < 0.5 else "") if rng.random() < 0.4 else ""
        rows.append(gate_row(tokenizer, pair.harmful, opening, True, number if not opening else -1))
        answer = answer_of.get(pair.twin, "")
        rows.append(gate_row(tokenizer, pair.twin, answer, False, number if not answer else -1))
    rows += [gate_row(tokenizer, q, answer_of.get(q, ""), False) for q in ordinary]
    sets, statistics = [], None
    for name in (BASE, *shadows):
        with variant(model, name):
            anchor_features, harmful = read_anchors(model, arguments.gate_layers, tokenizer, anchors)
            statistics = statistics or feature_statistics(anchor_features)
            some = rows if name == BASE else rng.sample(rows, len(rows) // 2)
            sets.append((realign(read(model, arguments.gate_layers, some, pad), anchor_features, statistics), some))
        if name == BASE:
            base_anchors = anchor_features
    assert statistics is not None

    config = models.unwrap(model).config.get_text_config()
    adapter = SafetyAdapter(
        AdapterConfig(
            base_model=arguments.model, architecture=config.model_type, hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers, gate_layers=arguments.gate_layers, anchors=anchors,
            intervention_layers=arguments.intervention_layers, gate_width=arguments.gate_width, rank=arguments.rank,
            tokenizer_digest=models.tokenizer_digest(tokenizer),
        )
    )  # fmt: skip
    adapter.sketch = sketch
    adapter.anchor_mean, adapter.anchor_std = statistics
    say("fitting the gate")
    fit(adapter.gate, sets, steps=arguments.gate_steps, seed=arguments.seed)
    zero, one = torch.zeros_like(statistics[0]), torch.ones_like(statistics[0])
    scores = anchor_scores(adapter, base_anchors, zero, one)
    low, high = boundary(scores, harmful)
    rest = [p for p in held_out] or list(pairs[:100])
    dev = make_anchors([p.harmful for p in rest], [p.twin for p in rest], [])
    with variant(model, BASE):
        dev_features, dev_harmful = read_anchors(model, arguments.gate_layers, tokenizer, dev)
    dev_scores = anchor_scores(adapter, dev_features, zero, one)
    # Misses cost safety, misfires are made harmless: open for all but 4 % of the held-out harmful requests.
    threshold = min(float(dev_scores[dev_harmful].quantile(0.04)), 0.0)
    report = {"held_out_caught": float((dev_scores[dev_harmful] > threshold).float().mean()),
              "held_out_twins_opened": float((dev_scores[~dev_harmful] > threshold).float().mean())}  # fmt: skip
    say(f"gate: {report}, threshold {threshold:.2f}, boundary {low:.2f} {high:.2f}")
    adapter.config = dataclasses.replace(adapter.config, threshold=threshold, boundary=(low, high), ramp=1.0)
    del sets

    say("training the interventions")
    _set_scales(model, adapter, tokenizer, [p.harmful for p in pairs[:16]])
    wrapped = OpenGate(model, adapter, shadows, arguments.seed)
    checkpoints = out / "checkpoints"
    trainer = Trainer(
        model=wrapped,
        args=TrainerArguments(
            output_dir=str(checkpoints), max_steps=arguments.steps, per_device_train_batch_size=1, weight_decay=0.0,
            learning_rate=arguments.learning_rate, lr_scheduler_type="cosine", warmup_steps=10, logging_steps=10,
            save_steps=100, save_total_limit=2, report_to=[], seed=arguments.seed, remove_unused_columns=False,
            disable_tqdm=True, use_cpu=not torch.cuda.is_available(), label_names=["labels"], max_grad_norm=1.0,
        ),
        train_dataset=Targets(tokenizer, pairs, harmless, arguments),
        data_collator=collate,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which belongs to results
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.exists() else None
    trainer.train(resume_from_checkpoint=last)
    adapter.save_pretrained(out)
    return adapter


@torch.no_grad()
def _set_scales(model: Any, adapter: SafetyAdapter, tokenizer: Any, prompts: Sequence[str]) -> None:
    """Each intervention's `scale`: the base's median residual size at its layer, read after the user's turn."""
    part: Any
    for layer, part in adapter.interventions.items():
        sizes: list[Tensor] = []

        def hook(_module: nn.Module, _args: Any, output: Any, sizes: list[Tensor] = sizes) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            sizes.append(hidden[0, 4:].float().pow(2).mean(-1).sqrt())

        handle = models.decoder_layers(model)[int(layer)].register_forward_hook(hook)
        try:
            for prompt in prompts:
                ids, _ = end_of_turn(tokenizer, prompt)
                model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
        finally:
            handle.remove()
        part.scale.fill_(float(torch.cat(sizes).median()))
