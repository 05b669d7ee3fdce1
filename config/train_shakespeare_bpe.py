# Train the small GPT of train_shakespeare_char_fast.py on tokens of a byte-pair encoding (BPE) instead of characters.
#
#   python data/shakespeare_bpe/prepare.py
#   python train.py config/train_shakespeare_bpe.py
#   python sample.py --out_dir=out-shakespeare-bpe
#
# Expect a validation loss of 3.84, and 2.18 bits per byte of the whole split, after 46 to 94 s on two CPU cores with bfloat16
# instructions. In the same time, characters end 0.1 and GPT-2's encoding 0.2 bits per byte worse (docs/benchmarks.md).
# Losses per token cannot be compared: a token is 2.6 characters here.

out_dir = "out-shakespeare-bpe"
eval_interval = 100
eval_iters = 20
log_interval = 10
always_save_checkpoint = False  # keep the best checkpoint

wandb_project = "shakespeare-bpe"
wandb_run_name = "mini-gpt-bpe"

dataset = "shakespeare_bpe"
gradient_accumulation_steps = 1
batch_size = 32
block_size = 64  # some 160 characters

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

optimizer = "muon"
learning_rate = 1e-2
max_iters = 825  # 4.9 epochs; with twice as many, the model learns the training text by heart
lr_decay_iters = 825
min_lr = 1e-4
warmup_iters = 50

device = "cpu"
