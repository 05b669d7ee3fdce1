# Reproduce GPT-2 124M on OpenWebText, on 8 GPUs with 40 GB each.
#
#   python data/openwebtext/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
#
# nanoGPT reports a validation loss of about 2.85 after 5 days on 8 x A100; not measured here. The model's shape is train.py's
# default. --dataset=fineweb_edu trains on FineWeb-Edu instead; its losses are not comparable with these.

wandb_log = True  # needs "wandb login"; --wandb_log=False goes without
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# 12 sequences x 1,024 tokens x 5 micro-batches x 8 GPUs = 491,520 tokens per iteration, about the 0.5M of GPT-3's small models
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# about 300 billion tokens
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
