"""Train a GPT on one process or on many, from scratch, from an interrupted run or from given weights.

python train.py config/train_shakespeare_char_cpu.py             a small model on a laptop
python train.py --init_from=resume --out_dir=out                 go on with the run in out/
torchrun --standalone --nproc_per_node=8 train.py config/...     eight processes on one machine

Ctrl-C or SIGTERM stops a run when its state is saved; it goes on, bit for bit, with --init_from=resume.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import configurator
from configurator import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Probability, Seed
from model import GPT, Bigram, GPTConfig
from nanogpt import checkpoint, conversation, device, errors
from nanogpt import distributed as parallel
from nanogpt import run as guard
from nanogpt.curves import Curves
from nanogpt.dataset import Dataset, FileLost, Split
from nanogpt.device import Compile, Dtype
from nanogpt.errors import UserError
from nanogpt.metrics import Metrics, start_wandb
from nanogpt.tokenizer import END_OF_TEXT, StreamDecoder

LOGITS = 1 << 27  # bytes of logits in float32 above which a CPU computes the loss in chunks
LossRows = Annotated[int | Literal["auto"], configurator.Range(at_least=0)]

RUN_FILES = (checkpoint.BEST, checkpoint.LAST, "metrics.csv", "config.json", "loss.png")  # what a run leaves in its folder

SAMPLE_TOKENS = 200  # in a text that is written during training


@dataclass
class Config(configurator.Config):
    # run
    out_dir: str = "out"  # folder of the run: checkpoints, metrics.csv, loss.png, config.json
    init_from: str = "scratch"  # scratch, resume (the run in out_dir), a run folder, a checkpoint file, gpt2, owner/name ...
    eval_interval: PositiveInt = 2000  # iterations between evaluations of both splits
    eval_iters: NonNegativeInt = 200  # batches in the evaluation of each split; 0 scores the whole split
    eval_only: bool = False  # evaluate once and stop
    log_interval: PositiveInt = 1  # iterations between printed losses
    always_save_checkpoint: bool = True  # ckpt.pt is the newest state rather than the best
    checkpoint_interval: NonNegativeInt = 0  # iterations between saves of last.pt; 0 saves it at evaluations
    checkpoint_minutes: NonNegativeFloat = 15  # and minutes after which it is saved in any case; 0 does not look at the clock
    sample_interval: NonNegativeInt = 0  # iterations between short texts that the model writes meanwhile; 0 has it write none
    patience: NonNegativeInt = 0  # evaluations without a better validation loss after which to stop; 0 never does
    seed: Seed = 1337  # of initial weights, batches and dropout
    # Weights & Biases
    wandb_log: bool = False  # send the rows of metrics.csv there too
    wandb_project: str = "owt"  # project there
    wandb_run_name: str = "gpt2"  # name of the run there
    # data
    dataset: str = "openwebtext"  # a folder of data/ with train.bin and val.bin
    gradient_accumulation_steps: PositiveInt = 5 * 8  # micro-batches in an iteration, shared out between the processes
    batch_tokens: NonNegativeInt = 0  # tokens in an iteration, which set gradient_accumulation_steps; 0 leaves that as it is
    batch_size: PositiveInt = 12  # windows in a micro-batch
    block_size: PositiveInt = 1024  # tokens in a window: the model's context
    # model
    model: Literal["gpt", "bigram"] = "gpt"  # kind of network; a bigram has no layers, heads or channels
    n_layer: PositiveInt = 12  # layers
    n_head: PositiveInt = 12  # attention heads in a layer
    n_embd: PositiveInt = 768  # channels, a multiple of n_head
    dropout: Probability = 0.0  # 0 is best for pretraining; for finetuning try 0.1 or more
    bias: bool = False  # biases in Linear and LayerNorm layers; without, it is a bit better and faster
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: the hidden layers' matrices by Muon, the rest by AdamW
    learning_rate: PositiveFloat = 6e-4  # highest learning rate
    max_iters: NonNegativeInt = 600000  # updates in the whole run
    weight_decay: NonNegativeFloat = 1e-1  # of matrices and embeddings
    beta1: Probability = 0.9  # AdamW's decay of the mean of the gradient
    beta2: Probability = 0.95  # AdamW's decay of the mean of its square
    grad_clip: NonNegativeFloat = 1.0  # largest norm of the gradient; 0 does not clip
    # learning rate decay
    decay_lr: bool = True  # warm up, then decay along a cosine
    warmup_iters: NonNegativeInt = 2000  # iterations of linear warmup
    lr_decay_iters: NonNegativeInt = 600000  # where the decay ends; about max_iters (Chinchilla)
    min_lr: NonNegativeFloat = 6e-5  # learning rate from there on; about learning_rate / 10 (Chinchilla)
    # machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Dtype = "auto"  # of matrix products; float16 scales the loss. auto: 16 bits where the device is made for it
    compile: Compile = "auto"  # compile the model with torch.compile. auto: on CUDA
    fused: bool = True  # AdamW as one kernel, on CUDA and CPUs
    loss_rows: LossRows = "auto"  # positions whose logits are there at a time; 0: all. auto: 256 on a CPU where all are many
    keep_memory: bool = True  # on a CPU under Linux: keep the memory of tensors for those of the next iteration
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # of several processes. auto: nccl on CUDA, else gloo
    parallel: Literal["ddp", "fsdp"] = "ddp"  # of several processes: each holds the whole model, or a share of its weights
    activation_checkpointing: bool = False  # compute blocks anew in the backward pass: less memory, a third more work

    def validate(self) -> None:
        if not self.out_dir:
            raise UserError("--out_dir= is empty: name the folder for the run")
        if self.init_from == "scratch" and self.model == "gpt" and self.n_embd % self.n_head:
            raise UserError(f"n_head={self.n_head} does not divide n_embd={self.n_embd}: {_nearest(self.n_embd, self.n_head)}")
        if self.optimizer == "muon" and self.model == "bigram":
            raise UserError("--optimizer=muon is for the matrices of layers, of which a bigram model has none: take adamw")


def main(config: Config) -> None:
    out_dir = Path(config.out_dir)
    if config.init_from == "resume":
        inherit(config, checkpoint.load(checkpoint.newest(out_dir), mmap=True))
    steps = f" and raise --gradient_accumulation_steps (now {config.gradient_accumulation_steps}) to match"
    advice = (
        f"lower --batch_size (now {config.batch_size}){'' if config.batch_tokens else steps}, or give "
        "--activation_checkpointing=True, which changes no result; or lower --block_size, --n_layer or --n_embd"
    )
    with guard.memory(advice), device.process_group(config.device, config.backend) as group:
        with contextlib.nullcontext() if config.eval_only else guard.only_run(out_dir, group):
            ending = train(config, group)
    if ending is not None:
        raise ending


def train(config: Config, group: device.Group) -> SystemExit | UserError | None:
    """Train as `config` says, as one of the processes of `group`; all that uses the group ends with this function.

    Returns what is to be raised when the processes have parted: an exit status after a signal, or the failure to save.
    """
    dtype = device.resolve_dtype(config.dtype, group.device)
    autocast = device.autocast(group.device, dtype)
    device.set_up(group.device, config.seed)
    kept = config.keep_memory and group.device == "cpu" and device.keep_memory()
    sharded = config.parallel == "fsdp" and group.launched
    if sharded and config.sample_interval:
        raise UserError("--sample_interval needs the whole model in one process, and --parallel=fsdp shares it out: give 0")
    if sharded and dtype == torch.float16:
        raise UserError("--parallel=fsdp does not scale the loss, as float16 needs: give --dtype=bfloat16 or --dtype=float32")

    data = Dataset(config.dataset)
    model, start = build_model(config, data, weightless=sharded and not group.is_main)
    T, vocab_size = model.config.block_size, model.config.vocab_size
    data.check(T, vocab_size)
    steps = config.gradient_accumulation_steps = micro_batches(config, T, group.size)
    windows = steps * config.batch_size
    if config.activation_checkpointing:
        parallel.recompute_activations(model)
    if sharded:
        parallel.shard(model, group, dtype)
    else:
        model.to(group.device)
    device_type, betas = torch.device(group.device).type, (config.beta1, config.beta2)
    optimizer = model.configure_optimizers(
        config.weight_decay, config.learning_rate, betas, device_type, config.optimizer == "muon", config.fused
    )
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == torch.float16)
    iteration, evaluated, stale, best_val_loss, saved = 0, -1, 0, math.inf, (-1, -1)
    wandb_id = None
    if start is not None and config.init_from == "resume":
        checkpoint.restore_optimizer(start, optimizer, scaler)
        iteration, best_val_loss = start.iter_num, start.best_val_loss
        evaluated, stale = start.extra.get("evaluated", -1), start.extra.get("stale", 0)
        saved = iteration, evaluated
        wandb_id = start.extra.get("wandb")
    del start  # its tensors are in the model and the optimizer now
    compiling = device.resolve_compile(config.compile, group.device)
    compiled = parallel.compiled(model) if compiling else model
    network = DistributedDataParallel(compiled) if group.size > 1 and not sharded else compiled

    loss_rows = resolve_loss_rows(config.loss_rows, group.device, config.batch_size * T, vocab_size)
    signals = guard.Signals()
    if config.eval_only:
        losses = evaluate(compiled, data, config, group, autocast, loss_rows, signals)
        if group.is_main:
            print(f"step {iteration}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        return None

    out_dir = Path(config.out_dir)
    resolved = dataclasses.asdict(config)
    wandb_run = None
    if group.is_main:
        if config.wandb_log:
            wandb_run = start_wandb(config.wandb_project, config.wandb_run_name, resolved, wandb_id)
            wandb_id = wandb_run.id
        if config.init_from != "resume":
            set_aside(out_dir)
        write_config(out_dir / "config.json", resolved)
    description = data.describe() | ({} if wandb_id is None else {"wandb": wandb_id})
    saver = checkpoint.Saver(out_dir, model, optimizer, scaler, description, resolved, saved, group.is_main)
    metrics = Metrics(out_dir, config.max_iters, windows * T, iteration, evaluated, group.is_main, wandb_run)
    chosen = [str(dtype).removeprefix("torch.") + " products", "compiled" if compiling else "not compiled"]
    chosen += [("fused " if config.fused else "") + {"adamw": "AdamW", "muon": "AdamW, and Muon"}[config.optimizer]]
    chosen += [f"loss in chunks of {loss_rows} positions"] * (loss_rows > 0) + ["memory kept"] * kept
    chosen += ["activations recomputed"] * config.activation_checkpointing + ["sharded"] * sharded
    metrics.say(summary(config, model, data, group, ", ".join(chosen)))
    if config.init_from == "resume":
        metrics.say(f"resuming after {iteration:,} of {config.max_iters:,} iterations")
    if iteration >= config.max_iters:
        metrics.say("nothing is left to do; a larger --max_iters continues the run")

    peak = device.peak_flops(group.device, dtype)
    mfu, logged, t0 = -1.0, iteration, time.perf_counter()
    stopping, lost = False, None
    batches = training_batches(data, config, group, iteration, T, vocab_size)
    with metrics, signals, Curves(out_dir, group.is_main) as curves:
        try:
            x, y = next(batches)  # (B, T) each
            while True:
                learning_rate = config.learning_rate
                if config.decay_lr:
                    learning_rate = get_lr(iteration, learning_rate, config.min_lr, config.warmup_iters, config.lr_decay_iters)
                for param_group in optimizer.param_groups:
                    param_group["lr"] = learning_rate

                # evaluate, and write checkpoints
                finished = iteration >= config.max_iters
                if (finished or iteration % config.eval_interval == 0) and evaluated != iteration:
                    device.synchronize(group.device)
                    t1 = time.perf_counter()
                    metrics.pause("evaluating")
                    losses = evaluate(compiled, data, config, group, autocast, loss_rows, signals)
                    if losses is None:
                        stopping = True
                        break
                    stop_unless_finite(iteration, out_dir, {f"{split} loss": loss for split, loss in losses.items()})
                    evaluated, improved = iteration, losses["val"] < best_val_loss
                    best_val_loss, stale = min(best_val_loss, losses["val"]), 0 if improved else stale + 1
                    metrics.evaluation(iteration, losses, learning_rate, mfu, best_val_loss)
                    if iteration > 0:
                        metrics.sync()
                        is_best = improved or config.always_save_checkpoint
                        saver.save(iteration, best_val_loss, evaluated, stale, is_best)
                        curves.update()
                    t0 += time.perf_counter() - t1  # what follows is timed without this
                if config.sample_interval and iteration % config.sample_interval == 0 < iteration and not signals.received:
                    device.synchronize(group.device)
                    t1 = time.perf_counter()
                    if group.is_main:
                        metrics.pause("sampling")
                        text = sample(model, data, config.seed, iteration, group.device, signals)
                        metrics.say(f"--- sample after {iteration:,} iterations\n{text}\n---")
                    t0 += time.perf_counter() - t1
                stopping = stopping or (group.size == 1 and signals.received > 0)
                if finished or stopping or 0 < config.patience <= stale:
                    break

                # forward and backward over this process's share of the micro-batches
                loss = 0.0
                for micro_batch in range(group.rank, steps, group.size):
                    if config.dropout > 0:
                        device.seed_dropout(config.seed, iteration, micro_batch)
                    if isinstance(network, DistributedDataParallel):
                        network.require_backward_grad_sync = micro_batch + group.size >= steps  # only with the last one
                    with autocast:
                        _, micro_loss = network(x, y, loss_rows=loss_rows)
                    x, y = next(batches)  # while the device computes
                    loss += micro_loss.detach() / steps
                    scaler.scale(micro_loss * group.size / steps).backward()  # averaged over the processes, this is the mean

                # update the weights, unless something is wrong with the gradient
                scaler.unscale_(optimizer)
                grad_norm = parallel.clip_gradient(model, config.grad_clip)
                due = saver.is_due(iteration, config.checkpoint_interval, config.checkpoint_minutes)
                loss, due, signalled = group.sum(loss.item(), due, signals.received)
                stopping = signalled > 0  # all processes after the same update, whichever of them has got a signal

                # with a scaler, a norm that is not finite is its own business: it skips the update and lowers its scale
                numbers = {"loss": loss} if scaler.is_enabled() else {"loss": loss, "norm of the gradient": grad_norm}
                stop_unless_finite(iteration, out_dir, numbers)
                if due and not stopping:
                    t1 = time.perf_counter()  # saved this late, since only now the state is known to be sound
                    metrics.sync()
                    saver.save(iteration, best_val_loss, evaluated, stale, is_best=False)
                    t0 += time.perf_counter() - t1
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)

                # log
                metrics.advance(clipped=0 < config.grad_clip < grad_norm)
                if iteration % config.log_interval == 0:
                    now = time.perf_counter()
                    seconds = (now - t0) / (iteration + 1 - logged)
                    t0, logged = now, iteration + 1
                    if peak is not None:
                        utilisation = model.estimate_mfu(windows, seconds, peak * group.size)
                        mfu = utilisation if mfu < 0 else 0.9 * mfu + 0.1 * utilisation
                    memory = device.peak_memory(group.device)
                    metrics.step(iteration, loss, learning_rate, grad_norm, seconds, windows * T / seconds, mfu, memory)
                iteration += 1
        except FileLost as error:  # before the update: the state is whole, and worth more than what was read
            lost = error
        if (iteration > 0 or stopping) and not (lost and sharded):  # to gather the shares takes all processes
            metrics.sync()
            saver.save(iteration, best_val_loss, evaluated, stale, is_best=False)

    if lost is not None:
        raise lost  # at once: the other processes may wait for this one where it will not come
    if saver.failure:
        return UserError(f"the newest state could not be saved ({saver.failure}); make room there, and resume the run")
    if group.is_main and (out_dir / "loss.png").exists():
        print(f"curves in {out_dir / 'loss.png'}")
    if group.is_main and (out_dir / checkpoint.BEST).exists():
        print(f"best val loss {best_val_loss:.4f}; checkpoint in {out_dir / checkpoint.BEST}")
        print(f"next: python {'chat' if data.chat_format else 'sample'}.py --out_dir={shlex.quote(config.out_dir)}")
    if group.is_main and 0 < config.patience <= stale:
        print(f"stopped early: {stale} evaluations without a better validation loss; a larger --patience continues the run")
    if not stopping:
        return None
    number = signals.received or signal.SIGTERM
    if group.is_main:
        launcher = "python" if group.size == 1 else f"torchrun --standalone --nproc_per_node={group.size}"
        name = signal.Signals(number).name
        print(f"{name}: stopped and saved after {iteration:,} of {config.max_iters:,} iterations; to go on:")
        print(f"  {launcher} train.py --init_from=resume --out_dir={shlex.quote(config.out_dir)}")
    return SystemExit(128 + number)


def summary(config: Config, model: GPT | Bigram, data: Dataset, group: device.Group, chosen: str) -> str:
    """Return lines that tell what a run is: the model, the data, how long it goes on, where, and, in `chosen`, how."""
    tokens, each = data.tokens["train"], config.gradient_accumulation_steps * config.batch_size * model.config.block_size
    keys = ["block_size"] if config.model == "bigram" else ["n_layer", "n_head", "n_embd", "block_size"]
    shape = ", ".join(f"{key}={getattr(model.config, key)}" for key in keys)
    return (
        f"model: {config.model}, {model.get_num_params():,} parameters, {shape}\n"
        f"data: {config.dataset} ({data.tokenizer})\n"
        f"      {tokens:,} tokens to train, {data.tokens['val']:,} to validate\n"
        f"tokens per iteration: {each:,} ({tokens / each:,.0f} iterations an epoch)\n"
        f"run: {config.max_iters:,} iterations, {config.max_iters * each / tokens:,.2f} epochs\n"
        f"machine: {device.describe(group.device)}, {group.size} process{'es' if group.size > 1 else ''}\n"
        f"         {chosen}"
    )


def set_aside(out_dir: Path) -> None:
    """Move an earlier run's files to a folder in `out_dir`, in place of those there: a new run begins with none of them."""
    if not any((out_dir / name).exists() for name in (checkpoint.BEST, checkpoint.LAST)):
        return
    previous = out_dir / "previous"
    previous.mkdir(exist_ok=True)
    for name in RUN_FILES:
        (previous / name).unlink(missing_ok=True)
    for name in RUN_FILES:
        if (out_dir / name).exists():
            os.replace(out_dir / name, previous / name)
    errors.warn(f"{out_dir} held an earlier run, which lies in {previous} now")


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Write `config` as JSON for people to read; a full disk is a warning, since no run depends on the file."""
    part = path.with_name(path.name + ".tmp")
    try:
        part.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        errors.warn(f"{path} is not written: {error.strerror}")
        part.unlink(missing_ok=True)


def build_model(config: Config, data: Dataset, weightless: bool = False) -> tuple[GPT | Bigram, checkpoint.Checkpoint | None]:
    """Return the model to train, on the CPU, and the checkpoint that it comes from; None when it starts from scratch.

    A `weightless` one takes no memory: it is to get its weights from another process.
    """
    vocab_size = data.tokenizer.model_vocab_size
    if config.init_from == "scratch":
        shape = GPTConfig(
            block_size=config.block_size,
            vocab_size=vocab_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            dropout=config.dropout,
            bias=config.bias,
        )
        return checkpoint.skeleton(config.model, shape) if weightless else checkpoint.MODELS[config.model](shape), None
    model, tokenizer, start = checkpoint.load_model(config.init_from, config.out_dir, config.dropout, True, weightless)
    if tokenizer.to_dict() != data.tokenizer.to_dict():
        raise UserError(
            f"{start.path} was trained on {tokenizer}, and dataset '{config.dataset}' has another tokenizer "
            f"({data.tokenizer}): choose a dataset with the same one"
        )
    inherit_shape(config, start)
    if config.block_size < model.config.block_size:
        model.crop_block_size(config.block_size)
    return model, start


def micro_batches(config: Config, T: int, processes: int) -> int:
    """Return the number of micro-batches in an iteration over windows of `T` tokens; UserError where they cannot be shared out.

    Where batch_tokens says how many tokens they have together, it counts, whatever gradient_accumulation_steps is.
    """
    steps = config.gradient_accumulation_steps
    if config.batch_tokens:
        least = config.batch_size * T * processes
        if config.batch_tokens % least:
            below = config.batch_tokens // least * least
            raise UserError(
                f"batch_tokens={config.batch_tokens} is no multiple of batch_size={config.batch_size} x {T} tokens x "
                f"{processes} process{'es' if processes > 1 else ''} = {least}: "
                f"give {f'{below} or ' if below else ''}{below + least}, or another --batch_size"
            )
        return config.batch_tokens // (config.batch_size * T)
    if steps % processes:
        raise UserError(
            f"gradient_accumulation_steps={steps} micro-batches cannot be shared out evenly between {processes} processes: "
            f"give a multiple of {processes}, such as {-(-steps // processes) * processes}"
        )
    return steps


def inherit(config: Config, start: checkpoint.Checkpoint) -> None:
    """Give every key that was not set by hand the value of the run in `start`."""
    kept = set(config.given) | {"init_from", "out_dir"}
    if "gradient_accumulation_steps" in config.given:
        kept.add("batch_tokens")  # which would set it
    for field in dataclasses.fields(config):
        if field.name in start.config and field.name not in kept:
            value = configurator.check_value(Config, field.name, start.config[field.name], str(start.path))
            setattr(config, field.name, value)
    if "device" not in config.given:
        try:
            device.resolve_device(config.device)
        except UserError:  # the run began on another kind of machine
            for name in {"device", "dtype", "compile", "backend"} - config.given:
                setattr(config, name, "auto")


def inherit_shape(config: Config, start: checkpoint.Checkpoint) -> None:
    """Give the keys of the model's shape the checkpoint's values; a line names each that was set to another one."""
    shape = {name: start.model_args[name] for name in ("n_layer", "n_head", "n_embd", "bias", "block_size")}
    shape["model"] = start.kind
    for name, value in shape.items():
        cropped = name == "block_size" and config.init_from != "resume" and config.block_size < value
        if name in config.given and getattr(config, name) != value and not cropped:
            errors.warn(f"{start.path} has {name}={value}, used instead of {name}={getattr(config, name)}")
        if not (name in config.given and cropped):
            setattr(config, name, value)


def get_lr(iteration: int, learning_rate: float, min_lr: float, warmup_iters: int, lr_decay_iters: int) -> float:
    """Return the learning rate of an iteration: linear warmup, a half cosine down to `min_lr`, and `min_lr` after it."""
    if iteration < warmup_iters:
        return learning_rate * (iteration + 1) / (warmup_iters + 1)
    if iteration >= lr_decay_iters:
        return min_lr
    progress = (iteration - warmup_iters) / (lr_decay_iters - warmup_iters)  # from 0 to 1
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def training_batches(
    data: Dataset, config: Config, group: device.Group, iteration: int, block_size: int, vocab_size: int
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield this process's micro-batches from `iteration` on, on its device: (x, y), each (batch_size, block_size)."""
    steps, size = config.gradient_accumulation_steps, config.batch_size
    while True:
        starts = data.draw("train", "train", config.seed, iteration, steps * size, block_size)  # (steps * size,)
        for micro_batch in range(group.rank, steps, group.size):
            chosen = starts[micro_batch * size : (micro_batch + 1) * size]
            yield device.to_device(data.windows("train", chosen, block_size, vocab_size), group.device)
        iteration += 1


