"""run.py's TrainState: when to evaluate, what an evaluation changes, when training is over."""

import math
from pathlib import Path

import pytest

from nanogpt.checkpoint import Checkpoint
from nanogpt.run import TrainState, every


@pytest.mark.parametrize("interval, due", [(0, []), (1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 3, 6]), (6, [0, 6]), (7, [0])])
def test_every(interval: int, due: list[int]) -> None:
    """Catches a division by zero where 0 means never, or a schedule that is off by one."""
    assert [iteration for iteration in range(7) if every(interval, iteration)] == due


@pytest.mark.parametrize("eval_interval, max_iters, due", [(5, 7, [0, 5, 7]), (5, 10, [0, 5, 10]), (100, 3, [0, 3])])
def test_eval_is_due_at_intervals_and_at_the_end(eval_interval: int, max_iters: int, due: list[int]) -> None:
    """Catches a run that ends without an evaluation, or evaluates twice at its end."""
    state, evaluated = TrainState(), []
    for iteration in range(max_iters + 1):
        state.iter_num = iteration
        if state.eval_due(eval_interval, max_iters):
            state.record_eval(1.0)
            evaluated.append(iteration)
            assert not state.eval_due(eval_interval, max_iters)
    assert evaluated == due


def test_resumed_run_does_not_repeat_its_last_eval() -> None:
    """Catches an evaluation that is done again after a resume, or one that is skipped because an earlier one was done."""
    assert not TrainState(iter_num=10, last_eval=10).eval_due(5, 100)
    assert TrainState(iter_num=10, last_eval=5).eval_due(5, 100)


def test_record_eval() -> None:
    """Catches a best loss that gets worse, a tie that counts as better, patience that is never reset."""
    state, seen = TrainState(), []
    for iteration, val_loss in enumerate([3.0, 2.0, 2.5, 2.0, 1.5]):
        state.iter_num = iteration
        improved = state.record_eval(val_loss)
        seen.append((improved, state.last_eval, state.best_val_loss, state.evals_since_best))
    assert seen == [(True, 0, 3.0, 0), (True, 1, 2.0, 0), (False, 2, 2.0, 1), (False, 3, 2.0, 2), (True, 4, 1.5, 0)]


@pytest.mark.parametrize("patience, evals_since_best, stopped", [(0, 99, False), (2, 1, False), (2, 2, True), (2, 3, True)])
def test_patience(patience: int, evals_since_best: int, stopped: bool) -> None:
    """Catches early stopping an evaluation too soon or too late, or with patience=0, which means never."""
    state = TrainState(iter_num=5, evals_since_best=evals_since_best)
    assert state.out_of_patience(patience) == state.finished(100, patience) == stopped


@pytest.mark.parametrize("iter_num, finished", [(6, False), (7, True), (8, True)])
def test_finished_at_max_iters(iter_num: int, finished: bool) -> None:
    """Catches one update too many or too few, and a run resumed past its end that trains on."""
    assert TrainState(iter_num=iter_num).finished(7, patience=0) == finished


def checkpoint(extra: dict) -> Checkpoint:
    weights = {"optimizer": None, "weights": {}, "model_args": {}, "config": {}}
    return Checkpoint(path=Path("ckpt.pt"), iter_num=20, best_val_loss=1.5, extra=extra, **weights)


def test_state_from_checkpoint() -> None:
    """Catches a resumed run that forgets its last evaluation, its patience or its Weights & Biases run."""
    state = TrainState.from_checkpoint(checkpoint({"evaluated": 10, "stale": 3, "wandb": "abc"}))
    assert state == TrainState(iter_num=20, best_val_loss=1.5, last_eval=10, evals_since_best=3, wandb_id="abc")
    assert TrainState.from_checkpoint(checkpoint({"stale": 3, "ckpt_val_loss": 2.5})).ckpt_val_loss == 2.5


def test_state_from_nanogpts_checkpoint() -> None:
    """Catches a KeyError for a checkpoint of nanoGPT, which has no `extra`."""
    assert TrainState.from_checkpoint(checkpoint({})) == TrainState(iter_num=20, best_val_loss=1.5, ckpt_val_loss=1.5)
    assert (TrainState().iter_num, TrainState().last_eval, TrainState().best_val_loss) == (0, -1, math.inf)
