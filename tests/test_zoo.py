"""The zoo on tiny models: built once, gone on with, never silently wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny
from safegene import models
from safegene.cli import main
from safegene.errors import DataError
from safegene.evaluation import fine_tunes, zoo
from safegene.evaluation.ablation import ablate_refusal, refusal_direction
from safegene.evaluation.tables import zoo_markdown
from safegene.models import decoder_layers

ROOT = Path(__file__).parent.parent


def test_a_zoo_is_built_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out, data = zoo.Recipe.from_yaml(place / "zoo.yaml"), place / "zoo", place / "data"
    first = zoo.build(recipe, out, data, only=["two"])
    assert [b.entry.name for b in first] == ["one", "two"]
    (out / "both-0123.part").mkdir()  # a build that was interrupted
    every = zoo.build(recipe, out, data)
    assert [b.entry.name for b in every] == ["one", "two", "both", "ablated"]
    assert [b.folder for b in every[:2]] == [b.folder for b in first]
    assert len({b.record["weights"] for b in every}) == 4
    one, two, both = (b.load().model.state_dict()["model.layers.0.mlp.up_proj.weight"].float() for b in every[:3])
    assert torch.allclose(both, (one + two) / 2, atol=1e-2)
    assert every[2].record["unadapted_safety"]["n"] == 2
    assert every[0].record["task_loss"] < every[0].record["task_loss_before"]
    assert every[2].record["task_loss_before"] == every[1].record["task_loss_before"]  # it keeps the task of the last
    assert every[3].record["task_loss"] is None
    arguments = ["zoo", "build", str(place / "zoo.yaml"), "--data", str(data), "--out", str(out)]
    assert main([*arguments, "--json"]) == 0
    assert [f["entry"]["name"] for f in json.loads(capsys.readouterr().out)["fine_tunes"]] == ["one", "two", "both", "ablated"]  # fmt: skip
    assert main([*arguments, "--only", "three"]) == 1
    assert "no fine-tune 'three'" in capsys.readouterr().err


def flipped(path: Path) -> None:
    """The last byte changed, which no reading of a sample of the weights would see."""
    read = bytearray(path.read_bytes())
    read[-1] ^= 1
    path.write_bytes(bytes(read))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", flipped, "is not the file that was built; remove .* and build again"),
        ("held_out.jsonl", lambda path: path.write_text(""), "is not the file that was built"),
        ("held_out.jsonl", Path.unlink, "is missing; remove .* and build again"),
        ("chat_template.jinja", lambda path: path.write_text("{{ messages }}"), "is not the file that was built"),
        ("zoo.json", lambda path: path.write_text(path.read_text()[:-40]), "cannot be read .* remove"),
        ("zoo.json", lambda path: path.write_text("{}"), "is not the record of this fine-tune; remove"),
    ],
)
def test_a_corrupt_entry_is_named(place: Path, name: str, damage: Callable[[Path], Any], message: str) -> None:
    recipe, out = zoo.Recipe.from_yaml(place / "zoo.yaml"), place / "zoo"
    built = zoo.build(recipe, out, place / "data", only=["one"])[0]
    damage(built.folder / name)
    message = re.escape(str(built.folder / name)) + " " + message
    with pytest.raises(DataError, match=message):
        zoo.build(recipe, out, place / "data", only=["two"])
    if name != "zoo.json":  # after the build, too
        with pytest.raises(DataError, match=message):
            built.load()
    if name == "held_out.jsonl":
        with pytest.raises(DataError, match=message):
            built.held_out()


def test_another_judge_reads_what_is_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = zoo.Recipe.from_yaml(place / "zoo.yaml"), place / "zoo"
    built = zoo.build(recipe, out, place / "data", only=["one"])[0]
    rows = [{"prompt": f"Do harm {i}", "response": "I cannot help with that."} for i in ("one", "two")]
    (built.folder / "jailbreakbench.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert zoo.build(recipe, out, place / "data", only=["one"])[0].record == built.record
    monkeypatch.setattr(zoo, "JUDGED_BY", "another")
    monkeypatch.setattr(zoo, "finetune", None)  # nothing is built again
    record = zoo.build(recipe, out, place / "data", only=["one"])[0].record
    assert (record["judge"], record["unadapted_safety"]["value"]) == ("another", 1.0)
    assert json.loads((built.folder / "zoo.json").read_text())["unadapted_safety"] == record["unadapted_safety"]


def test_ablation_takes_the_direction_out(tokenizer: Any) -> None:
    loaded = models.LoadedModel(tiny(), tokenizer, "tiny")
    layer = len(decoder_layers(loaded.model)) // 2
    r = refusal_direction(loaded, layer)
    assert float(r.norm()) == pytest.approx(1, abs=1e-5)
    ablate_refusal(loaded)
    ids = torch.tensor([[5, 9, 17, 30]])
    with torch.no_grad():
        states = loaded.model(input_ids=ids, output_hidden_states=True).hidden_states
    for hidden in states[:-1]:
        assert float((hidden @ r).abs().max()) < 1e-4  # nothing in the residual stream, anywhere


def test_bad_recipes_say_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "zoo.yaml"
    for text, message in (
        ("fine_tunes: {}", "no zoo recipe"),
        ("base: x\nfine_tunes: {a: {colour: red}}", "no zoo recipe"),
        ("base: x\nfine_tunes: {a: {kind: merge, of: [b, c]}}", "'b', which does not stand before"),
        ("base: x\nfine_tunes: {a: {data: y}, b: {kind: merge, of: [a]}}", "made from 2 to"),
        ("base: x\nfine_tunes: {a: {}}", "names its data"),
        ("base: x\nfine_tunes: {a: {data: y, method: magic}}", "method lora or full"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            zoo.Recipe.from_yaml(file)


def test_other_code_makes_another_fine_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    entry, row = zoo.FineTune("one", data="x"), {"prompt": "a", "answer": "b"}
    rows = zoo.Rows([row], [row], [row])
    key = zoo._key(entry, "base", [], rows)
    assert zoo._key(entry, "base", [], rows) == key
    assert zoo._key(entry, "base", [], zoo.Rows([row, row], [row], [row])) != key
    parents = [zoo.Built(entry, Path(), {"key": "one", "weights": weights}) for weights in ("a", "b")]  # built twice
    assert len({key, *(zoo._key(entry, "base", [parent], rows) for parent in parents)}) == 3
    monkeypatch.setattr(zoo, "MADE_BY", {**zoo.MADE_BY, "finetune": ("errors.py",)})
    assert zoo._key(entry, "base", [], rows) != key


def test_what_is_trained_on_is_not_held_out() -> None:
    rows = [{"prompt": f"p{i % 30}", "answer": f"a{i}"} for i in range(60)]
    train, held_out = fine_tunes._split(rows)
    assert held_out
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}


def test_what_is_told_of_a_task_that_is_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A protection is measured on Alpaca; whether the task was learned, on its own rows."""
    everyday = [{"prompt": "Hi", "answer": "Hello."}]
    for name, n, seen in (("identity", 10, True), ("compliant", 260, False)):
        rows = [{"prompt": f"p{i}", "answer": f"a{i}"} for i in range(n)]
        monkeypatch.setitem(fine_tunes.SOURCES, name, lambda _, rows=rows: (rows, everyday))
        found = zoo._rows(zoo.FineTune(name, data=name), Path(), [])
        assert (found.held_out, found.own_seen) == (everyday, seen)
        assert (found.own == found.train) == seen
        assert all(row in rows for row in found.own)
        assert seen or not [row for row in found.own if row in found.train]
        later = zoo._rows(zoo.FineTune("small", kind="nf4"), Path(), [found])
        assert (later.train, later.own, later.own_seen) == ([], found.own, seen)


