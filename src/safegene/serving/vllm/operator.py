"""Gate and intervention as operators: opaque to `torch.compile`, captured by CUDA graphs, the core's own functions inside.

vLLM carries the residual stream as two tensors whose sum it is: what the last block wrote (`hidden`) and all before it
(`residual`); the next norm adds them. Rows are the tokens of all requests of a step, [tokens, d].

The gate's value goes up the layers of one pass in buffers of fixed address. There is nothing else to remember, of a request or
between passes, so it does not matter how the scheduler cuts, mixes, preempts or recomputes requests.

`torch.library.custom_op` would do the same through several more layers of Python, six times a decoding step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safegene.adapter import Correction, intervene
from safegene.gate import FoldedGate, open_hard

_library = torch.library.Library("safegene", "DEF")


def read_gate(
    hidden: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, out: Tensor, out_bias: Tensor, inner: Tensor, g: Tensor,
    first: bool, last: bool,
) -> None:  # fmt: skip
    """One gate layer: adds its share to `inner`; the last one turns the sum into `g`.

    Args:
        hidden, residual: [tokens, d].
        weight: this layer's [width, d]; bias, out, out_bias: the folded gate's.
        inner, g: buffers [most tokens, width] and [most tokens, 1], float32; their first rows are written.
        first, last: this layer's place among the gate layers.
    """
    rows = hidden.shape[0]
    gate = FoldedGate((weight,), bias, out, out_bias)
    total = gate.partial(hidden + residual, 0, None if first else inner[:rows])
    if last:
        g[:rows] = open_hard(gate.opening(total))
    else:
        inner[:rows] = total


def turn(
    hidden: Tensor, residual: Tensor, g: Tensor, down: Tensor, bias: Tensor, up: Tensor, wish: Tensor, wish_bias: Tensor,
    strength: Tensor, lead: Tensor, back: Tensor, offset: Tensor,
) -> None:  # fmt: skip
    """One intervention, in place.

    Where the gate is open, the corrected stream stands in `hidden` and 0 in `residual`: their sum is, in every dtype, exactly what
    the core returned, which a difference added to `hidden` would not give. Where it is shut, neither is written.
    """
    opened = g[: hidden.shape[0]]
    weights = Correction(down, bias, up, wish, wish_bias, strength, lead, back, offset)
    if hidden.device.type == "cpu":
        # One look at where it is open is cheaper than adding nothing there; elsewhere it would wait for the device.
        at = (opened[:, 0] > 0).nonzero()[:, 0]
        if len(at):
            hidden[at] = intervene(hidden[at] + residual[at], opened[at], weights)
            residual[at] = 0
        return
    where = opened > 0
    hidden.copy_(torch.where(where, intervene(hidden + residual, opened, weights), hidden))
    residual.masked_fill_(where, 0)


_library.define(
    "read_gate(Tensor hidden, Tensor residual, Tensor weight, Tensor bias, Tensor out, Tensor out_bias, Tensor(a!) inner, "
    "Tensor(b!) g, bool first, bool last) -> ()"
)
_library.define(
    "turn(Tensor(a!) hidden, Tensor(b!) residual, Tensor g, Tensor down, Tensor bias, Tensor up, Tensor wish, Tensor wish_bias, "
    "Tensor strength, Tensor lead, Tensor back, Tensor offset) -> ()"
)
for _name, _function in (("read_gate", read_gate), ("turn", turn)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    # What a compiler sees of them: nothing is returned; what is written stands in the schema.
    torch.library.register_fake(f"safegene::{_name}", lambda *_: None, lib=_library)
