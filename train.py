"""Train a GPT: from scratch, from an interrupted run, or from pretrained weights; on one process or many.

python train.py config/train_shakespeare_char_cpu.py             a small model on a laptop
python train.py --init_from=resume --out_dir=out                 continue the run in out/
torchrun --standalone --nproc_per_node=8 train.py config/...     eight processes on one machine

Ctrl-C and SIGTERM save the run and stop it; --init_from=resume continues it, bit for bit.
"""

import dataclasses
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch.nn.parallel import DistributedDataParallel

import configurator
from configurator import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Probability, Seed
from model import GPT, Bigram, GPTConfig
from nanogpt.checkpoint import MODELS, Checkpoint, build_model, empty_model, open_checkpoint, restore_optimizer, tokenizer_of
from nanogpt.dataset import Dataset
from nanogpt.device import (
    Compile,
    Dtype,
    autocast,
    describe,
    explain_out_of_memory,
    keep_memory,
    peak_flops,
    pick_compile,
    pick_device,
    pick_dtype,
    pick_loss_rows,
    seed_dropout,
    set_up,
    to_device,
)
from nanogpt.distributed import Group, clip_gradient, parallelize, process_group, share_batch
from nanogpt.errors import UserError, warn
from nanogpt.evaluation import estimate_loss, sample_text
from nanogpt.optim import OptimizerName, build_optimizer
from nanogpt.run import Run, Signals, TrainState, every


@dataclass(frozen=True)
class Config(configurator.Config):
    # run
    out_dir: str = "out"  # folder of the run: checkpoints, metrics.csv, loss.png, config.json
    init_from: str = "scratch"  # scratch, resume (the run in out_dir), a run folder, a checkpoint file, gpt2, owner/name ...
    eval_interval: PositiveInt = 2000  # iterations between evaluations
    eval_iters: NonNegativeInt = 200  # batches to evaluate of each split; 0: the whole split
    eval_only: bool = False  # evaluate once and exit
    log_interval: PositiveInt = 1  # iterations between printed losses
    always_save_checkpoint: bool = True  # write ckpt.pt at every evaluation; False: only if the validation loss improved
    checkpoint_interval: NonNegativeInt = 0  # iterations between saves of last.pt; 0: at evaluations only
    checkpoint_minutes: NonNegativeFloat = 15  # save last.pt also after so many minutes; 0: never
    sample_interval: NonNegativeInt = 0  # iterations between short samples of the model's text; 0: none
    patience: NonNegativeInt = 0  # stop after so many evaluations without a better validation loss; 0: never
    seed: Seed = 1337  # random seed of initial weights, batches and dropout
    # Weights & Biases
    wandb_log: bool = False  # log to Weights & Biases, too
    wandb_project: str = "owt"  # its project
    wandb_run_name: str = "gpt2"  # its run name
    # data
    dataset: str = "openwebtext"  # a folder in data/ with train.bin and val.bin
    gradient_accumulation_steps: PositiveInt = 5 * 8  # micro-batches per iteration, over all processes
    batch_tokens: NonNegativeInt = 0  # tokens per iteration, instead of gradient_accumulation_steps; 0: not used
    batch_size: PositiveInt = 12  # sequences per micro-batch
    block_size: PositiveInt = 1024  # context length, in tokens
    # model
    model: Literal["gpt", "bigram"] = "gpt"  # a bigram has no layers, heads or channels
    n_layer: PositiveInt = 12  # transformer blocks
    n_head: PositiveInt = 12  # attention heads per block
    n_embd: PositiveInt = 768  # channels, a multiple of n_head
    dropout: Probability = 0.0  # for pretraining 0 is good, for finetuning try 0.1+
    bias: bool = False  # biases in Linear and LayerNorm layers; without is a bit better and faster
    # optimizer
    optimizer: OptimizerName = "adamw"  # muon: Muon for the matrices of the blocks, AdamW for the rest
    learning_rate: PositiveFloat = 6e-4  # maximum learning rate
    max_iters: NonNegativeInt = 600000  # total number of updates
    weight_decay: NonNegativeFloat = 1e-1  # for matrices and embeddings
    beta1: Probability = 0.9  # AdamW's decay rate of the gradient's running mean
    beta2: Probability = 0.95  # AdamW's decay rate of its running square
    grad_clip: NonNegativeFloat = 1.0  # clip the gradient to this norm; 0: no clipping
    # learning rate schedule
    decay_lr: bool = True  # linear warmup, then cosine decay
    warmup_iters: NonNegativeInt = 2000  # iterations of warmup
    lr_decay_iters: NonNegativeInt = 600000  # end of the decay; should be about max_iters (Chinchilla)
    min_lr: NonNegativeFloat = 6e-5  # learning rate after it; should be about learning_rate / 10 (Chinchilla)
    # machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Dtype = "auto"  # of matrix products; auto: 16 bits where the hardware supports it. float16 scales the loss
    compile: Compile = "auto"  # use torch.compile; auto: on CUDA
    fused: bool = True  # fused AdamW, on CUDA and CPUs
    loss_rows: Annotated[int | Literal["auto"], configurator.Range(at_least=0)] = "auto"  # rows per chunk of the loss; 0: all
    keep_memory: bool = True  # on Linux CPUs: reuse freed memory instead of returning it to the system
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # of several processes; auto: nccl on CUDA, else gloo
    parallel: Literal["ddp", "fsdp"] = "ddp"  # each process holds the whole model (ddp) or a shard of it (fsdp)
    activation_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more compute

    def validate(self) -> None:
        if not self.out_dir:
            raise UserError("--out_dir= is empty: name the folder for the run")
        if self.init_from == "scratch" and self.model == "gpt" and self.n_embd % self.n_head:
            divisors = [d for d in range(1, self.n_embd + 1) if self.n_embd % d == 0]
            near = sorted(divisors, key=lambda d: abs(d - self.n_head))[:2]
            raise UserError(f"n_head={self.n_head} does not divide n_embd={self.n_embd}; try --n_head={near[0]} or {near[-1]}")
        if self.optimizer == "muon" and self.model == "bigram":
            raise UserError("--optimizer=muon is for the matrices of blocks, which a bigram model lacks; use --optimizer=adamw")


