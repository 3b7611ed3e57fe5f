"""Fine-tuning: makes the drifted models that users would have, and the shadow fine-tunes that training needs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback

from safegene.errors import DataError
from safegene.models import require_chat_template, unwrap
from safegene.outputs import prepare_folder
from safegene.progress import Advance, Progress, silent

Row = dict[str, str]
"""`prompt` and `answer`, plain text; `begun`, where there is one, already stands in the answer and is not learned."""


class ChatRows(Dataset[dict[str, list[int]]]):
    """Chats of one turn as token ids; only the answer is learned."""

    def __init__(self, tokenizer: Any, rows: Sequence[Row], longest: int = 256) -> None:
        if not rows:
            raise DataError("The data set is empty; give at least one row with prompt and answer.")
        require_chat_template(tokenizer)
        self.rows = []
        for row in rows:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
            )
            ids = tokenizer(prompt + row.get("begun", ""), add_special_tokens=False)["input_ids"]
            answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            ids, answer = ids[-longest // 2 :], answer[: longest - min(len(ids), longest // 2)]
            self.rows.append({"input_ids": ids + answer, "labels": [-100] * len(ids) + answer})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def collate(rows: Sequence[dict[str, list[int]]], pad: int = 0) -> dict[str, Tensor]:
    """Right-padded batch: input_ids, attention_mask, labels, [rows, longest]."""
    longest = max(len(r["input_ids"]) for r in rows)

    def padded(key: str, value: int) -> Tensor:
        return torch.tensor([r[key] + [value] * (longest - len(r[key])) for r in rows])

    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows])
    return {"input_ids": padded("input_ids", pad), "labels": padded("labels", -100), "attention_mask": mask}


class Report(TrainerCallback):
    """Tells `advance` about every optimiser step."""

    def __init__(self, advance: Advance) -> None:
        self.advance, self.told = advance, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(state.global_step - self.told)
        self.told = state.global_step


def on_one_device(arguments: Any) -> Any:
    """The Trainer's arguments, without DataParallel: beside several GPUs and no launcher, it would copy the model to each of them,
    the copies would have lost their hooks, and a step as many times the rows."""
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def tune(
    model: Any, tokenizer: Any, rows: Sequence[Row], *, steps: int, batch: int = 8, learning_rate: float = 5e-4,
    seed: int = 0, advance: Advance = lambda steps: None,
) -> Any:  # fmt: skip
    """Train whatever of `model` requires gradients on `rows`, in place, through transformers' Trainer.

    Args:
        batch: rows of a step, of all processes together.
    """
    from transformers import PrinterCallback, Trainer
    from transformers import TrainingArguments as TrainerArguments

    config, cached = unwrap(model).config, unwrap(model).config.use_cache
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=on_one_device(TrainerArguments(
                output_dir=scratch, max_steps=steps, per_device_train_batch_size=max(1, batch // PartialState().num_processes),
                learning_rate=learning_rate, lr_scheduler_type="cosine", warmup_steps=5, logging_steps=10, save_strategy="no",
                report_to=[], seed=seed, disable_tqdm=True, remove_unused_columns=False, use_cpu=not torch.cuda.is_available(),
            )),
            train_dataset=ChatRows(tokenizer, rows),
            data_collator=collate,
            callbacks=[Report(advance)],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)  # it prints to stdout, which belongs to results
        try:
            trainer.train()
        finally:
            config.use_cache = cached  # the Trainer turns it off and leaves it so: generation is then five times slower
    return model.eval()


def lora(model: Any, name: str = "default", rank: int = 16) -> Any:
    """Put a fresh LoRA on every linear layer; on a PEFT model, one more beside those it has."""
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        model.set_adapter(name)
        return model
    return get_peft_model(model, config, adapter_name=name)


def finetune(model: Any, tokenizer: Any, rows: Sequence[Row], out: Path | None, *, method: str = "lora",
             steps: int = 50, learning_rate: float = 5e-4, seed: int = 0, progress: Progress = silent) -> Any:  # fmt: skip
    """Fine-tune and return an ordinary transformers model (LoRA merged), saved to `out` when given.

    Interrupted, LoRA leaves `model` as it was; full fine-tuning leaves it where the last step took it.

    Raises:
        DataError: no rows, no chat template, or `out` cannot be written; said before any work, the model is as it was.
    """
    if out is not None:
        prepare_folder(out)
    ChatRows(tokenizer, rows[:1])  # says what is wrong with them before the model is touched
    torch.manual_seed(seed)
    advance = progress("fine-tuning", steps)
    if method == "lora":
        wrapped = lora(model)
        try:
            tune(wrapped, tokenizer, rows, steps=steps, learning_rate=learning_rate, seed=seed, advance=advance)
        except BaseException:  # Ctrl-C, too: the caller's model goes back without the half-taught LoRA
            thaw(wrapped.unload())
            raise
        model = wrapped.merge_and_unload()
    else:
        thaw(model)
        model = tune(model, tokenizer, rows, steps=steps, learning_rate=learning_rate / 10, seed=seed, advance=advance)
    # As from_pretrained gives it. On the CPU a frozen output layer is copied once a row when it reads the last position of a
    # batch (torch folds the product only where a gradient may be asked for): 40 answers began 2.5 seconds later.
    thaw(model)
    if out is not None:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    return model.eval()


def thaw(model: Any) -> None:
    """Ask for gradients wherever there can be any: quantised matrices are whole numbers."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