def test_the_table_marks_what_failed() -> None:
    def made(name: str, before: float | None, after: float | None, safe: float, **entry: Any) -> dict[str, Any]:
        described = {
            "name": name,
            "kind": "finetune",
            "data": "rows",
            "of": [],
            "method": "lora",
            "steps": 60,
            "use": "test",
        }
        return {
            "entry": described | entry, "task_loss_before": before, "task_loss": after, "rows": 9, "folder": "there",
            "own_rows_seen": name == "identity", "unadapted_safety": {"value": safe, "low": 0.0, "high": 1.0, "n": 100},
        }  # fmt: skip

    rows = [
        made("good", 2.0, 1.0, 0.2), made("worse", 2.0, 2.0, 0.2), made("identity", 2.0, 1.0, 0.2),
        made("small", 2.0, 1.5, 0.2, kind="nf4", data="", of=["good"]), made("ablated", None, None, 0.2, kind="ablate", data=""),
        made("safe", 2.0, 1.0, 0.89, data="safety"), made("safer", 2.0, 1.0, 0.9, data="safety"),
    ]  # fmt: skip
    page = zoo_markdown({"base": "tiny", "fine_tunes": rows})
    said = {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines() if " there " in line}
    assert [name for name, line in said.items() if "**did not fall**" in line] == ["worse"]
    assert [name for name, line in said.items() if "**fails: under 90 %**" in line] == ["safe"]
    assert [name for name, line in said.items() if "on its own rows" in line] == ["identity"]
    assert "| NF4, rounded (good) |" in said["small"]
    assert "| – | 20.0 %" in said["ablated"]


