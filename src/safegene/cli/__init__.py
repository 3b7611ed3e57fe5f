"""The command line: one file a verb, each imported only when it runs."""

from __future__ import annotations

import importlib
import sys

VERBS = {
    "demo": "fine-tune a model on the spot, and measure it without and with the adapter",
    "models": "list the models and adapters that are here",
    "train": "train an adapter on a frozen base model",
    "serve": "answer over HTTP as OpenAI's API does, protected",
    "calibrate": "measure drift and write a calibration file for a fine-tune",
    "finetune": "make a fine-tune",
    "fold": "add safety to a fine-tune's weights: nothing to attach, no cost at inference",
    "results": "measure an adapter on its base and on fine-tunes, from public data sets",
    "eval": "measure a model's safety and over-refusal with SafetyEval",
    "judge": "judge kept answers, a run's or any tool's, or a judge against people",
    "report": "put runs of eval on one HTML page",
    "zoo": "build a declared set of fine-tunes of one base",
    "bench": "put the adapter and its rivals on the same fine-tunes",
}
_HELP = "usage: safegene VERB [options]\n\n{}\n\nsafegene VERB --help tells a verb's options; safegene --version the version."


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 fine, 1 failed or a threshold missed, 2 usage.

    Verbs are looked up before anything heavy is imported, so that --help answers at once.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] in (["--version"], ["-V"]):
        from safegene import __version__

        print(__version__)
        return 0
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_HELP.format("\n".join(f"  {verb:<10} {text}" for verb, text in VERBS.items())))
        return 0 if arguments else 2
    if arguments[0] not in VERBS:
        print(f"safegene: no verb '{arguments[0]}'; try one of {', '.join(VERBS)}.", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(f"safegene.cli.{arguments[0]}")
        from safegene.cli._run import run

        return run(arguments[0], module.command, arguments[1:])
    except KeyboardInterrupt:
        print(f"safegene {arguments[0]}: interrupted before it began.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
