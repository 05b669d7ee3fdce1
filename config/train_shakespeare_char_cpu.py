# Train a small GPT on the characters of Shakespeare, on a laptop: nanoGPT's command for CPUs, as a file.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char_cpu.py
#   python sample.py --out_dir=out-shakespeare-char-cpu
#
# Expect a validation loss of about 1.90 after 35 to 50 s on two CPU cores with bfloat16 instructions (docs/benchmarks.md), and
# after twice that without.

out_dir = "out-shakespeare-char-cpu"
eval_interval = 250
eval_iters = 20  # noisier than 200, but faster
log_interval = 1
always_save_checkpoint = False  # keep the best checkpoint

wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt-cpu"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64  # characters of context; 12 x 64 = 768 tokens per iteration

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0  # too small a model, and too few iterations, to overfit

learning_rate = 1e-3
max_iters = 2000
lr_decay_iters = 2000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100

device = "cpu"
compile = False
