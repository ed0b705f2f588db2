"""The metrics against NumPy, brute force and the paper's tables."""

import csv
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from ref.metrics import feature_variance, mean_pairwise_distance, normalized_average, overall, table, vendi_score

from .tools import DATA, features


@given(features())
@settings(max_examples=60, deadline=None)
def test_diversity_metrics_against_brute_force(phi):
    for g, z in enumerate(phi.numpy()):
        pairs = [np.linalg.norm(a - b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]
        np.testing.assert_allclose(mean_pairwise_distance(phi)[g], np.mean(pairs), rtol=1e-10)
        covariance = np.atleast_2d(np.cov(z.T))
        np.testing.assert_allclose(feature_variance(phi)[g], np.trace(covariance), rtol=1e-10)
        np.testing.assert_allclose(np.mean(np.square(pairs)), 2 * np.trace(covariance), rtol=1e-10)


def test_vendi_score_counts_orthogonal_samples():
    K = 6
    assert vendi_score(torch.eye(K)[None]).item() == pytest.approx(K)
    assert vendi_score(torch.ones(1, K, 3)).item() == pytest.approx(1)
    two = torch.eye(2).repeat_interleave(3, 0)[None]
    assert vendi_score(two).item() == pytest.approx(2)


QUALITY = ["pickscore", "aesthetic_v2_5", "image_reward", "clip_score", "hps_v2_1", "unified_reward"]
DIVERSITY = ["dino_diversity", "clip_diversity", "var_clip", "var_dino", "var_image_reward", "var_pickscore"]


@pytest.mark.parametrize("name, tolerance", [("paper_table1.csv", 0.001), ("paper_table2.csv", 0.005)])
def test_norm_avg_and_overall_reproduce_the_papers_tables(name, tolerance):
    """18 rows of table 1 to 0.001; table 2 to 0.005 (two of its rows' printed inputs are rounded)."""
    rows = list(csv.DictReader((DATA / name).open()))

    def column(*names):
        return torch.tensor([[float(row[n]) for n in names] for row in rows], dtype=torch.float64)

    quality, diversity = column(*QUALITY), column(*DIVERSITY)
    for ours, printed in [
        (normalized_average(quality), "quality_norm_avg"),
        (normalized_average(diversity), "diversity_norm_avg"),
        (overall(quality, diversity), "overall"),
    ]:
        torch.testing.assert_close(ours, column(printed)[:, 0], rtol=0, atol=tolerance)


def test_norm_avg_leaves_missing_values_out():
    values = torch.tensor([[0.0, 5.0], [1.0, float("nan")], [0.5, 7.0]])
    torch.testing.assert_close(normalized_average(values), torch.tensor([0.0, 1.0, 0.75], dtype=torch.float64))


ROWS = [
    {"name": "base model", "reference": True, "a": 9.0, "b": 9.0},
    {"name": "one", "a": (0.51, 0.1), "b": 3.0},
    {"name": "two", "a": (0.749, 0.2), "b": None},
    {"name": "three", "a": (0.751, 0.3), "b": 1.0},
]


def test_table_marks_best_and_second_best_and_the_reference_does_not_compete():
    lines = table(ROWS, {"a": ".3f", "b": ".0f"}).splitlines()
    assert lines[0] == "|  | a | b |" and lines[2] == "| base model | 9.000 | 9 |"
    assert lines[3] == "| one | 0.510 ± 0.100 | **3** |"
    assert lines[4] == "| two | <u>0.749 ± 0.200</u> | – |"
    assert lines[5] == "| three | **0.751 ± 0.300** | <u>1</u> |"


def test_equal_printed_values_share_their_mark():
    assert table(ROWS, {"a": ".2f"}).count("**0.75") == 2  # 0.749 and 0.751


def test_table_in_latex_and_csv():
    latex = table(ROWS, {"a": ".2f", "b": ".0f"}, "latex")
    assert r"one & \underline{0.51 $\pm$ 0.10} & \textbf{3} \\" in latex and latex.endswith(r"\end{tabular}")
    rows = list(csv.DictReader(io.StringIO(table(ROWS, {"a": ".2f", "b": ".0f"}, "csv"))))
    assert rows[1] == {"name": "one", "a": "0.51", "a_std": "0.1", "b": "3"} and rows[2]["b"] == ""
    with pytest.raises(ValueError, match="csv or markdown or latex, got 'html'"):
        table(ROWS, {"a": ".2f"}, "html")


def test_norm_avg_over_another_tables_range():
    over = torch.tensor([[0.0, 10.0], [2.0, 20.0]])
    assert normalized_average(torch.tensor([[1.0, 30.0]]), over).item() == pytest.approx((0.5 + 2.0) / 2)
