"""Stage 1: train an adapter on the frozen base. Reads top to bottom."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safegene import models
from safegene.adapter import SafetyAdapter
from safegene.attach import Handle
from safegene.calibration import Calibration, anchor_scores, boundary, labelled
from safegene.config import AdapterConfig, Anchor, AnchorLabel
from safegene.errors import DataError
from safegene.features import at_prompt_end, end_of_turn, read_anchors
from safegene.gate import Gate
from safegene.outputs import write_whole
from safegene.progress import Progress, silent
from safegene.realignment import Realignment
from safegene.refusals import record, refused
from safegene.training import contamination, data, openings
from safegene.training.arguments import TrainingArguments
from safegene.training.card import model_card
from safegene.training.data import Pair
from safegene.training.finetune import Report, on_one_device
from safegene.training.gate_fit import ORDERS, GateFeatures, GateRow, fit, gate_rows, make_anchors, read, realign
from safegene.training.open_gate import OpenGate, realigned
from safegene.training.own_text import own_text
from safegene.training.shadows import BASE, DRAWN, READ_BY_THE_GATE, shadow_rows, teach_shadows, variant
from safegene.training.talks import hold
from safegene.training.targets import TARGET_FRAMES, Targets, collate

GATE_PAIRS = 11000
"""Pairs whose features the gate is fitted on: reading them is a fifth of a training's time."""

SHADOW_SHARE = 1 / 12
"""Share of the gate's rows that are read on each shadow, too: the variety of the text counts for more there."""

ANCHOR_ANSWER = 120
"""Characters of an ordinary anchor's answer: every attachment reads them."""

SAVE_STEPS = 50

LONGEST_STAGE = timedelta(hours=12)
"""How long one process may wait for another under `accelerate launch`."""

READING_RATE = 0.2
"""Learning rate of what an intervention reads, over that of what it writes. At 1 the probes were gone within some tens of steps, and in
two layers of four the wish fell to 1e-5 and below for every prompt: they did nothing; at 0.1 none did (docs/log.md)."""

PROBED_PAIRS, PROBED_ORDINARY = 2000, 300
"""Rows of the probes: a probe starts an intervention that has to tell the twins apart, and is trained further."""


