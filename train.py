"""Train a GPT: from scratch, from an interrupted run, or from pretrained weights; on one process or many.

python train.py config/train_shakespeare_char_cpu.py             a small model on a laptop
python train.py --init_from=resume --out_dir=out                 continue the run in out/
torchrun --standalone --nproc_per_node=8 train.py config/...     eight processes on one machine

Ctrl-C and SIGTERM save the run and stop it; --init_from=resume continues it, on a CPU with exactly the same result.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out

import configurator
from configurator import LossRows, NonNegativeFloat, NonNegativeInt, PathStr, PositiveFloat, PositiveInt, Probability, Seed

import torch
from torch.nn.parallel import DistributedDataParallel

from model import GPT, Bigram, GPTConfig
from nanogpt.checkpoint import (
    MODELS,
    Checkpoint,
    build_model,
    empty_model,
    open_checkpoint,
    require_tokenizer,
    restore_optimizer,
)
from nanogpt.dataset import Dataset
from nanogpt.device import (
    Compile,
    Dtype,
    autocast,
    explain_out_of_memory,
    keep_memory,
    moved_settings,
    pick_compile,
    pick_dtype,
    pick_loss_rows,
    seed_dropout,
    set_up,
    to_device,
    uses_onednn,
)
from nanogpt.distributed import Group, clip_gradient, parallelize, process_group, share_batch
from nanogpt.errors import UserError, warn
from nanogpt.evaluation import count_token_bytes, estimate_loss, sample_text
from nanogpt.optim import OptimizerName, build_optimizer
from nanogpt.run import Run, Signals, TrainState, every


@dataclass(frozen=True)
class Config(configurator.Config):
    # run
    out_dir: PathStr = "out"  # folder of the run: checkpoints, metrics.csv, loss.png, config.json
    init_from: PathStr = "scratch"  # scratch, resume (out_dir), a run folder, a checkpoint file, gpt2, gpt2-xl, a Hub id ...
    eval_interval: PositiveInt = 2000  # iterations between evaluations
    eval_iters: NonNegativeInt = 200  # batches per split in an evaluation; 0: the whole split
    eval_only: bool = False  # print loss, perplexity and bits per byte of both splits, and exit
    log_interval: PositiveInt = 1  # iterations between printed losses
    always_save_checkpoint: bool = True  # write ckpt.pt at every evaluation but the first; False: only if the loss improved
    checkpoint_interval: NonNegativeInt = 0  # also save last.pt every this many iterations; 0: never
    checkpoint_minutes: NonNegativeFloat = 15  # also save last.pt this many minutes after the last save; 0: never
    sample_interval: NonNegativeInt = 0  # iterations between short samples of the model's text; 0: none
    patience: NonNegativeInt = 0  # stop after this many evaluations without improvement; 0: never
    seed: Seed = 1337  # random seed of initial weights, batches and dropout
    # Weights & Biases
    wandb_log: bool = False  # also log to Weights & Biases
    wandb_project: str = "owt"  # W&B project
    wandb_run_name: str = "gpt2"  # W&B run name
    # data
    dataset: PathStr = "openwebtext"  # a folder with train.bin and val.bin: a name in data/, or a path
    gradient_accumulation_steps: PositiveInt = 5 * 8  # micro-batches per iteration, over all processes
    batch_tokens: NonNegativeInt = 0  # tokens per iteration, instead of gradient_accumulation_steps; 0: not used
    batch_size: PositiveInt = 12  # sequences per micro-batch
    block_size: PositiveInt = 1024  # context length, in tokens
    # model
    model: Literal["gpt", "bigram"] = "gpt"  # gpt, or the bigram baseline, which has a table and nothing else
    n_layer: PositiveInt = 12  # transformer blocks
    n_head: PositiveInt = 12  # attention heads per block
    n_embd: PositiveInt = 768  # channels, a multiple of n_head
    dropout: Probability = 0.0  # dropout rate; 0 for pretraining, 0.1 or more for finetuning
    bias: bool = False  # biases in Linear and LayerNorm layers; False is slightly better and faster
    # optimizer
    optimizer: OptimizerName = "adamw"  # muon: Muon for the matrices of the blocks, AdamW for the rest
    learning_rate: PositiveFloat = 6e-4  # maximum learning rate
    max_iters: NonNegativeInt = 600000  # total number of updates
    weight_decay: NonNegativeFloat = 1e-1  # weight decay, of matrices and embeddings only
    beta1: Probability = 0.9  # AdamW's decay rate for the mean of gradients, and Muon's momentum
    beta2: Probability = 0.95  # AdamW's decay rate for the mean of squared gradients
    grad_clip: NonNegativeFloat = 1.0  # clip the gradient to this norm; 0: no clipping
    # learning rate schedule
    decay_lr: bool = True  # linear warmup, then cosine decay
    warmup_iters: NonNegativeInt = 2000  # iterations of warmup
    lr_decay_iters: NonNegativeInt = 600000  # iteration at which the decay ends; about max_iters (Chinchilla)
    min_lr: NonNegativeFloat = 6e-5  # final learning rate; about learning_rate / 10 (Chinchilla)
    # machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Dtype = "auto"  # mixed precision; auto: bf16/fp16 where the device supports it. float16 uses a GradScaler
    compile: Compile = "auto"  # use torch.compile; auto: on CUDA if there is a C compiler
    fused: bool = True  # fused AdamW, on CUDA and CPUs
    loss_rows: LossRows = "auto"  # tokens per chunk of the cross-entropy; 0: no chunks. auto: 256 on a CPU if they save memory
    keep_memory: bool = True  # on Linux CPUs: reuse freed memory instead of returning it to the system
    onednn: bool = True  # on AMD CPUs with AVX-512: float32 Linear layers by oneDNN, not MKL
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # torch.distributed backend; auto: nccl on CUDA, else gloo
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
    """Settings resolved for this machine, such as dtype="auto". Not saved: every start resolves them again."""

    dtype: torch.dtype
    compile: bool
    loss_rows: int  # tokens per chunk of the cross-entropy; 0: no chunks
    keeps_memory: bool
    sharded: bool
    micro_batches: int  # per iteration, over all processes


def main(config: Config) -> None:
    ckpt = None
    if config.init_from != "scratch":
        with explain_out_of_memory("start from a smaller model"):
            ckpt = open_checkpoint(config.init_from, config.out_dir, newest_state=not config.eval_only)
    config = resolve_config(config, ckpt)
    steps = f" and raise --gradient_accumulation_steps (now {config.gradient_accumulation_steps}) to match"
    advice = (
        f"lower --batch_size (now {config.batch_size}){'' if config.batch_tokens else steps}, or use "
        "--activation_checkpointing=True, which changes no result; or lower --block_size, --n_layer or --n_embd"
    )
    with explain_out_of_memory(advice), process_group(config.device, config.backend) as group:
        error = evaluate_only(config, group, ckpt) if config.eval_only else train(config, group, ckpt)
    if error is not None:
        raise error  # now that the process group is closed


def train(config: Config, group: Group, ckpt: Checkpoint | None) -> SystemExit | UserError | None:
    """Run the training loop. Returns its error or exit status, to be raised after the process group is closed, or None.

    Keep no reference to the group outside this function: a live one may abort the process at exit; see process_group.
    """
    with Run(Path(config.out_dir), group) as run:
        # set up data, model and optimizer
        data = Dataset(config.dataset)
        machine = resolve_machine(config, group, ckpt, data)
        model, ckpt = load_or_init(config, data, ckpt, empty=machine.sharded and not group.is_main)  # FSDP: from rank 0
        eval_model, train_model = parallelize(  # both share the weights of model: compiled if wanted; the second in DDP
            model, group, machine.dtype, machine.sharded, machine.compile, config.activation_checkpointing, config.onednn
        )
        betas = (config.beta1, config.beta2)
        device_type = torch.device(group.device).type
        optimizer = build_optimizer(
            model, config.optimizer, config.weight_decay, config.learning_rate, betas, device_type, config.fused
        )
        scaler = torch.amp.GradScaler(device_type, enabled=machine.dtype == torch.float16)
        resumed = config.init_from == "resume"
        state = TrainState.from_checkpoint(ckpt) if resumed else TrainState()
        if resumed:
            restore_optimizer(ckpt, optimizer, scaler)
        if ckpt is not None:
            ckpt.release()  # its tensors are in the model and the optimizer now

        # set up logging, evaluation and batches
        sequences_per_iter = machine.micro_batches * config.batch_size
        values = dataclasses.asdict(config)
        run.begin(state, model, optimizer, scaler, data.describe(), values, resumed, sequences_per_iter, machine.dtype)
        run.say(run.summary(data, choices(config, machine, device_type), config.ignored))
        if resumed:
            run.say(f"resuming after {state.iter_num:,} of {config.max_iters:,} iterations")
        if state.iter_num >= config.max_iters:
            run.say("no iterations left; a larger --max_iters continues the run")
        mixed_precision = autocast(group.device, machine.dtype)
        eval_options = evaluation_options(config, machine, data, group)
        batches = training_batches(data, config, machine, group, state.iter_num, model.config.vocab_size)

        # training loop
        x, y, weight = next(batches)  # x, y (B, T); weight is 1 without a loss mask
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
                    evaluation = estimate_loss(eval_model, data, group, mixed_precision, run.signals, **eval_options)
                    if evaluation is None:  # interrupted by a signal, on all ranks
                        run.stop()
                        break
                    run.require_finite({f"{split} loss": loss for split, loss in evaluation.losses.items()})
                    improved = state.record_eval(evaluation.losses["val"])
                    run.log_eval(evaluation, lr)
                    run.save(best=improved or config.always_save_checkpoint)
                    run.update_curves()
            if every(config.sample_interval, state.iter_num) and state.iter_num > 0 and not run.signals.received:
                with run.paused("sampling"):
                    if group.is_main:
                        text = sample_text(model, data, config.seed, state.iter_num, group.device, run.signals)
                        run.say(f"--- sample after {state.iter_num:,} iterations\n{text}\n---")
            if run.stop_requested or state.finished(config.max_iters, config.patience):
                break

            # forward and backward, accumulating gradients; rank r takes micro-batches r, r + size, r + 2 * size ...
            loss = 0.0
            for micro_batch in range(group.rank, machine.micro_batches, group.size):
                if config.dropout > 0:
                    seed_dropout(config.seed, state.iter_num, micro_batch)  # the same on any number of ranks
                if isinstance(train_model, DistributedDataParallel):  # sync gradients in the last micro-batch only
                    train_model.require_backward_grad_sync = micro_batch + group.size >= machine.micro_batches
                with mixed_precision:
                    _, micro_loss = train_model(x, y, loss_rows=machine.loss_rows)
                micro_loss = micro_loss * weight / machine.micro_batches  # its part of the loss of the global batch
                loss += micro_loss.detach()
                scaler.scale(micro_loss * group.size).backward()  # times size: DDP and FSDP average gradients over ranks
                x, y, weight = next(batches)  # prefetch while the device computes

            # clip the gradient; all ranks agree on the loss, on saving and on stopping; save if due
            scaler.unscale_(optimizer)
            grad_norm = clip_gradient(model, config.grad_clip)
            loss = run.agree(loss.item())  # all-reduce (sum); also sets run.save_due and run.stop_requested
            run.require_finite({"loss": loss})
            run.require_finite_gradient(grad_norm)
            if run.save_due:  # before the update: these weights just gave a finite loss
                with run.paused("saving"):
                    run.save()

            # update the weights
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            run.log_step(loss, lr, grad_norm)
            state.iter_num += 1
        run.save()
    return run.ending("sample.py" if data.chat_format is None else "chat.py", config.ignored)


def evaluate_only(config: Config, group: Group, ckpt: Checkpoint | None) -> None:
    """Print loss, perplexity and bits per byte of both splits, and write nothing."""
    data = Dataset(config.dataset)
    machine = resolve_machine(config, group, ckpt, data)
    model, ckpt = load_or_init(config, data, ckpt, empty=machine.sharded and not group.is_main)
    eval_model, _ = parallelize(model, group, machine.dtype, machine.sharded, machine.compile, onednn=config.onednn)
    options = evaluation_options(config, machine, data, group)
    evaluation = estimate_loss(eval_model, data, group, autocast(group.device, machine.dtype), Signals(), **options)
    if group.is_main:
        print(evaluation.step_line(max(ckpt.iter_num, 0) if config.init_from == "resume" else 0), evaluation.report(), sep="\n")


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
) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """Yield this rank's micro-batches (x, y, weight) from `first_iter` on: x and y (batch_size, block_size), on its device.

    Each iteration draws one global batch and splits it, so that the batches do not depend on the number of ranks. The mean
    of weight x loss over all micro-batches is the loss of the global batch.
    """
    count, block_size = machine.micro_batches * config.batch_size, config.block_size
    for iteration in itertools.count(first_iter):
        starts = data.draw("train", "train", config.seed, iteration, count, block_size).reshape(machine.micro_batches, -1)
        weights = data.loss_weights("train", starts, block_size)
        for micro_batch in range(group.rank, machine.micro_batches, group.size):
            x, y = data.windows("train", starts[micro_batch], block_size, vocab_size)
            yield *to_device((x, y), group.device, static=machine.compile), weights[micro_batch]


# set-up


def resolve_config(config: Config, ckpt: Checkpoint | None) -> Config:
    """Take from the checkpoint what it fixes: the model's shape, and when resuming all keys that are not given.

    Raises UserError if the checkpoint's values do not fit.
    """
    values: dict[str, Any] = {}
    ignored: list[str] = []
    resumed = config.init_from == "resume"
    if resumed:
        kept = config.given | {"init_from", "out_dir"}  # not taken from the checkpoint
        if "gradient_accumulation_steps" in config.given:
            kept |= {"batch_tokens"}  # else the run's batch_tokens would override it
        for name in [field.name for field in dataclasses.fields(config) if field.name in ckpt.config.keys() - kept]:
            values[name] = configurator.check_value(Config, name, ckpt.config[name], str(ckpt.path))
        moved = moved_settings(ckpt.config, config.device if "device" in config.given else None)
        values |= {name: value for name, value in moved.items() if name not in config.given}
    if ckpt is not None:
        shape = {name: value for name, value in ckpt.model_args.items() if hasattr(config, name) and name != "dropout"}
        for name, value in (shape | {"model": ckpt.model_type}).items():
            given = getattr(config, name)
            if name == "block_size" and name in config.given and not resumed and given < value:
                continue  # the model is cropped
            if name in config.given and given != value:
                warn(f"{ckpt.path} has {name}={value}, used instead of {name}={given}")
                ignored.append(f"{name}={given} (the checkpoint has {value})")
            values[name] = value
    config = config.replace(ignored, **values)
    config.validate()
    return config


def resolve_machine(config: Config, group: Group, ckpt: Checkpoint | None, data: Dataset) -> Machine:
    """Resolve what depends on this machine, and set up PyTorch. Raises UserError if the keys do not fit it."""
    set_up(group.device, config.seed)
    dtype = pick_dtype(config.dtype, group.device)
    sharded = config.parallel == "fsdp" and group.launched
    if sharded and config.sample_interval:
        raise UserError("--sample_interval needs the whole model on one process, but --parallel=fsdp shards it; set it to 0")
    if sharded and dtype == torch.float16:
        raise UserError("--parallel=fsdp has no loss scaling for float16; use --dtype=bfloat16 or --dtype=float32")
    vocab_size = data.tokenizer.model_vocab_size if ckpt is None else ckpt.model_args["vocab_size"]
    batch = (config.gradient_accumulation_steps, config.batch_tokens, config.batch_size, config.block_size, group.size)
    return Machine(
        dtype=dtype,
        compile=pick_compile(config.compile, group.device),
        loss_rows=pick_loss_rows(config.loss_rows, group.device, config.batch_size * config.block_size, vocab_size),
        keeps_memory=config.keep_memory and group.device == "cpu" and keep_memory(),
        sharded=sharded,
        micro_batches=0 if config.eval_only else share_batch(*batch),
    )


def load_or_init(
    config: Config, data: Dataset, ckpt: Checkpoint | None, empty: bool = False
) -> tuple[GPT | Bigram, Checkpoint | None]:
    """Return the model to train, on the CPU, and its checkpoint, read into memory.

    An `empty` model takes no memory: it gets its weights from rank 0. Raises UserError if data and model do not fit.
    """
    vocab_size = data.tokenizer.model_vocab_size
    if ckpt is None:
        keys = [field.name for field in dataclasses.fields(GPTConfig) if hasattr(config, field.name)]
        shape = GPTConfig(vocab_size=vocab_size, **{key: getattr(config, key) for key in keys})
        model = empty_model(config.model, shape) if empty else MODELS[config.model](shape)
    else:
        require_tokenizer(ckpt, data.tokenizer, config.dataset)
        ckpt = ckpt if empty else ckpt.in_memory()
        model = build_model(ckpt, config.dropout, empty)
        if config.block_size < model.config.block_size:
            model.crop_block_size(config.block_size)
    data.check(config.block_size, model.config.vocab_size)
    return model, ckpt


def evaluation_options(config: Config, machine: Machine, data: Dataset, group: Group) -> dict[str, Any]:
    """Return the arguments of `estimate_loss` that stay the same during a run."""
    options = {key: getattr(config, key) for key in ("seed", "eval_iters", "batch_size", "block_size")}
    return options | {"loss_rows": machine.loss_rows, "byte_counts": count_token_bytes(data.tokenizer, group)}


def choices(config: Config, machine: Machine, device_type: str) -> str:
    """Return how a run computes, in the words that it prints."""
    adamw = "fused AdamW" if config.fused and device_type in ("cuda", "cpu") else "AdamW"
    chosen = [
        str(machine.dtype).removeprefix("torch."),
        "compiled" if machine.compile else "not compiled",
        f"Muon and {adamw}" if config.optimizer == "muon" else adamw,
        f"loss in chunks of {machine.loss_rows} tokens" if machine.loss_rows else "",
        "freed memory kept" if machine.keeps_memory else "",
        "oneDNN" if uses_onednn(config.onednn, device_type, machine.dtype, machine.compile) else "",
        "sharded" if machine.sharded else "",
        "activation checkpointing" if config.activation_checkpointing else "",
    ]
    return ", ".join(filter(None, chosen))


if __name__ == "__main__":
    configurator.run(main, Config)
