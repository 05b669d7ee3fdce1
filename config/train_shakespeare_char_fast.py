# Train the small GPT of train_shakespeare_char_cpu.py to a lower loss: with Muon, larger batches, and a higher learning rate.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char_fast.py
#   python sample.py --out_dir=out-shakespeare-char-fast
#
# Expect a validation loss of about 1.59 after 30 to 70 s on two CPU cores with bfloat16 instructions, and after some two
# minutes without (docs/benchmarks.md). With --max_iters=2000 --lr_decay_iters=2000 it is 1.50.

out_dir = "out-shakespeare-char-fast"
eval_interval = 200
eval_iters = 20
log_interval = 1
always_save_checkpoint = False  # keep the best checkpoint

wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt-fast"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 32  # 32 x 64 = 2,048 tokens per iteration, over which the 7 to 11 ms of a Muon step are spread
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

optimizer = "muon"
learning_rate = 1e-2  # ten times the rate that suits AdamW
max_iters = 800
lr_decay_iters = 800
min_lr = 1e-4
warmup_iters = 50

device = "cpu"