@dataclass(frozen=True)
class Machine:
    """What is decided for this machine, mostly keys that are "auto". It is not saved: another machine decides anew."""

    dtype: torch.dtype
    compile: bool
    loss_rows: int  # rows per chunk of the loss; 0: all
    keeps_memory: bool
    sharded: bool
    micro_batches: int  # per iteration, over all processes


def main(config: Config) -> None:
    ckpt = None
    if config.init_from != "scratch":
        with explain_out_of_memory("start from a smaller model"):
            ckpt = open_checkpoint(config.init_from, config.out_dir, newest_state=True)
    config = settle(config, ckpt)
    accumulate = f" and raise --gradient_accumulation_steps (now {config.gradient_accumulation_steps}) to match"
    advice = (
        f"lower --batch_size (now {config.batch_size}){'' if config.batch_tokens else accumulate}, or use "
        "--activation_checkpointing=True, neither of which changes the result; or lower --block_size, --n_layer or --n_embd"
    )
    with explain_out_of_memory(advice), process_group(config.device, config.backend) as group:
        ending = evaluate_only(config, group, ckpt) if config.eval_only else train(config, group, ckpt)
    if ending is not None:
        raise ending


def train(config: Config, group: Group, ckpt: Checkpoint | None) -> SystemExit | UserError | None:
    """Train on one of the processes of `group`; all that refers to the group is gone when this function returns.

    Returns what the process is to raise once the group is closed: an exit status after a signal, or a failure to save.
    """
    with Run(Path(config.out_dir), group) as run:
        # set up data, model and optimizer
        data = Dataset(config.dataset)
        machine = resolve_machine(config, group, ckpt, data)
        model, ckpt = load_or_init(config, data, ckpt, empty=machine.sharded and not group.is_main)
        compiled, network = parallelize(
            model, group, machine.dtype, machine.sharded, machine.compile, config.activation_checkpointing
        )
        betas, device_type = (config.beta1, config.beta2), torch.device(group.device).type
        optimizer = build_optimizer(
            model, config.optimizer, config.weight_decay, config.learning_rate, betas, device_type, config.fused
        )
        scaler = torch.amp.GradScaler(device_type, enabled=machine.dtype == torch.float16)
        resumed = config.init_from == "resume"
        state = TrainState()
        if resumed:
            restore_optimizer(ckpt, optimizer, scaler)
            state = TrainState.from_checkpoint(ckpt)
        if ckpt is not None:
            ckpt.release()  # its tensors are in the model and the optimizer now

        # set up logging, evaluation and batches
        sequences_per_iter = machine.micro_batches * config.batch_size
        peak = peak_flops(group.device, machine.dtype)
        run.begin(
            state, model, optimizer, scaler, data.describe(), dataclasses.asdict(config), resumed, sequences_per_iter, peak
        )
        run.say(summary(config, machine, model, data, group))
        if resumed:
            run.say(f"resuming after {state.iter_num:,} of {config.max_iters:,} iterations")
        if state.iter_num >= config.max_iters:
            run.say("nothing left to do; a larger --max_iters continues the run")
        mixed_precision = autocast(group.device, machine.dtype)
        batches = training_batches(data, config, machine, group, state.iter_num, model.config.vocab_size)

        # training loop
        x, y = next(batches)  # (B, T) each
        while True:
            # set the learning rate for this iteration
            lr = config.learning_rate
            if config.decay_lr:
                lr = get_lr(state.iter_num, lr, config.min_lr, config.warmup_iters, config.lr_decay_iters)
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr

            # evaluate the loss and write checkpoints
            if state.eval_due(config.eval_interval, config.max_iters):
                with run.paused("evaluating"):
                    sizes = config.eval_iters, config.batch_size, config.block_size, machine.loss_rows
                    losses = estimate_loss(compiled, data, group, mixed_precision, config.seed, *sizes, run.signals)
                    if losses is None:  # interrupted by a signal, on all ranks
                        run.stop()
                        break
                    run.require_finite({f"{split} loss": loss for split, loss in losses.items()})
                    improved = state.record_eval(losses["val"])
                    run.log_eval(losses, lr)
                    run.save(best=improved or config.always_save_checkpoint)
                    run.update_curves()
            if every(config.sample_interval, state.iter_num) and state.iter_num > 0 and not run.signals.received:
                with run.paused("sampling"):
                    if group.is_main:
                        text = sample_text(model, data, config.seed, state.iter_num, group.device, run.signals)
                        run.say(f"--- sample after {state.iter_num:,} iterations\n{text}\n---")
            if run.stop_requested or state.finished(config.max_iters, config.patience):
                break

            # forward and backward over this rank's micro-batches, accumulating gradients
            loss = 0.0
            for micro_batch in range(group.rank, machine.micro_batches, group.size):
                if config.dropout > 0:
                    seed_dropout(config.seed, state.iter_num, micro_batch)
                if isinstance(network, DistributedDataParallel):  # all-reduce with the last micro-batch only
                    network.require_backward_grad_sync = micro_batch + group.size >= machine.micro_batches
                with mixed_precision:
                    _, micro_loss = network(x, y, loss_rows=machine.loss_rows)
                x, y = next(batches)  # prefetch while the device computes
                loss += micro_loss.detach() / machine.micro_batches
                scaler.scale(micro_loss * group.size / machine.micro_batches).backward()  # DDP and FSDP average over ranks

            # clip the gradient; all ranks agree on the loss, on saving and on stopping
            scaler.unscale_(optimizer)
            grad_norm = clip_gradient(model, config.grad_clip)
            loss = run.agree(loss.item())
            run.require_finite({"loss": loss})
            if not scaler.is_enabled():  # a GradScaler skips a step whose gradient is not finite, and lowers its scale
                run.require_finite({"norm of the gradient": grad_norm})
            if run.save_due:  # before the update: this state is known to be good
                with run.paused("saving"):
                    run.save()

            # update the weights
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            run.log_step(loss, lr, grad_norm)
            state.iter_num += 1
        run.save()
    return run.ending(f"python {'chat' if data.chat_format else 'sample'}.py --out_dir={shlex.quote(config.out_dir)}")