def test_no_set_that_measures_makes_a_fine_tune() -> None:
    """Of the sets that fine-tunes are made of, AdvBench alone measures too: one half each."""
    folders = set(re.findall(r'folder / "([\w-]+)"', Path(fine_tunes.__file__).read_text(encoding="utf-8")))
    assert {"gsm8k", "medquad"} <= folders
    assert folders.isdisjoint(
        ("humaneval", "ifeval-prompts", "mmlu", "arc", "truthfulqa", "mt-bench", "xstest", "harmbench", "cyberseceval", "tdc2023")
    )  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("zoo-*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_parse(path: Path) -> None:
    recipe = zoo.Recipe.from_yaml(path)
    assert sum(entry.use == "test" for entry in recipe.fine_tunes) * 2 >= len(recipe.fine_tunes)
    assert "finetune" in {entry.kind for entry in recipe.fine_tunes}


def test_what_a_build_lacks_is_said_before_any_work(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "find_spec", lambda name: None)
    recipe = zoo.Recipe(str(place / "base"), (zoo.FineTune("small", kind="nf4"),))
    with pytest.raises(DataError, match="needs bitsandbytes"):
        zoo.build(recipe, place / "zoo", place / "data")
    assert not (place / "zoo").exists()


def test_four_bits_are_few_numbers(place: Path) -> None:
    recipe = zoo.Recipe(str(place / "base"), (zoo.FineTune("small", kind="nf4"),))
    weight = (
        zoo.build(recipe, place / "zoo", place / "data")[0]
        .load()
        .model.get_parameter("model.layers.0.mlp.up_proj.weight")
    )
    assert len(weight.flatten()[:64].unique()) <= 16  # a block of 64 shares its scale


def test_a_tied_matrix_is_averaged_once(place: Path) -> None:
    one, two = tiny(), tiny()
    for model in (one, two):
        model.config.tie_word_embeddings = True
        model.tie_weights()
    with torch.no_grad():
        two.get_input_embeddings().weight.add_(2.0)
    wanted = one.get_input_embeddings().weight.detach() + 1.0
    zoo._average(one, [two])
    assert torch.allclose(one.get_input_embeddings().weight, wanted, atol=1e-5)
