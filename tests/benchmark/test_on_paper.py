"""FLOPs of the large presets from shapes, against a count by hand."""

import pytest

from ref.benchmark import on_paper


def test_flops_on_paper(monkeypatch, capsys):
    """A preset's own size by default; a guided pass of SD3.5-Medium against a count by hand, a LoRA's few per cent aside."""
    monkeypatch.setattr("ref.presets.LARGE", ("sd35_medium",))
    assert on_paper.main([]) == 0
    _, size, forward, both, _, images, rollout, update, total = capsys.readouterr().out.splitlines()[1].split()
    assert (size, images) == ("512", "1152")
    T, L, w = 1024, 205, 1536  # image tokens, text tokens, width; each stream of a block has 12 w^2 weights
    linear = 2 * 12 * w**2 * (24 * T + 23 * L) + 2 * 3 * w**2 * L  # the last block's text ends at query, key, value
    attention = 24 * 4 * w * (T + L) ** 2
    second = 13 * (2 * 4 * w**2 * T + 4 * w * T**2)  # 13 blocks let the image look at itself once more
    assert float(forward) == pytest.approx(2 * (linear + attention + second) / 1e12, rel=0.03)
    assert float(rollout) == pytest.approx(1152 * 10 * float(forward) / 1e3, rel=0.01)
    assert float(update) == pytest.approx(1152 * 9 * float(both) / 1e3, rel=0.01)
    assert float(total) == pytest.approx(float(rollout) + float(update), abs=0.1)
