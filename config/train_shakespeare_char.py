# Train a small GPT on the characters of Shakespeare, on one GPU: good for a first try, and for debugging.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char.py
#   python sample.py --out_dir=out-shakespeare-char
#
# Expect a best validation loss of about 1.476, at iteration 1,750; all 5,000 iterations take 106 s on an H200
# (docs/benchmarks.md). nanoGPT reports 1.4697 after 3 minutes on an A100.

out_dir = "out-shakespeare-char"
eval_interval = 250  # often, since the model overfits this small text
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # it overfits: keep the best checkpoint

wandb_log = False
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # characters of context; 64 x 256 = 16,384 tokens per iteration

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # small networks can use a higher learning rate
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # higher than 0.95, since an iteration has few tokens
warmup_iters = 100
