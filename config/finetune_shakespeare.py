# Finetune GPT-2 on Tiny Shakespeare.
#
#   python data/shakespeare/prepare.py
#   python train.py config/finetune_shakespeare.py
#   python sample.py --out_dir=out-shakespeare
#
# To finetune your own model instead, give --init_from=<its out_dir> and a dataset with the same tokenizer. Loss and time are
# not measured here: that needs GPT-2's weights.

import time

out_dir = "out-shakespeare"
eval_interval = 5
eval_iters = 40
wandb_log = False  # set to True to log to Weights & Biases
wandb_project = "shakespeare"
wandb_run_name = "ft-" + str(time.time())

dataset = "shakespeare"
init_from = "gpt2-xl"  # the largest; gpt2, gpt2-medium and gpt2-large need less memory

always_save_checkpoint = False  # it overfits within a few iterations: keep the best checkpoint

# 1 sequence x 32 micro-batches x 1,024 tokens = 32,768 tokens per iteration; an epoch of 301,966 is 9.2 iterations
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5  # low and constant, as usual for finetuning
decay_lr = False
