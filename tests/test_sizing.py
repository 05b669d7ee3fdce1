"""sizing.py: the numbers of nanoGPT's transformer_sizing.ipynb, for GPT-2 124M without biases."""

import pytest

from model import GPTConfig
from nanogpt import sizing

GPT2 = sizing.empty_model(GPTConfig(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768, bias=False))


def test_parameters_by_part() -> None:
    """Catches a part that is left out or counted twice."""
    counts = sizing.parameters(GPT2)
    assert counts == {
        "token embedding and head": 38_597_376,
        "position embedding": 786_432,
        "attention: q, k, v": 12 * 1_769_472,
        "attention: projection": 12 * 589_824,
        "MLP: expansion": 12 * 2_359_296,
        "MLP: projection": 12 * 2_359_296,
        "LayerNorms": 12 * (768 + 768) + 768,
    }
    assert sum(counts.values()) == 124_337_664


def test_biases_are_no_matrices() -> None:
    """Catches biases and LayerNorms that are counted as matrix products."""
    shape = {"block_size": 8, "vocab_size": 5, "n_layer": 2, "n_head": 1, "n_embd": 4}
    plain, biased = (sizing.empty_model(GPTConfig(**shape, bias=bias)) for bias in (False, True))
    more = sum(sizing.parameters(biased).values()) - sum(sizing.parameters(plain).values())
    assert more == 2 * (3 + 1 + 4 + 1 + 2) * 4 + 4
    assert sizing.forward_flops(biased) == sizing.forward_flops(plain)


def test_flops_by_part() -> None:
    """Catches a matrix product that is left out, and one of another size."""
    flops = sizing.forward_flops(GPT2)
    assert flops == {
        "attention: scores": 12 * 1_610_612_736,
        "attention: sum of values": 12 * 1_610_612_736,
        "attention: q, k, v": 12 * 3_623_878_656,
        "attention: projection": 12 * 1_207_959_552,
        "MLP: expansion": 12 * 4_831_838_208,
        "MLP: projection": 12 * 4_831_838_208,
        "head": 79_047_426_048,
    }
    assert 3 * sum(flops.values()) == 874_944_921_600
    assert GPT2.flops_per_token() * 1024 == 875_062_886_400  # the notebook's palm_flops
    assert f"{GPT2.flops_per_token() * 1024 / (3 * sum(flops.values())):.4f}" == "1.0001"


def test_checkpoint_bytes() -> None:
    """Catches an optimizer whose moments are not counted."""
    sizes = sizing.memory(GPT2, batch_size=12, loss_rows=0)
    assert f"{sizes['checkpoint'] / 1e9:.2f}" == "1.49"
    assert f"{100 * sizes['checkpoint'] / 40e9:.2f}" == "3.73"  # percent of an A100's memory
    assert sizes["logits, float32, all at once"] == 4 * 12 * 1024 * 50257
    assert sizing.memory(GPT2, 12, loss_rows=256)["logits, 256 rows at a time"] == 4 * 256 * 50257


def test_training_days() -> None:
    """Catches a wrong unit, and devices that are not counted."""
    assert f"{sizing.training_days(6 * 124_337_664 * 300e9, 312e12, 0.3, 8):.2f}" == "3.46"
    assert sizing.training_days(86_400 * 1e12, 1e12, 1.0, 1) == 1.0


def test_mfu() -> None:
    """Catches an MFU far from that by counted FLOPs: 100 sequences in 755 ms are 37.14 % of an A100."""
    assert 100 * GPT2.estimate_mfu(100, 0.755) == pytest.approx(37.14, abs=0.01)
