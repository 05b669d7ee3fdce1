# Finetune GPT-2 on Tiny Shakespeare.
#
#   python data/shakespeare/prepare.py
#   python train.py config/finetune_shakespeare.py
#
# Not measured here yet: it needs the weights of GPT-2. To start from a model of your own, give --init_from=<its out_dir> and a
# dataset of the same tokenizer.

import time

out_dir = "out-shakespeare"
eval_interval = 5
eval_iters = 40
wandb_log = False  # turn it on if you like
wandb_project = "shakespeare"
wandb_run_name = "ft-" + str(time.time())

dataset = "shakespeare"
init_from = "gpt2-xl"  # the largest; gpt2, gpt2-medium and gpt2-large take less memory

always_save_checkpoint = False  # it overfits within a few iterations: keep the best

# 1 window x 32 micro-batches x 1,024 tokens = 32,768 tokens an iteration; the text has 301,966, so that 9.2 iterations are
# an epoch
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5  # low and constant
decay_lr = False
