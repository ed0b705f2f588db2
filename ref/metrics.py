"""Diversity and quality in numbers, and the paper's two summary columns.

Features are [G, K, D]: G prompts, K samples each. Diversity is measured within a prompt and then
averaged over prompts. How the paper's columns are read (they are named, not defined, on its page):

    V.S.          feature variance: trace of the group covariance (times 100 for unit-norm features)
    DINO, CLIP    mean pairwise L2 distance
    Norm.Avg      mean over columns of the min-max normalised value, over all rows of the table
    Overall       mean of the quality and the diversity Norm.Avg

The last two reproduce table 1's printed values (tests/test_perceptual_and_metrics.py).
"""

import csv
import io

import torch
from jaxtyping import Float
from torch import Tensor

from ref.perceptual import deviations


def feature_variance(phi: Float[Tensor, "G K D"]) -> Float[Tensor, " G"]:
    """Trace of the (unbiased) covariance of every group."""
    return deviations(phi).square().sum((1, 2)) / (phi.shape[1] - 1)


def mean_pairwise_distance(phi: Float[Tensor, "G K D"]) -> Float[Tensor, " G"]:
    """Mean L2 distance over the K (K - 1) ordered pairs of a group."""
    deviations(phi)  # checks the shape
    K = phi.shape[1]
    distance = torch.cdist(phi, phi, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.sum((1, 2)) / (K * (K - 1))


def vendi_score(phi: Float[Tensor, "G K D"]) -> Float[Tensor, " G"]:
    """Effective number of distinct samples, between 1 and K (arXiv 2210.02410).

    exp of the entropy of the eigenvalues of the cosine-similarity matrix divided by K.
    """
    phi = torch.nn.functional.normalize(phi.double(), dim=-1)
    eigenvalues = torch.linalg.eigvalsh(phi @ phi.mT / phi.shape[1]).clamp_min(0)
    return torch.special.entr(eigenvalues).sum(-1).exp()


def normalized_average(values: Tensor, over: Tensor | None = None) -> Tensor:
    """Norm.Avg of a table [rows, columns] -> [rows], higher is better in every column.

    Columns are scaled by their range over the rows of the table `over` (default: of `values` itself). A
    missing value (NaN) is left out of its column's range and of its row's mean. A column without spread
    tells rows apart by nothing and counts 0 for all.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    over = values if over is None else torch.as_tensor(over, dtype=torch.float64)
    low = over.nan_to_num(torch.inf).amin(0)
    high = over.nan_to_num(-torch.inf).amax(0)
    span = high - low
    return torch.where(span > 0, (values - low) / span, values * 0).nanmean(1)


def overall(quality: Tensor, diversity: Tensor) -> Tensor:
    """Mean of both Norm.Avg columns; two tables [rows, columns] -> [rows]."""
    return (normalized_average(quality) + normalized_average(diversity)) / 2


FORMS = {  # line, separator, marks of best and second best, plus-minus
    "markdown": ("| {} |", " | ", ("**{}**", "<u>{}</u>"), " ± "),
    "latex": ("{} \\\\", " & ", ("\\textbf{{{}}}", "\\underline{{{}}}"), r" $\pm$ "),
}


def table(rows: list[dict], columns: dict[str, str], form: str = "markdown") -> str:
    """A table of results, with the best value of each column bold and the second best underlined.

    rows     dictionaries with "name" and, for each column, a number, a pair (mean, spread), or None;
             rows with `"reference": True`, such as the base model, do not compete
    columns  key -> format of its numbers, such as ".3f"; higher is better in every column
    form     "markdown", "latex", or "csv" (plain; a pair fills two columns)

    Raises ValueError for another form.
    """
    cells = {c: [v if isinstance(v, tuple | None) else (v,) for v in (row.get(c) for row in rows)] for c in columns}
    names = [row["name"] for row in rows]
    if form == "csv":
        width = {c: max((len(v) for v in values if v), default=1) for c, values in cells.items()}
        head = ["name", *(key for c in columns for key in (c, f"{c}_std")[: width[c]])]
        pad = lambda v, c: [f"{part:.6g}" for part in v or ()] + [""] * (width[c] - len(v or ()))  # noqa: E731
        body = [[name, *(cell for c in columns for cell in pad(cells[c][i], c))] for i, name in enumerate(names)]
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([head, *body])
        return buffer.getvalue()

    if form not in FORMS:
        raise ValueError(f"form must be csv or {' or '.join(FORMS)}, got {form!r}")
    line, between, marks, plus_minus = FORMS[form]
    texts = []
    for c, digits in columns.items():
        text = ["–" if v is None else plus_minus.join(format(part, digits) for part in v) for v in cells[c]]
        printed = {i: float(format(v[0], digits)) for i, v in enumerate(cells[c]) if v and not rows[i].get("reference")}
        for mark, value in zip(marks, sorted(set(printed.values()), reverse=True)):
            text = [mark.format(t) if printed.get(i) == value else t for i, t in enumerate(text)]
        texts.append(text)
    lines = [line.format(between.join(row)) for row in [("", *columns), *zip(names, *texts)]]
    if form == "markdown":
        return "\n".join([lines[0], "|---" * (len(columns) + 1) + "|", *lines[1:]])
    lines = [row.replace("_", r"\_") for row in lines]
    return "\n".join(
        [rf"\begin{{tabular}}{{l{'c' * len(columns)}}}", lines[0] + r" \hline", *lines[1:], r"\end{tabular}"]
    )
