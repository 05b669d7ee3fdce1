"""scaling.py: the numbers of nanoGPT's scaling_laws.ipynb, and the laws' own properties."""

from pathlib import Path

import numpy as np
import pytest

from model import GPTConfig
from nanogpt import scaling
from nanogpt.errors import UserError
from nanogpt.scaling import BESIROGLU, HOFFMANN, Law

NOTEBOOK = [  # N, FLOPs of a sequence, relative to 6ND
    (73_825_280, 929_877_196_800, 1.025036),
    (305_707_008, 4_135_248_199_680, 1.100817),
    (552_604_160, 7_353_453_772_800, 1.082919),
    (1_143_453_696, 14_670_316_437_504, 1.044094),
    (1_593_126_912, 20_220_437_594_112, 1.032902),
    (6_796_274_688, 83_021_046_743_040, 0.994114),
]


@pytest.mark.parametrize("model, expected", list(zip(scaling.CHINCHILLA_MODELS, NOTEBOOK, strict=True)))
def test_chinchilla_models(model: tuple[int, int, int], expected: tuple[int, int, float]) -> None:
    """Catches a part that is left out of the paper's models."""
    count, flops, ratio = scaling.chinchilla_cost(*model)
    assert (count, flops) == expected[:2]
    assert ratio == pytest.approx(expected[2], abs=1e-6)


def test_largest_model_of_the_paper() -> None:
    """Catches parameters that only fit small models: the notebook's last row of table A9."""
    assert f"{scaling.chinchilla_cost(47, 5120, 40, block_size=1024)[0] / 1e6:.4f}" == "16184.4582"


@pytest.mark.parametrize("law", [HOFFMANN, BESIROGLU])
@pytest.mark.parametrize("flops", [1e18, 2.21e19, 5.76e23])
def test_optimum_is_the_lowest_loss(law: Law, flops: float) -> None:
    """Catches a closed form that differs from a search."""
    sizes = np.logspace(7, 13, 60_001)
    best = np.argmin(law.loss(sizes, flops / (6 * sizes)))
    N, D = law.optimum(flops)
    assert pytest.approx(sizes[best], rel=1e-3) == N
    assert 6 * N * D == pytest.approx(flops)
    assert law.optimal_tokens(N) == pytest.approx(D)


def test_notebooks_optimum() -> None:
    """Catches other coefficients. The notebook searches a grid of 256 sizes per decade."""
    assert HOFFMANN.optimum(3.459892e19) == pytest.approx((399.54e6, 14.43e9), rel=10 ** (1 / 256) - 1)
    assert f"{HOFFMANN.loss(399.54e6, 14.43e9):.2f}" == "2.76"


def test_besiroglus_fit_agrees_with_approach_2() -> None:
    """Catches exchanged coefficients: the new fit has Chinchilla's 20 tokens per parameter, the first one far more."""
    assert 15 < BESIROGLU.optimal_tokens(70e9) / 70e9 < 25
    assert HOFFMANN.optimal_tokens(70e9) / 70e9 > 75
    assert f"{scaling.approach_2_tokens(124e6):e}" == "2.292426e+09"  # of the notebook


def test_report(tmp_path: Path) -> None:
    """Catches a picture that is not drawn, a model left out of it, and a name that matplotlib takes for a formula."""
    shape = GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=4)
    found = scaling.report("$\\frac$", shape, 0, tmp_path / "a.svg")
    assert found["tokens"] == 20 * found["parameters"]
    assert "frac$" in (tmp_path / "a.svg").read_text()
    (tmp_path / "b.png").mkdir()
    with pytest.raises(UserError, match=r"--out=\S+b.png: cannot be written"):
        scaling.report("gpt2", GPTConfig(), 3e9, tmp_path / "b.png")
