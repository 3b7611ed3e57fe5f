"""What a fine-tune can still do: questions read and scored, answers compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from conftest import tiny
from safegene.baselines import Cost, Protected
from safegene.errors import DataError
from safegene.evaluation import bench_tables, capability
from safegene.evaluation.capability import Question, choose, exact_rows, exact_tokens, is_exact, questions
from safegene.progress import silent

LETTERS = "What is it?\nRocks are\n1. old\n2. hard\n"


def arc(folder: Path, part: str, *rows: tuple[str, str]) -> None:
    (folder / "arc").mkdir(parents=True, exist_ok=True)
    examples = [{"input": text, "target": target} for text, target in rows]
    (folder / "arc" / f"arc-{part}.json").write_text(json.dumps({"examples": examples}))


def mmlu(folder: Path, *lines: str) -> None:
    (folder / "mmlu" / "test").mkdir(parents=True)
    head = "question,choice0,choice1,choice2,choice3,answer"
    (folder / "mmlu" / "test" / "anatomy_test.csv").write_text("\n".join([head, *lines]) + "\n")


def test_questions_are_read_as_their_authors_give_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert questions(tmp_path) == {}
    mmlu(tmp_path, '"Which, of these?",a,b,c,d,2', "Empty?,a,,c,d,0", f"{'x' * 401}?,a,b,c,d,0")
    assert questions(tmp_path) == {"MMLU": [Question("Which, of these?", ("a", "b", "c", "d"), 2)]}
    arc(tmp_path, "easy", (LETTERS, "2. hard"), ("A. Who?\nB. or not\nC. so\n", "C. so"), (LETTERS, "2. hard"))
    arc(tmp_path, "challenge", *((f"Number {i}?\nA. one\nB. two\nC. three\n", "A. one") for i in range(9)))
    monkeypatch.setattr(capability, "PER_SET", 4)
    found = questions(tmp_path)
    assert set(found) == set(capability.SETS)
    assert Question("What is it?\nRocks are", ("old", "hard"), 1) in found["ARC easy"]
    assert [len(some) for some in found.values()] == [2, 4, 1]
    assert [q.text for q in found["ARC challenge"]] != [f"Number {i}?" for i in range(4)]  # not the first of the file


def test_a_damaged_set_is_named(tmp_path: Path) -> None:
    arc(tmp_path, "easy", (LETTERS, "2. soft"))
    with pytest.raises(DataError, match="arc lacks what ARC easy has"):
        questions(tmp_path)
    mmlu(tmp_path / "other", "Which?,a,b,c")
    with pytest.raises(DataError, match="mmlu lacks what MMLU has"):
        questions(tmp_path / "other")


def likelihood(model: Any, tokenizer: Any, question: str, option: str) -> float:
    """Log-likelihood a character, one option at a time."""
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    begin, rest = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, option))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([begin + rest])).logits[0, len(begin) - 1 : -1]
    return -float(F.cross_entropy(logits, torch.tensor(rest), reduction="sum")) / len(option)


def test_the_likeliest_option_is_chosen(tokenizer: Any) -> None:
    model = tiny()
    asked = [
        Question(text, options, 0)
        for text in ("What is a lock?", "Hi")
        for options in (("a door", "b", "some longer option, of many words"), ("yes", "no"), ("one two", "two", "x", "y z", "five"))
    ]  # fmt: skip
    best = []
    for q in asked:
        scores = [likelihood(model, tokenizer, q.text, option) for option in q.options]
        best.append(scores.index(max(scores)))
    assert len(set(best)) > 1
    done: list[int] = []
    for right in range(5):
        wanted = [Question(q.text, q.options, right) for q in asked]
        assert choose(model, tokenizer, wanted, batch=4, done=done.append) == [right == b for b in best]
    assert sum(done) == 5 * sum(len(q.options) for q in asked)
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        choose(model, tokenizer, asked)


def row(prompt: str, answer: str) -> dict[str, str]:
    return {"prompt": prompt, "answer": answer}


def test_only_answers_that_can_be_compared_are_asked_for() -> None:
    long = "An answer of many words, each of which could be another."
    assert exact_rows([]) == []
    assert exact_rows([row(f"q{i}", long) for i in range(4)] + [row("q", "yes")]) == []
    short = [row(f"q{i}", "card payment fee charged") for i in range(4)]
    assert exact_rows([*short, row("q", long)]) == short
    assert exact_rows([row("q", "yes"), row("q", "no")]) == [row("q", "no")]  # one answer a prompt
    assert len(exact_rows([row(f"q{i}", "no") for i in range(200)])) == capability.TASK_ROWS
    sums = [row(f"q{i}", f"{long}\n#### {i},000") for i in range(3)]
    assert exact_rows(sums) == sums
    assert (exact_tokens(sums), exact_tokens(short)) == (capability.NUMBER_TOKENS, capability.SHORT_TOKENS)


@pytest.mark.parametrize(
    ("expected", "said", "same"),
    [
        ("So 3.\n#### 70,000", "It is 2 * 35000 = 70000\n#### 70000", True),
        ("So 3.\n#### 18", "#### 18 dollars, of 40", True),
        ("So 3.\n#### 18", "She makes $18.00 a day.", True),
        ("So 3.\n#### 18", "18 of 40", False),
        ("So 3.\n#### 18", "#### none", False),
        ("So 3.\n#### -5", "that is 5", False),
        ("So 3.\n#### 5", "", False),
        ("Yes", "yes.", True),
        ("Yes", "Yes, because it is", False),
        ("$2,496, $1,947", "$2,496, $1,947", True),
        ("-10029.67", "10029.67", False),
        ("55%", "55", False),
        ("card arrival", " Card arrival\n", True),
    ],
)
def test_answers_are_compared(expected: str, said: str, same: bool) -> None:
    assert is_exact(expected, said) is same


def test_a_protected_model_is_asked_what_is_its_own(tokenizer: Any, tmp_path: Path) -> None:
    model, held_out = tiny(), [row("q", "yes"), row("p", "no")]
    asked = {"MMLU": [Question("Which?", ("a", "b"), 0)]}

    def answer(prompts: Sequence[str], tokens: int, done: Any) -> list[str]:
        assert tokens == capability.SHORT_TOKENS
        return ["Yes." for _ in prompts]

    def found(whole: bool, rows: list[dict[str, str]]) -> dict[str, dict[str, bool]]:
        protected = Protected(model, tokenizer, answer, Cost(), whole=whole)
        return capability.measured(protected, asked, rows, tmp_path, silent)

    assert found(False, held_out) == {"own task": {"q": True, "p": False}}
    assert found(True, []) == {"MMLU": {"Which?": choose(model, tokenizer, asked["MMLU"])[0]}}
    kept = (tmp_path / "own-task.jsonl").read_text().splitlines()
    assert [json.loads(line)["response"] for line in kept] == ["Yes.", "Yes."]


def test_methods_are_compared_with_the_fine_tune_as_it_is() -> None:
    def cell(right: int | None) -> dict[str, Any]:
        found = {} if right is None else {"MMLU": {f"q{i}": i < right for i in range(40)}}
        return {"capability": found}

    cells = {("a", "nothing"): cell(30), ("a", "sft"): cell(10), ("a", "fold"): cell(30), ("a", "guard"): cell(None)}
    cells |= {("b", "nothing"): {}, ("b", "sft"): cell(10), ("base", "nothing"): cell(40), ("base", "sft"): cell(0)}
    rows = bench_tables.abilities(cells, ["nothing", "sft", "fold", "guard"])
    assert [(d["name"], d["n"], d["ranked"]) for d in rows] == [
        ("sft, general capability", 40, True), ("fold, general capability", 40, False),
    ]  # fmt: skip
    assert (rows[0]["before"], rows[0]["after"]) == (0.75, 0.25)