def resolve_loss_rows(choice: int | Literal["auto"], device: str, positions: int, vocab_size: int) -> int:
    """Return how many of a micro-batch's positions may have their logits in memory at a time; 0 for all."""
    if choice != "auto":
        return choice
    return 256 if device == "cpu" and 4 * positions * vocab_size > LOGITS else 0


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    data: Dataset,
    config: Config,
    group: device.Group,
    autocast: AbstractContextManager,
    loss_rows: int,
    signals: guard.Signals,
) -> dict[Split, float] | None:
    """Return the mean loss of each split in nats a token: on the same random windows every time, or on the whole split.

    The processes of `group` share the work, and all get the result; None where a signal has come to one of them.
    """
    model.eval()
    losses = {}
    sharded = parallel.is_sharded(model)  # all processes must do as many passes then
    for split in data.tokens:
        total = count = interrupted = 0.0
        for batches in rounds(evaluation_batches(data, split, config), group.size):
            (interrupted,) = group.sum(signals.received) if sharded else (signals.received,)
            is_mine = group.rank < len(batches)
            if interrupted or not (is_mine or sharded):
                break
            starts, length = batches[group.rank if is_mine else -1]  # the last one again is not counted
            x, y = device.to_device(data.windows(split, starts, length, model.config.vocab_size), group.device)
            with autocast:
                _, loss = model(x, y, loss_rows=loss_rows)
            learned = (y != -1).sum().item() if is_mine else 0
            total += loss.item() * learned if learned else 0.0
            count += learned
        total, count, interrupted = group.sum(total, count, signals.received)
        if interrupted:
            break
        losses[split] = total / count if count else math.nan
    model.train()
    return None if interrupted else losses


