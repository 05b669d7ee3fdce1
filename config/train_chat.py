# Train a tiny chat model from scratch, in minutes on a laptop: 540 synthetic conversations (60 more validate), by character.
#
#   python data/chat/prepare.py
#   python train.py config/train_chat.py
#   python chat.py --out_dir=out-chat
#
# Expect a validation loss of about 0.04, on replies only, after 2 minutes on two CPU cores (docs/benchmarks.md). Nearly all
# replies in the validation conversations are then exactly right.

out_dir = "out-chat"
eval_interval = 500
eval_iters = 20
log_interval = 10
always_save_checkpoint = False

wandb_project = "chat"
wandb_run_name = "mini-chat"

dataset = "chat"
gradient_accumulation_steps = 1
batch_size = 8
block_size = 256  # fits every conversation; 8 x 256 = 2,048 tokens per iteration

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

learning_rate = 2e-3
max_iters = 2000
lr_decay_iters = 2000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100

device = "cpu"
compile = False
