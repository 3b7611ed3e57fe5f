"""The frozen base with the interventions that are trained, and the loss of a batch."""

from __future__ import annotations

import copy
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache

from safegene import models
from safegene.adapter import SafetyAdapter, intervene
from safegene.calibration import fold_gate, settle
from safegene.features import read_anchors
from safegene.gate import FoldedGate, open_hard
from safegene.realignment import Realignment
from safegene.training.shadows import Drawn, variant

END_WEIGHT = 0.5
"""Weight of a refusal's end beside the mean of its tokens."""

HARMLESS_WEIGHT = 1.2
"""Weight of the harmless rows' divergence beside the harmful rows' cross-entropy."""


class Variant(NamedTuple):
    """What the adapter reads through on the base or on a shadow: the gate as an attachment would fold it, and the realignment,
    which is folded anew into the interventions' matrices at every step, for they learn."""

    gate: FoldedGate
    realignment: Realignment


def realigned(adapter: SafetyAdapter, model: Any, tokenizer: Any) -> Variant:
    """The model as it stands, base or shadow."""
    features = read_anchors(model, adapter.config.read_layers, tokenizer, adapter.config.anchors)
    calibration, realignment = settle(adapter, features)
    device = next(model.parameters()).device
    return Variant(fold_gate(adapter, calibration).to(device), realignment.to(device))