def train(
    arguments: TrainingArguments, out: Path, *, evaluation_prompts: Sequence[str] = (), progress: Progress = silent
) -> SafetyAdapter:
    """Train an adapter from nothing and write it to `out`.

    Every stage keeps what it made in `out` and goes on from there: harmless answers, shadow fine-tunes, the gate's
    features, checkpoints of the interventions.

    Raises:
        DataError: the training text contains an evaluation prompt, or `out` holds a run with other settings.
    """
    rng = random.Random(arguments.seed)
    pairs, held_out = data.pairs(arguments.seed, arguments.frames_per_core, arguments.held_out)
    own = own_text(arguments.pairs_file, arguments.ordinary_file, arguments.held_out)
    if own.pairs:
        pairs, held_out = pairs + own.pairs, held_out + own.held_out
        rng.shuffle(pairs)  # the first of them become anchors and probes
    ordinary = [*data.ordinary(), *own.ordinary]
    rng.shuffle(ordinary)
    more, _ = data.pairs(arguments.seed + 1, TARGET_FRAMES, arguments.held_out)
    led = [c for c in data.conversations() if not data.is_held_out(" ".join(c.harmful), arguments.held_out)]
    texts = [t for p in pairs + more for t in (p.harmful, p.twin)] + ordinary
    texts += [turn for c in led for turn in (*c.harmful, *c.twin)]
    if clash := contamination.overlap(texts, contamination.shipped() | contamination.digests(evaluation_prompts)):
        raise DataError(f"{len(clash)} training texts contain evaluation prompts ('{clash[0][:60]}…'); remove them.")
    targets_said = [line for lines in data.refusals().values() for line in lines]  # checked before any work is done
    settings = {
        **asdict(arguments), "data": data.fingerprint(texts), "pairs": len(pairs),
        "targets": data.fingerprint([*targets_said, *openings.OPENINGS]),
    }  # fmt: skip
    # The first process makes what all of them read, and the others wait for it longer than they are wont to.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_STAGE)
    with state.main_process_first():
        _claim(out, json.loads(json.dumps(settings)))

    own_device = str(state.device) if state.num_processes > 1 else None
    loaded = models.load(arguments.model, dtype=getattr(torch, arguments.dtype), device=own_device)
    model, tokenizer = loaded.model, loaded.tokenizer
    config = models.unwrap(model).config.get_text_config()
    if max(arguments.intervention_layers) >= config.num_hidden_layers:
        raise DataError(
            f"the recipe names layer {max(arguments.intervention_layers)}; {arguments.model} has {config.num_hidden_layers}."
        )
    sketch = models.weight_sketch(model)
    with state.main_process_first():  # under `accelerate launch` the others read what the first has made
        harmless = _harmless_answers(model, tokenizer, pairs, ordinary, arguments, out / "answers.json", progress)
        talks = hold(model, tokenizer, led, out / "talks.json", arguments.seed, progress)
    model.requires_grad_(False)  # not before: see finetune.finetune
    taught = shadow_rows(pairs, harmless, arguments.seed) if arguments.drift_augmentation else {}
    model = teach_shadows(  # by all processes together: each of them is a Trainer's
        model, tokenizer, taught, out / "shadows", steps=arguments.shadow_steps, seed=arguments.seed, progress=progress,
    )  # fmt: skip

    # Anchors and the rows that set the threshold are unseen by the gate: on what it was fitted on it is too sure of itself.
    k, everyday = arguments.anchors_per_kind, set(ordinary)
    n, cores = min(k, len(pairs) // 8), list({p.core: p for p in pairs}.values())
    # Of every form, for a realignment knows what it has seen.
    orders = [p for p in cores if data.is_order(p.harmful)][: round(ORDERS * n)]
    chosen = orders + [p for p in cores if not data.is_order(p.harmful)][: n - len(orders)]
    pairs = [p for p in pairs if p.core not in {c.core for c in chosen}]
    chats = [(q, a) for q, a in harmless if q in everyday]
    unseen, chats = chats[: arguments.long_answers // 2], chats[arguments.long_answers // 2 :]
    anchors = make_anchors(
        [p.harmful for p in chosen], [p.twin for p in chosen], [(q, a[:ANCHOR_ANSWER]) for q, a in chats[:k]]
    )
    kept_out = {q for q, _ in unseen} | {q for q, _ in chats[:k]}
    ordinary = [q for q in ordinary if q not in kept_out]
    torch.manual_seed(arguments.seed)
    adapter = SafetyAdapter(
        AdapterConfig(
            base_model=arguments.model, architecture=config.model_type, hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers, gate_layers=arguments.gate_layers, anchors=anchors,
            intervention_layers=arguments.intervention_layers, gate_width=arguments.gate_width, rank=arguments.rank,
            tokenizer_digest=models.tokenizer_digest(tokenizer), strength=arguments.strength, refusals=data.REFUSALS,
        )
    )  # fmt: skip
    adapter.sketch = sketch
    once = {p.core: p for p in pairs}
    read_on = [*once.values(), *(p for p in pairs if once[p.core] is not p)]  # every core before a second frame of one
    rows = gate_rows(tokenizer, read_on[:GATE_PAIRS], ordinary, dict(harmless), rng, talks)
    dev = make_anchors([p.harmful for p in held_out], [p.twin for p in held_out], unseen)
    with state.main_process_first():
        _fit_gate(adapter, model, tokenizer, rows, dev, tuple(taught), arguments, out, progress)
    anchored = {c.core for c in chosen}
    targets = Targets(
        tokenizer, pairs + [p for p in more if p.core not in anchored], ordinary, harmless, arguments, talks
    )
    probe_rows = gate_rows(tokenizer, pairs[:PROBED_PAIRS], ordinary[:PROBED_ORDINARY], {}, None)
    _train_interventions(adapter, model, targets, probe_rows, tuple(taught), arguments, out, progress)
    adapter.cpu()  # the Trainer moved the interventions to its device; calibration is read beside them
    with variant(model, BASE):
        handle = Handle(model, adapter, Calibration.of_base(adapter))
        record(handle, tokenizer)
        adapter.config = replace(adapter.config, refused=refused(model, tokenizer, adapter.config))
        handle.detach()
    counts = {
        "pairs": len(pairs),
        "conversations": len(talks),
        "ordinary": len(ordinary),
        "refusals": len(targets_said),
        "own": own.rows,
    }
    report = json.loads((out / "gate.json").read_text(encoding="utf-8"))
    if state.is_main_process:
        adapter.save_pretrained(out, card=model_card(adapter, report, counts, len(taught)))
    return adapter


def _claim(out: Path, record: dict[str, Any]) -> None:
    """Write the resolved settings and data fingerprint to `out`, or check that they are those of the run there."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "training.json"
    try:
        there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else record
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); remove {out}, or give another --out.") from error
    if {k: there.get(k) for k in record} != record:
        raise DataError(f"{out} holds a run with other settings or other text; give another --out, or remove it.")
    if not path.exists():
        write_whole(path, json.dumps(record, indent=1) + "\n")


def _harmless_answers(
    model: Any, tokenizer: Any, pairs: Sequence[Pair], ordinary: Sequence[str], arguments: TrainingArguments,
    kept: Path, progress: Progress,
) -> list[tuple[str, str]]:  # fmt: skip
    """The base's own answers to ordinary requests and to twins: what a misfiring gate should lead to."""
    if kept.exists():
        return [(q, a) for q, a in json.loads(kept.read_text(encoding="utf-8"))]
    half = arguments.harmless_answers // 2
    rng = random.Random(arguments.seed)
    twins = [p.twin for p in rng.sample(pairs, min(half, len(pairs)))]
    long, short = list(ordinary[: arguments.long_answers]), list(ordinary[arguments.long_answers : half])
    found = []
    for questions, tokens in ((long, arguments.long_answer_tokens), (short + twins, arguments.answer_tokens)):
        advance = progress(f"the base's answers to harmless requests, {tokens} tokens", len(questions))
        answers = models.generate(model, tokenizer, questions, tokens, done=advance)
        found += [(q, a) for q, a in zip(questions, answers, strict=True) if a.strip()]
    write_whole(kept, json.dumps(found, ensure_ascii=False))
    return found


def _fit_gate(
    adapter: SafetyAdapter, model: Any, tokenizer: Any, rows: Sequence[GateRow], dev: Sequence[Anchor],
    shadows: Sequence[str], arguments: TrainingArguments, out: Path, progress: Progress,
) -> None:  # fmt: skip
    """Fit the gate on the base and its shadows, and set its threshold on unseen requests, on the base; or take what is kept."""
    layers, anchors = adapter.config.gate_layers, adapter.config.anchors
    if (out / "gate.json").exists():  # written last
        kept = load_file(out / "gate.safetensors")
        adapter.anchor_features = kept.pop("anchor_features")
        adapter.gate.load_state_dict(kept)
        report = json.loads((out / "gate.json").read_text(encoding="utf-8"))
        adapter.config = replace(adapter.config, threshold=report["threshold"], boundary=tuple(report["boundary"]))
        return
    sets: list[tuple[GateFeatures, Sequence[GateRow]]] = []
    for name in (BASE, *(s for s in shadows if s in READ_BY_THE_GATE)):
        some = rows if name == BASE else random.Random(name).sample(list(rows), int(len(rows) * SHADOW_SHARE))
        with variant(model, name):
            features = read_anchors(model, adapter.config.read_layers, tokenizer, anchors)
            if name == BASE:
                base_features = features
                adapter.anchor_features = at_prompt_end(features).half()
            advance = progress(f"the gate's features on {name or 'the base'}", len(some))
            found = read(model, layers, some, out / f"features-{name or 'base'}.safetensors", tokenizer, advance)
        realignment = Realignment.fit(at_prompt_end(features), adapter.anchor_features)
        sets.append((realign(found, realignment), some))
    advance = progress("fitting the gate", arguments.gate_steps)
    fit(
        adapter.gate, sets, steps=arguments.gate_steps, seed=arguments.seed, twin_weight=arguments.twin_weight,
        advance=advance,
    )  # fmt: skip

    boundary_of_base = boundary(anchor_scores(adapter.gate, base_features), anchors)
    with variant(model, BASE):
        features = read_anchors(model, adapter.config.read_layers, tokenizer, dev)
    scores = anchor_scores(adapter.gate, features)
    labels: tuple[AnchorLabel, ...] = ("harmful", "twin", "ordinary")
    of = {label: labelled(scores, dev, label) for label in labels}
    threshold = float(of["harmful"].quantile(arguments.misses))
    adapter.config = replace(adapter.config, threshold=threshold, boundary=boundary_of_base)
    report = {"threshold": threshold, "boundary": boundary_of_base} | {
        f"opened_{label}": {"n": len(s), "share": float((s > threshold).float().mean())} for label, s in of.items()
    }
    save_file({**adapter.gate.state_dict(), "anchor_features": adapter.anchor_features}, out / "gate.safetensors")
    write_whole(out / "gate.json", json.dumps(report, indent=1) + "\n")


def _train_interventions(
    adapter: SafetyAdapter, model: Any, targets: Targets, probe_rows: Sequence[GateRow], shadows: Sequence[str],
    arguments: TrainingArguments, out: Path, progress: Progress,
) -> None:  # fmt: skip
    from transformers import PrinterCallback, Trainer
    from transformers import TrainingArguments as TrainerArguments
    from transformers.trainer_utils import get_last_checkpoint

    with variant(model, BASE):
        _set_scales(model, adapter, targets.tokenizer, [p.harmful for p in targets.pairs[:16]])
        with PartialState().main_process_first():
            _start_at_probes(adapter, model, targets.tokenizer, probe_rows, arguments, out, progress)
    variants = {}
    for drawn in DRAWN:
        if drawn.shadow in (BASE, *shadows):
            with variant(model, drawn.shadow, drawn.pull):
                variants[drawn] = realigned(adapter, model, targets.tokenizer)
    checkpoints = out / "checkpoints"
    if not torch.cuda.is_available():  # on rows this short the fused kernel's backward costs a seventh of a step
        models.unwrap(model).set_attn_implementation("eager")
    trainer = Trainer(
        model=OpenGate(model, adapter, variants, targets.tokenizer.eos_token_id),
        optimizers=(optimiser(adapter, arguments.learning_rate), None),
        args=on_one_device(TrainerArguments(
            output_dir=str(checkpoints), max_steps=arguments.steps, per_device_train_batch_size=1,
            learning_rate=arguments.learning_rate, lr_scheduler_type="cosine", warmup_steps=10, logging_steps=10,
            save_steps=SAVE_STEPS, save_total_limit=2, report_to=[], seed=arguments.seed, remove_unused_columns=False,
            disable_tqdm=True, use_cpu=not torch.cuda.is_available(), label_names=["labels"], max_grad_norm=1.0,
        )),
        train_dataset=targets,
        data_collator=functools.partial(collate, pad=targets.tokenizer.pad_token_id or 0),
        callbacks=[Report(progress("training the interventions", arguments.steps))],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which belongs to results
    with PartialState().main_process_first():
        for folder in checkpoints.glob("checkpoint-*"):
            if not (folder / "trainer_state.json").exists():  # written last: this one was cut off
                shutil.rmtree(folder)
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.exists() else None
    trainer.train(resume_from_checkpoint=last)
    (out / "losses.json").write_text(json.dumps(trainer.state.log_history), encoding="utf-8")


def optimiser(adapter: SafetyAdapter, learning_rate: float) -> torch.optim.Optimizer:
    """What writes (B) at the full rate, what reads (A, a, w, u) slower: it starts at a probe, and d inputs move its features d
    entries at a time (compare LoRA+, arXiv 2402.12354)."""
    named = list(adapter.interventions.named_parameters())
    writes = [p for name, p in named if name.endswith(".up")]
    reads = [p for name, p in named if not name.endswith(".up")]
    groups: list[dict[str, Any]] = [{"params": writes}, {"params": reads, "lr": learning_rate * READING_RATE}]
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0.0)


def _start_at_probes(
    adapter: SafetyAdapter, model: Any, tokenizer: Any, rows: Sequence[GateRow], arguments: TrainingArguments, out: Path,
    progress: Progress,
) -> None:  # fmt: skip
    """Start every intervention's A, a, w and u at a probe that tells harmful requests from their twins at its layer.

    From a random A the interventions refused nothing after 250 steps: what tells a request from its twin is a small part of
    the residual (docs/log.md).
    """
    config = adapter.config
    advance = progress("the interventions' features on the base", len(rows))
    found = read(model, config.intervention_layers, rows, out / "features-probes.safetensors", tokenizer, advance)
    part: Any
    for index, part in enumerate(adapter.interventions.values()):
        probe = Gate(1, config.hidden_size, config.rank)
        one = GateFeatures(found.x[:, index : index + 1], found.row, found.place)
        advance = progress(f"probe at layer {config.intervention_layers[index]}", arguments.probe_steps)
        fit(probe, [(one, rows)], steps=arguments.probe_steps, seed=arguments.seed, twin_weight=1.0, advance=advance)
        with torch.no_grad():
            part.down.copy_(probe.weight[0])
            part.bias.copy_(probe.bias)
            part.wish.copy_(probe.out)
            part.wish_bias.fill_(float(probe.out_bias))


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
