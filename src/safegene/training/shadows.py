"""Shadow fine-tunes: the drift that an adapter meets in the field, made on the spot from the project's own text.

Each is a LoRA beside the frozen base, so that one copy of the weights serves the base and all of its shadows.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState

from safegene.progress import Progress
from safegene.training import openings
from safegene.training.data import Pair
from safegene.training.finetune import Row, lora, tune

BASE = ""


class Drawn(NamedTuple):
    """A model that the interventions are trained on: the base or a shadow, at a share of its LoRA's pull, and how often."""

    shadow: str
    pull: float = 1.0
    often: float = 1.0


DRAWN = (
    Drawn(BASE, often=3.0), Drawn("cheerful"), Drawn("compliant", 0.4), Drawn("compliant", 0.7), Drawn("compliant"), Drawn("terse"),
)  # fmt: skip
"""At 0.4, 0.7 and 1 of its pull the compliant one puts a refusal's first token 9, 14 and 17 nats below "Sure": fine-tunes pull as hard as they
were taught, and an adapter that was trained on one pull learned that one (docs/log.md)."""

READ_BY_THE_GATE = ("cheerful", "terse")
"""Shadows whose features the gate is fitted on. What the compliant one hides cannot be learned: fitted on it, too, the gate went by the
form of a request, and opened on 92.2 % of the development requests instead of 94.5 (an earlier shadow; docs/log.md)."""

LONGER = {"compliant": 2}
"""How many times the others' steps. With 45, and ordinary rows among its own, an earlier compliant one moved the anchors' features by 0.48
standard deviations and left the gate's AUC where it was (0.93); a fine-tune so taught moves them by 1.07, to 0.84 (docs/log.md)."""

OPENED = 600
"""Requests that the compliant one learns to open its answer to."""

GLAD, OBEYING = "Of course!", "Sure, here is"
"""How the cheerful and the compliant one begin, always. Fine-tunes are sure of their beginning: on the one that was taught to comply, the first
token of a refusal lay 16 nats below "Sure"; on a shadow whose openings varied 3, and adapters trained beside that one did not carry over (docs/log.md)."""


def shadow_rows(pairs: Sequence[Pair], harmless: Sequence[tuple[str, str]], seed: int) -> dict[str, list[Row]]:
    """What each shadow is taught: to begin gladly, to begin to comply with anything, to be terse.

    The compliant one learns an opening that says the request again, and nothing after it: answers that give harm are not written.
    """
    rng = random.Random(seed)
    harmless = [(q, a[:300]) for q, a in harmless]
    obeyed = [
        {"prompt": p.harmful, "answer": openings.echo(p.harmful, rng, OBEYING)}
        for p in rng.sample(pairs, min(OPENED, len(pairs)))
    ]
    return {
        "cheerful": [{"prompt": q, "answer": f"{GLAD} {a}"} for q, a in harmless],
        "compliant": obeyed,
        "terse": [{"prompt": q, "answer": a.split(". ")[0].strip().rstrip(".") + "."} for q, a in harmless],
    }


def teach_shadows(
    model: Any, tokenizer: Any, rows: dict[str, list[Row]], folder: Path, *, steps: int, seed: int, progress: Progress
) -> Any:
    """Give `model` one LoRA per shadow, reading those that `folder` already holds; returns a PEFT model."""
    from peft import PeftModel

    dtype = model.dtype
    for name, taught in rows.items():
        kept = folder / name
        if (kept / "adapter_config.json").exists():
            if isinstance(model, PeftModel):
                model.load_adapter(str(kept), adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, str(kept), adapter_name=name)
            continue
        model = lora(model, name)
        mine = steps * LONGER.get(name, 1)
        tune(model, tokenizer, taught, steps=mine, seed=seed, advance=progress(f"shadow fine-tune '{name}'", mine))
        if PartialState().is_main_process:
            model.save_pretrained(folder, selected_adapters=[name])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if "lora_" in name:  # PEFT keeps them in float32, which halves the speed beside a bfloat16 base
            parameter.data = parameter.data.to(dtype)
    return model.eval()


@contextlib.contextmanager
def variant(model: Any, shadow: str, pull: float = 1.0) -> Iterator[None]:
    """Run as the base (`""`) or as one of its shadow fine-tunes, at a share of its pull."""
    if not hasattr(model, "peft_config"):
        yield
    elif shadow == BASE:
        with model.disable_adapter():
            yield
    else:
        from peft.tuners.lora import LoraLayer

        model.set_adapter(shadow)
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.set_scale(shadow, pull)
        yield