def evaluation_batches(data: Dataset, split: Split, config: Config) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (starts, length) of each batch of windows that an evaluation of `split` takes."""
    if config.eval_iters == 0:
        yield from data.consecutive(split, config.block_size, config.batch_size)
    for index in range(config.eval_iters):
        stream = "eval_train" if split == "train" else "eval_val"
        yield data.draw(split, stream, config.seed, index, config.batch_size, config.block_size), config.block_size


def sample(model: GPT | Bigram, data: Dataset, seed: int, iteration: int, where: str, signals: guard.Signals) -> str:
    """Return a short text that the model writes by itself, or its reply to the first message of the validation split.

    What is random in training is left alone.
    """
    tokenizer, stop, text = data.tokenizer, [END_OF_TEXT], ""
    ids = conversation.separator(tokenizer) or [0]
    if data.chat_format is not None:
        inputs, targets = data.windows("val", np.zeros(1, np.int64), model.config.block_size, model.config.vocab_size)
        header = int((targets[0] == -1).long().cumprod(0).sum())  # the targets before the first that is learned
        ids = inputs[0, : header + 1].tolist()
        stop, text = [data.chat_format.stop, END_OF_TEXT], tokenizer.decode(ids)
    decoder = StreamDecoder(tokenizer, stop)
    model.eval()
    generators = device.text_generators(seed, [iteration], where)
    options = {"temperature": 0.8, "top_k": 200, "vocab_size": tokenizer.vocab_size, "generators": generators}
    for token in model.stream(torch.tensor([ids], device=where), SAMPLE_TOKENS, **options):
        text += decoder.feed(token.item())
        if decoder.stopped or signals.received:
            break
    model.train()
    return (text + decoder.finish()).strip()


def rounds(batches: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of `size` batches; the last one may be shorter."""
    while taken := list(itertools.islice(batches, size)):
        yield taken


def stop_unless_finite(iteration: int, out_dir: Path, numbers: dict[str, float]) -> None:
    """Raise UserError where one of `numbers`, losses and the like by what they are of, is infinite or not a number."""
    bad = [f"the {name} is {number}" for name, number in numbers.items() if not math.isfinite(number)]
    if bad:
        last = out_dir / checkpoint.LAST
        kept = f"{last} has the last good state" if last.exists() else "no checkpoint was written yet"
        raise UserError(f"iteration {iteration}: {bad[0]}; the run stops; {kept}; try a lower --learning_rate or --grad_clip")


def _nearest(n_embd: int, n_head: int) -> str:
    divisors = [count for count in range(1, n_embd + 1) if n_embd % count == 0]
    below, above = max(d for d in divisors if d < n_head), [d for d in divisors if d > n_head][:1]
    return f"try --n_head={' or '.join(map(str, [below, *above]))}"


if __name__ == "__main__":
    configurator.run(main, Config)
