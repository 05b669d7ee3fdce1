# Characters of Shakespeare on one GPU: a small GPT, good for a first look and for debugging.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char.py
#   python sample.py --out_dir=out-shakespeare-char
#
# Expect a best validation loss of about 1.476 after 1,750 iterations, and 106 s for all of them on an H200 (BENCHMARKS.md);
# nanoGPT reports 1.4697 after some 3 minutes on an A100.

out_dir = "out-shakespeare-char"
eval_interval = 250  # often: this model overfits the small text
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # so keep the best

wandb_log = False
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # characters of context: 64 x 256 = 16,384 tokens an iteration

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # small networks bear a higher rate
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # few tokens an iteration: average over more of them
warmup_iters = 100
