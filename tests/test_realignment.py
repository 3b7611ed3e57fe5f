"""Realignment: a drift that is linear is undone, what is folded reads what is applied, an anchor left out was never seen."""

from __future__ import annotations

import torch

from safegene.adapter import Intervention, intervene
from safegene.gate import normalise
from safegene.realignment import RIDGE, Realignment


def drifted(n: int = 60, d: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Base features of low rank [2, n, d], and the same after a rotation and a shift; the map [d, d]."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, n, 6, generator=generator) @ torch.randn(2, 6, d, generator=generator)
    turn = torch.linalg.qr(torch.eye(d) + 0.15 * torch.randn(d, d, generator=generator)).Q
    return base, base @ turn + torch.randn(d, generator=generator), turn


def test_a_rotation_is_undone_where_mean_and_scale_are_not_enough() -> None:
    base, moved, _ = drifted()
    found = Realignment.fit(moved[:, :40], base[:, :40])  # the last twenty are new to it
    for layer in range(2):
        unseen = found.apply(layer, moved[layer, 40:])
        plain = (moved[layer, 40:] - found.mean[layer]) * found.scale[layer] + found.target[layer]
        error, before = (float((x - base[layer, 40:]).pow(2).sum()) for x in (unseen, plain))
        assert error < 0.5 * before


def test_on_the_base_nothing_changes() -> None:
    base, _, _ = drifted()
    found = Realignment.fit(base, base)
    torch.testing.assert_close(found.apply(1, base[1]), base[1], atol=1e-4, rtol=1e-4)
    assert float(found.dual.abs().max()) < 1e-5
    nothing = Realignment.none(2, 24)
    torch.testing.assert_close(nothing.apply(0, base[0]), base[0])


def test_a_folded_matrix_reads_what_an_explicit_realignment_gives() -> None:
    base, moved, _ = drifted()
    found = Realignment.fit(moved, base)
    weight, bias = torch.randn(5, 24), torch.randn(5)
    expected = found.apply(0, moved[0]) @ weight.T + bias
    folded, moved_bias = found.fold(0, weight, bias)
    torch.testing.assert_close(moved[0] @ folded.T + moved_bias, expected, atol=1e-3, rtol=1e-3)


def test_an_anchor_left_out_is_read_as_by_a_regression_without_it() -> None:
    base, moved, _ = drifted()
    found = Realignment.fit(moved, base)
    weight, bias = torch.randn(5, 24), torch.zeros(5)
    z, y = found.anchors[0], base[0] - found.target[0] - found.anchors[0]
    others = torch.arange(60) != 7
    size = (z @ z.T).diagonal().mean()
    dual = torch.linalg.solve(z[others] @ z[others].T + RIDGE * size * torch.eye(59), y[others])
    expected = (found.target[0] + z[7] + z[7] @ z[others].T @ dual) @ weight.T
    folded, shifted = found.fold(0, weight, bias, left_out=7)
    torch.testing.assert_close(folded @ moved[0, 7] + shifted, expected, atol=1e-3, rtol=1e-3)
    seen, seen_bias = found.fold(0, weight, bias)
    assert not torch.allclose(seen @ moved[0, 7] + seen_bias, expected, atol=1e-2)


def test_an_intervention_reads_through_the_realignment() -> None:
    torch.manual_seed(0)
    part = Intervention(8, 3)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.normal_()
    base, hidden = torch.randn(1, 20, 8), torch.randn(5, 8)
    found = Realignment.fit(base + 0.3 * torch.randn(1, 20, 8) + 1.0, base)
    code = torch.nn.functional.silu(found.apply(0, normalise(hidden)) @ part.down.T + part.bias)
    q = torch.sigmoid(code @ part.wish + part.wish_bias)[:, None]
    expected = hidden + q * 0.7 * (code @ part.up.T)
    weights = part.correction(*found.fold(0, part.down, part.bias), 0.7)
    torch.testing.assert_close(intervene(hidden, torch.ones(5, 1), weights), expected, atol=1e-4, rtol=1e-4)
