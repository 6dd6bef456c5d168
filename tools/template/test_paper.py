"""Tests of papers/__SLUG__."""

from __future__ import annotations

import pytest
import torch

from papers.__SLUG__ import data, model


def test_linear_baseline_is_a_matrix_product() -> None:
    net = model.Perceptron(2, 0, 2)
    x = torch.randn(5, 2)
    expected = x @ net.net.weight.T + net.net.bias
    torch.testing.assert_close(net(x), expected)


def test_widths_are_checked() -> None:
    with pytest.raises(ValueError, match="hidden"):
        model.Perceptron(2, -1, 2)


def test_generated_data_is_balanced() -> None:
    _, labels = data.generate(40, 0)
    assert labels.bincount().tolist() == [20, 20]


def test_the_claim_fails_without_the_hidden_layer(run_paper, monkeypatch, tmp_path) -> None:
    intact = run_paper("__SLUG__", ["--steps", "150", "--seeds", "1", "--check", "--out", str(tmp_path / "a")])
    assert intact.code == 0, intact.err
    import torch.nn as nn

    monkeypatch.setattr(nn, "ReLU", nn.Identity)  # without the non-linearity two layers are one
    broken = run_paper("__SLUG__", ["--steps", "150", "--seeds", "1", "--check", "--out", str(tmp_path / "b")])
    assert broken.code == 1
    assert "beats_linear" in broken.err


@pytest.mark.parametrize(
    "argv",
    [["--lr", "-1"], ["--hidden", "0"], ["--preset", "real"], ["--preset", "smoke", "--stop-after", "0"]],
)
def test_bad_usage_is_one_line(run_paper, argv) -> None:
    result = run_paper("__SLUG__", argv)
    assert result.code == 2
    assert len(result.errors) == 1
