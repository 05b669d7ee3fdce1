"""What parallel.py does to a model in one process; test_distributed.py has several."""

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from model import GPT, Block, GPTConfig
from nanogpt import distributed


def model_and_batch() -> tuple[GPT, torch.Tensor]:
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=3, n_head=2, n_embd=16, dropout=0.3))
    return model, torch.randint(11, (2, 4, 8))


def passed(model: GPT, batch: torch.Tensor) -> tuple[int, list[torch.Tensor]]:
    """The bytes that a forward pass keeps for the backward pass, weights apart, and the gradients."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _, loss = model(*batch)
    loss.backward()
    return sum(kept.values()), [parameter.grad for parameter in model.parameters()]


def test_activations_that_are_computed_anew_are_not_kept_and_give_the_same_gradient() -> None:
    """Catches a block that is left out, or that draws other dropout the second time."""
    (model, batch), (other, _) = model_and_batch(), model_and_batch()
    distributed.checkpoint_activations(other)
    (kept, gradients), (still_kept, same) = passed(model, batch), passed(other, batch)
    assert still_kept < kept / 4
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    assert list(other.state_dict()) == list(model.state_dict())


def test_nothing_is_computed_twice_without_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches evaluation and generation that pay for a gradient which no one wants."""
    model, batch = model_and_batch()
    calls = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *arguments: calls.append(self) or forward(self, *arguments))
    distributed.checkpoint_activations(model)
    with torch.no_grad():
        model(*batch)
    assert len(calls) == 3
    model(*batch)[1].backward()
    assert len(calls) == 9


@pytest.mark.parametrize("limit", [0.0, 0.1, 100.0])
def test_gradients_are_clipped_as_pytorch_does(limit: float) -> None:
    """Catches a norm that is that of the clipped gradient, a gradient that is scaled up, and 0 that is not "never"."""
    (model, batch), (other, _) = model_and_batch(), model_and_batch()
    for each in (model, other):
        each.eval()(*batch)[1].backward()
    expected = clip_grad_norm_(other.parameters(), limit or torch.inf).item()
    assert distributed.clip_gradient(model, limit) == pytest.approx(expected)
    for parameter, like in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, like.grad)