def evaluate_only(config: Config, group: Group, ckpt: Checkpoint | None) -> None:
    """Print the loss of both splits, and write nothing."""
    data = Dataset(config.dataset)
    machine = resolve_machine(config, group, ckpt, data)
    model, ckpt = load_or_init(config, data, ckpt, empty=machine.sharded and not group.is_main)
    compiled, _ = parallelize(model, group, machine.dtype, machine.sharded, machine.compile)
    mixed_precision = autocast(group.device, machine.dtype)
    sizes = config.eval_iters, config.batch_size, config.block_size, machine.loss_rows
    losses = estimate_loss(compiled, data, group, mixed_precision, config.seed, *sizes, Signals())
    if group.is_main:
        iter_num = ckpt.iter_num if config.init_from == "resume" else 0
        print(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")


def get_lr(iteration: int, learning_rate: float, min_lr: float, warmup_iters: int, lr_decay_iters: int) -> float:
    """Learning rate schedule: linear warmup, cosine decay to `min_lr` at `lr_decay_iters`, constant after it."""
    if iteration < warmup_iters:
        return learning_rate * (iteration + 1) / (warmup_iters + 1)
    if iteration >= lr_decay_iters:
        return min_lr
    progress = (iteration - warmup_iters) / (lr_decay_iters - warmup_iters)  # from 0 to 1
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def training_batches(
    data: Dataset, config: Config, machine: Machine, group: Group, first_iter: int, vocab_size: int
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield this rank's micro-batches from `first_iter` on, on its device: (x, y), (batch_size, block_size) each.

    The batch of an iteration is drawn as a whole, and cut into micro-batches, so that any number of ranks trains on the same.
    """
    iteration, size = first_iter, config.batch_size
    while True:
        count = machine.micro_batches * size
        positions = data.draw("train", "train", config.seed, iteration, count, config.block_size)
        for micro_batch in range(group.rank, machine.micro_batches, group.size):
            chosen = positions[micro_batch * size : (micro_batch + 1) * size]
            yield to_device(data.windows("train", chosen, config.block_size, vocab_size), group.device)
        iteration += 1


# what is decided before the loop


def settle(config: Config, ckpt: Checkpoint | None) -> Config:
    """Return the final config: what the checkpoint decides is taken from it. Raises UserError if it does not fit.

    With init_from="resume" that is every key that is not given, otherwise the shape of the model.
    """
    values: dict[str, Any] = {}
    resumed = config.init_from == "resume"
    if resumed:
        own = config.given | {"init_from", "out_dir"}
        if "gradient_accumulation_steps" in config.given:
            own |= {"batch_tokens"}  # it would override it
        for name in {field.name for field in dataclasses.fields(config)} & ckpt.config.keys() - own:
            values[name] = configurator.check_value(Config, name, ckpt.config[name], str(ckpt.path))
        if "device" not in config.given:
            try:
                pick_device(values.get("device", config.device))
            except UserError:  # the run began on another kind of machine
                values |= dict.fromkeys({"device", "dtype", "compile", "backend"} - config.given, "auto")
    if ckpt is not None:
        shape = {name: ckpt.model_args[name] for name in ("n_layer", "n_head", "n_embd", "bias", "block_size")}
        for name, value in (shape | {"model": ckpt.model_type}).items():
            given = getattr(config, name)
            if name == "block_size" and name in config.given and not resumed and given < value:
                continue  # the model is cropped
            if name in config.given and given != value:
                warn(f"{ckpt.path} has {name}={value}, used instead of {name}={given}")
            values[name] = value
    config = config.replace(**values)
    config.validate()
    return config


def resolve_machine(config: Config, group: Group, ckpt: Checkpoint | None, data: Dataset) -> Machine:
    """Decide what depends on this machine, and set it up. Raises UserError if the keys do not fit it."""
    dtype = pick_dtype(config.dtype, group.device)
    sharded = config.parallel == "fsdp" and group.launched
    if sharded and config.sample_interval:
        raise UserError("--sample_interval needs the whole model on one process, but --parallel=fsdp shards it; set it to 0")
    if sharded and dtype == torch.float16:
        raise UserError("--parallel=fsdp has no loss scaling for float16; use --dtype=bfloat16 or --dtype=float32")
    set_up(group.device, config.seed)
    vocab_size = data.tokenizer.model_vocab_size if ckpt is None else ckpt.model_args["vocab_size"]
    rows, accumulate = config.batch_size * config.block_size, config.gradient_accumulation_steps
    return Machine(
        dtype=dtype,
        compile=pick_compile(config.compile, group.device),
        loss_rows=pick_loss_rows(config.loss_rows, group.device, rows, vocab_size),
        keeps_memory=config.keep_memory and group.device == "cpu" and keep_memory(),
        sharded=sharded,
        micro_batches=share_batch(accumulate, config.batch_tokens, config.batch_size, config.block_size, group.size),
    )


def load_or_init(
    config: Config, data: Dataset, ckpt: Checkpoint | None, empty: bool = False
) -> tuple[GPT | Bigram, Checkpoint | None]:
    """Return the model to train, on the CPU, and its checkpoint, read into memory.

    An `empty` model takes no memory: it gets its weights from rank 0. Raises UserError if data and model do not fit.
    """
    vocab_size = data.tokenizer.model_vocab_size
    if ckpt is None:
        keys = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
        shape = GPTConfig(vocab_size=vocab_size, **{key: getattr(config, key) for key in keys})
        model = empty_model(config.model, shape) if empty else MODELS[config.model](shape)
    else:
        tokenizer = tokenizer_of(ckpt)
        if tokenizer.to_dict() != data.tokenizer.to_dict():
            raise UserError(
                f"{ckpt.path} was trained with another tokenizer ({tokenizer}) than that of dataset '{config.dataset}' "
                f"({data.tokenizer}); choose a dataset with the same one"
            )
        ckpt = ckpt if empty else ckpt.in_memory()
        model = build_model(ckpt, config.dropout, empty)
        if config.block_size < model.config.block_size:
            model.crop_block_size(config.block_size)
    data.check(config.block_size, model.config.vocab_size)
    return model, ckpt


def summary(config: Config, machine: Machine, model: GPT | Bigram, data: Dataset, group: Group) -> str:
    """Return what a run prints at its start: model, data, length, machine."""
    tokens, per_iter = data.tokens["train"], machine.micro_batches * config.batch_size * config.block_size
    keys = ["block_size"] if config.model == "bigram" else ["n_layer", "n_head", "n_embd", "block_size"]
    chosen = [str(machine.dtype).removeprefix("torch."), "compiled" if machine.compile else "not compiled"]
    chosen += [("fused " if config.fused else "") + {"adamw": "AdamW", "muon": "AdamW and Muon"}[config.optimizer]]
    chosen += [f"loss in chunks of {machine.loss_rows} rows"] * (machine.loss_rows > 0)
    chosen += ["freed memory kept"] * machine.keeps_memory + ["sharded"] * machine.sharded
    chosen += ["activation checkpointing"] * config.activation_checkpointing
    return (
        f"model: {config.model}, {model.get_num_params():,} parameters, "
        f"{', '.join(f'{key}={getattr(model.config, key)}' for key in keys)}\n"
        f"data: {config.dataset} ({data.tokenizer})\n"
        f"      {tokens:,} tokens to train on, {data.tokens['val']:,} to validate\n"
        f"tokens per iteration: {per_iter:,} ({tokens / per_iter:,.0f} iterations per epoch)\n"
        f"run: {config.max_iters:,} iterations, {config.max_iters * per_iter / tokens:,.2f} epochs\n"
        f"machine: {describe(group.device)}, {group.size} process{'es' if group.size > 1 else ''}\n"
        f"         {', '.join(chosen)}"
    )


if __name__ == "__main__":
    configurator.run(main, Config)
