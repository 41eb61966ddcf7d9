"""Chi-square of drawn texts: the figure, its p, and that it sees another distribution."""

from __future__ import annotations

import math

import pytest
import torch
from benchmarks.__main__ import run

from benchmarks import draws


def test_chi_square_by_hand():
    seen, expected = torch.tensor([30.0, 14, 6]).double(), torch.tensor([25.0, 22, 3]).double()
    statistic, freedom = draws.chi_square(torch.cat([seen, torch.zeros(1)]), torch.cat([expected, torch.zeros(1)]))
    assert freedom == 2 and statistic == pytest.approx(25 / 25 + 64 / 22 + 9 / 3)
    assert draws.p_value(statistic, freedom) == pytest.approx(math.exp(-statistic / 2)), "with two degrees it is this"
    impossible = draws.chi_square(torch.tensor([49.0, 1.0]).double(), torch.tensor([50.0, 0.0]).double())
    assert draws.p_value(*impossible) == 0


def test_exact_texts_pass_and_sparse_ones_do_not():
    rows = list(draws.count(600, 100, torch.device("cpu"), lambda *step: None))
    exact, sparse = [row for row in rows if "sparse" not in row["setting"]], rows[-1]
    assert len(exact) == 3 and sparse["setting"].startswith("mode sparse")
    assert all(row["p"] > 0.01 and row["rolled_back"] > 100 and row["kept"] < 0.1 for row in exact)
    assert sparse["p"] < 1e-9
    assert len({row["chi_square"] for row in exact}) == 1, "a text depends on its seed alone"


def test_bad_input_is_refused(tmp_path, capsys):
    assert run(["draws", "--draws", "0", "--output", str(tmp_path / "x.jsonl")]) == 2
    assert "--draws: got 0; allowed: a whole number >= 1" in capsys.readouterr().err