class OpenGate(nn.Module):
    """The frozen base, or one of its shadows, with interventions and gate in place. Gradients reach the interventions alone.

    Where a row says so the gate's value is given, not read: a misfire and a late opening have to be seen to be trained.
    The base is kept out of the module tree: checkpoints hold the adapter only.
    """

    def __init__(self, base: Any, adapter: SafetyAdapter, variants: dict[Drawn, Variant], eos: int) -> None:
        super().__init__()
        self.interventions = adapter.interventions
        self._eos = eos
        self._base, self._layers = [base], len(adapter.config.gate_layers)
        self._variants = variants
        self._given: Tensor | None = None
        self._variant, self._strength = next(iter(variants)), 1.0
        self._inner: Tensor | None = None
        self._g, self._lowest = torch.empty(0), torch.empty(0)
        stack = models.decoder_layers(base)
        for index, layer in enumerate(adapter.config.gate_layers):
            stack[layer].register_forward_hook(self._gate_hook(index))
        for index, layer in enumerate(adapter.config.intervention_layers, self._layers):
            stack[layer].register_forward_hook(self._hook(str(layer), index))

    def _drawn(self, share: float) -> Drawn:
        """The model at `share` of the weights laid end to end."""
        ends = list(itertools.accumulate(drawn.often for drawn in self._variants))
        return next(drawn for drawn, end in zip(self._variants, ends, strict=True) if share * ends[-1] < end)

    def _gate_hook(self, index: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if self._given is None:
                return
            hidden = output[0] if isinstance(output, tuple) else output
            gate = self._variants[self._variant].gate.to(hidden.device)
            self._inner = gate.partial(hidden, index, self._inner if index else None)
            if index == self._layers - 1:
                self._g = torch.where(self._given < 0, open_hard(gate.opening(self._inner)), self._given)

        return hook

    def _hook(self, name: str, index: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if self._given is None:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            if index == self._layers:
                self._lowest = hidden.detach()
            part: Any = self.interventions[name]
            realignment = self._variants[self._variant].realignment.to(hidden.device)
            folded = realignment.fold(index, part.down, part.bias)
            changed = intervene(hidden, self._g, part.correction(*folded, self._strength))
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    def _hidden(
        self, input_ids: Tensor, attention_mask: Tensor, start: int, given: Tensor, harmless: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Last hidden states from position `start` on, [rows, positions − start, d]: of all rows with the interventions, and
        of the harmless ones without. Up to the first intervention the two are the same: that part runs once."""
        base = self._base[0]
        decoder, stack = models.unwrap(base).get_decoder(), models.decoder_layers(base)
        # Every chat begins with the template's same tokens: they are read once, and no gradient reaches them.
        with torch.no_grad():
            prefix = base(input_ids=input_ids[:1, :start], use_cache=True, logits_to_keep=1).past_key_values
        cache = copy.deepcopy(prefix)
        cache.batch_repeat_interleave(len(input_ids))
        above = stack[min(map(int, self.interventions)) + 1 :]
        seen: list[dict[str, Any]] = []

        def see(_module: nn.Module, _args: Any, options: dict[str, Any]) -> None:
            seen.append(options)  # mask and positions, which differ from layer to layer in some architectures

        hooks = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in above]
        self._given = given
        try:
            adapted: Tensor = decoder(
                input_ids=input_ids[:, start:], attention_mask=attention_mask, past_key_values=cache
            ).last_hidden_state
        finally:
            self._given = None
            for hook in hooks:
                hook.remove()
        if not bool(harmless.any()):
            return adapted[:, :-1], adapted[:0, :-1]
        with torch.no_grad():
            own = self._lowest[harmless]
            prefix.batch_repeat_interleave(len(own))
            for layer, options in zip(above, seen, strict=True):
                mine = {k: _of_rows(v, harmless, prefix) for k, v in options.items() if k != "hidden_states"}
                found = layer(own, **mine)
                own = found[0] if isinstance(found, tuple) else found
            own = (decoder.norm if hasattr(decoder, "norm") else decoder.final_layer_norm)(own)
        return adapted[:, :-1], own[:, :-1]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, opened: Tensor, harmful: Tensor, draw: Tensor
    ) -> dict[str, Tensor]:
        """Harmful rows: cross-entropy of the refusal. Harmless rows: KL divergence from the same model without adapter, so
        that a misfire leads a fine-tune to its own answer and not to the base's.

        Args:
            labels: tokens of the answer, −100 elsewhere, [rows, positions].
            opened: 1 gate open, 0 shut, −1 as it reads, [rows, positions].
            harmful: [rows], bool.
            draw: [batches, 2]: which of the models, as a share in [0, 1) of their weights, and α. Part of the batch, so that a
                training that goes on after a kill draws what an unbroken one would have drawn.
        """
        base, start = self._base[0], common_prefix(input_ids, opened)
        share, strength = draw[0].tolist()
        self._variant = self._drawn(share)
        self._strength = strength if self.training else 1.0
        head = models.unwrap(base).get_output_embeddings()
        keep = labels[:, start + 1 :] != -100
        first = keep & (labels[:, start:-1] == -100)  # the first token settles whether the answer refuses
        with variant(base, self._variant.shadow, self._variant.pull):
            given = opened[:, start:, None].float()
            hidden, own = self._hidden(input_ids, attention_mask, start, given, ~harmful)
            loss = torch.zeros((), device=hidden.device)
            if bool(harmful.any()):
                at = keep & harmful[:, None]
                each = F.cross_entropy(head(hidden[at]).float(), labels[:, start + 1 :][at], reduction="none")
                loss = loss + each.mean() + each[first[at]].mean()
                ends = labels[:, start + 1 :][at] == self._eos  # a refusal that does not end goes on in circles
                loss = loss + END_WEIGHT * each[ends].mean() if bool(ends.any()) else loss
            if not bool(harmful.all()):
                rest = ~harmful
                with torch.no_grad():
                    wanted = head(own[keep[rest]]).float().log_softmax(-1)
                at = keep & rest[:, None]
                got = head(hidden[at]).float().log_softmax(-1)
                apart = F.kl_div(got, wanted, log_target=True, reduction="none").sum(-1)
                loss = loss + HARMLESS_WEIGHT * (apart.mean() + apart[first[at]].mean())
        return {"loss": loss}


def _of_rows(value: Any, rows: Tensor, cache: Cache) -> Any:
    """What a decoder layer is given, for some of the rows: masks and positions that have a row each are cut down."""
    if isinstance(value, Cache):
        return cache
    if isinstance(value, Tensor) and value.ndim > 1 and len(value) == len(rows):
        return value[rows]
    return tuple(_of_rows(v, rows, cache) for v in value) if isinstance(value, tuple) else value


def common_prefix(input_ids: Tensor, opened: Tensor) -> int:
    """Number of leading positions, at least 1, that hold the same token in every row and a shut gate; [rows, positions]."""
    differs = ((input_ids != input_ids[:1]) | (opened > 0)).any(0)
    return max(1, int(differs.int().argmax()) if bool(differs.any()) else input_ids.shape[1] - 1)
