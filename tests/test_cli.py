"""The verbs on tiny models, and the one line that each error is."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors import SafetensorError

from conftest import ANCHORS, random_adapter, tiny
from safegene import hub, models
from safegene.adapter import SafetyAdapter
from safegene.attach import attach
from safegene.baselines import Setting
from safegene.baselines.fold import layer_of
from safegene.baselines.method import matrices
from safegene.calibration import Calibration
from safegene.cli import VERBS, _run, main
from safegene.cli._run import GOES_ON
from safegene.errors import CalibrationError
from safegene.training import data
from test_training import SMALL

FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.fixture
def adapter(place: Path, tokenizer: Any) -> Path:
    """A random adapter of the base in `place`."""
    random_adapter(tiny(), tokenizer, anchors=ANCHORS).save_pretrained(place / "adapter")
    return place / "adapter"


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("work was begun")


@pytest.mark.parametrize("verb", VERBS)
def test_ctrl_c_is_one_line(verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"safegene.cli.{verb}.command", command)
    assert main([verb]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"safegene {verb}: interrupted; ")
    assert said.count("\n") == 1
    assert ("run the same command again to go on" in said) == (verb in GOES_ON)
    assert set(GOES_ON) < set(VERBS)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FULL, "No space left on device (os error 28); check path, permissions and free space."),
        (OSError("two\nlines"), "two lines; check path, permissions and free space."),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "a checkpoint could not be written"),
        (MemoryError(), "out of memory"),
    ],
)
def test_errors_of_the_machine_are_one_line(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise error

    monkeypatch.setattr("safegene.cli.finetune.command", command)
    assert main(["finetune"]) == 1
    found = capsys.readouterr().err
    assert said in found
    assert found.count("\n") == 1
    assert "kept" not in found  # a fine-tune keeps nothing


def test_a_log_says_when_each_stage_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with _run.progress_bars() as progress:
        progress("first", 3)(1)
        progress("second")
        said = capsys.readouterr().err.splitlines()  # at once, not when all is over
    assert [line.split(" ", 1)[1] for line in said] == ["first (3)", "second"]
    assert capsys.readouterr().err == ""


def test_a_screen_shows_the_last_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    monkeypatch.setattr(_run, "stderr", console)
    with _run.progress_bars() as progress:
        first = progress("stage a", 2)
        for name in "bcdefgh":
            progress(f"stage {name}", 1)(1)
        first(1)  # it has left the screen, and nothing breaks
    said = screen.getvalue()
    assert said.rindex("stage a") < said.index("stage h")
    assert said.rindex("stage e") > said.index("stage h")


def test_models_lists_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(set(row) == {"name", "kind", "state"} for row in found)
    assert [row["name"] for row in found] == [models.EMBEDDED, *hub.shipped()]
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found)
    assert lines[0].split()[:2] == ["model", models.EMBEDDED]


def test_train(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, ordinary = data.pairs(0, 1, 0.0)[0], data.ordinary()
    monkeypatch.setattr(data, "pairs", lambda *_: (pairs[:40], pairs[40:48]))
    monkeypatch.setattr(data, "ordinary", lambda *_: ordinary[:30])
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in SMALL.items()}
    recipe, out = place / "recipe.yaml", place / "trained"
    recipe.write_text(yaml.safe_dump({"model": str(place / "base"), **settings}))
    asked = ["train", "--config", str(recipe), "--out", str(out)]
    (place / "evaluation.jsonl").write_text(json.dumps({"prompt": pairs[3].harmful}))
    assert main([*asked, "--evaluation", str(place / "evaluation.jsonl")]) == 1
    assert "contain evaluation prompts" in capsys.readouterr().err
    assert not out.exists()
    assert main(asked) == 0
    assert capsys.readouterr().out.strip() == str(out)
    loaded = models.load(place / "base")
    attach(loaded.model, SafetyAdapter.from_pretrained(out), tokenizer=loaded.tokenizer, allow_drift=True).detach()


def test_finetune(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["finetune", "--data", str(place / "rows.jsonl"), "--model", str(place / "base"), "--steps", "2"]
    for method in ("lora", "full"):
        out = place / "new" / method
        assert main([*asked, "--out", str(out), "--method", method]) == 0
        assert capsys.readouterr().out.strip() == str(out)
        assert models.weights_digest(models.load(out).model) != models.weights_digest(tiny())

    def full(*_: Any, **__: Any) -> None:
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        assert main([*asked, "--out", str(place / "full")]) == 1
        assert "No space left on device" in capsys.readouterr().err

    monkeypatch.setattr(models, "load", never)
    (place / "taken").write_text("")
    for out, said in ((place / "taken", "is a file"), (Path("/proc/nowhere/model"), "cannot be written")):
        assert main([*asked, "--out", str(out)]) == 1
        assert said in capsys.readouterr().err
    assert main([*asked, "--out", str(place / "x"), "--method", "magic"]) == 1
    assert main(["finetune", "--data", str(place / "nothing.jsonl"), "--out", str(place / "x")]) == 1
    assert not (place / "x").exists()


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_fold(place: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("safegene.baselines.fold.Setting", functools.partial(Setting, examples=8, steps=2))
    for name, few in (("EXAMPLES", 4), ("STEPS", 2), ("CONTRAST_PROMPTS", 4)):
        monkeypatch.setattr(f"safegene.baselines.fold.{name}", few)

    def saved(name: str, noise: float) -> str:
        model = tiny()
        torch.manual_seed(3)
        with torch.no_grad():
            for weight in matrices(model).values():
                weight += noise * torch.randn_like(weight)
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
        return str(place / name)

    tuned, base, out = saved("tuned", 0.001), str(place / "base"), place / "new" / "folded"
    asked = ["fold", "--model", tuned, "--base", base, "--kept", str(place / "kept")]
    assert main([*asked, "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {"model": tuned, "base": base, "out": str(out)}.items() <= said.items()
    assert set(said["refuses"]) == {"aligned", "degraded"}
    assert len(said["layers"]) == 2  # two fifths of five
    before, after = (matrices(models.load(folder).model) for folder in (tuned, out))
    changed = {layer_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {int(layer) for layer, c in said["layers"].items() if c}
    assert changed

    with monkeypatch.context() as patch:
        patch.setattr("safegene.baselines.method.tune", never)  # the pair is there
        assert main([*asked, "--out", str(place / "again")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(place / "again")
    again = matrices(models.load(place / "again").model)
    assert all(torch.equal(again[name], weight) for name, weight in after.items())

    monkeypatch.setattr("safegene.baselines.method.tune", never)
    far = [
        "fold",
        "--model",
        saved("far", 1.0),
        "--base",
        base,
        "--kept",
        str(place / "kept"),
        "--out",
        str(place / "x"),
    ]
    assert main(far) == 1
    assert "give the base it was tuned from" in capsys.readouterr().err
    assert not (place / "x" / "config.json").exists()
    assert main(["fold", "--model", tuned, "--out", str(place / "x")]) == 2
    capsys.readouterr()
    monkeypatch.setattr(models, "load", never)
    (place / "taken").write_text("")
    for folder, why in (
        (place / "taken", "is a file"), (Path("/proc/nowhere/model"), "cannot be written"), (Path(tuned), "not written over"),
    ):  # fmt: skip
        assert main([*asked, "--out", str(folder)]) == 1
        error = capsys.readouterr().err
        assert why in error
        assert error.count("\n") == 1


def test_a_calibration_fits_the_dtype_it_was_made_in(
    place: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["calibrate", "--model", str(place / "base"), "--adapter", str(adapter), "--allow-drift"]
    out, gene = place / "new" / "c.safetensors", SafetyAdapter.from_pretrained(adapter)
    assert main([*asked, "--out", str(out), "--dtype", "bfloat16"]) == 0
    assert json.loads(capsys.readouterr().out)["calibrated"]
    half, whole = (models.load(place / "base", dtype=dtype).model for dtype in ("bfloat16", "float32"))
    assert half.dtype == torch.bfloat16
    attach(half, gene, calibration=Calibration.load(out), allow_drift=True).detach()
    with pytest.raises(CalibrationError, match="another checkpoint"):
        attach(whole, gene, calibration=Calibration.load(out), allow_drift=True)
    assert main([*asked, "--out", str(out)]) == 0  # the checkpoint's own
    attach(whole, gene, calibration=Calibration.load(out), allow_drift=True).detach()

    def full(*_: Any) -> None:
        raise FULL

    monkeypatch.setattr(Calibration, "save", full)
    assert main([*asked, "--out", str(out)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert main([*asked, "--out", str(out), "--dtype", "int8"]) == 1
    assert "use auto, bfloat16" in capsys.readouterr().err
    monkeypatch.setattr(models, "load", never)
    assert main([*asked, "--out", str(place)]) == 1
    assert "is a folder" in capsys.readouterr().err
