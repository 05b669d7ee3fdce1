# Train a small GPT on the source code of Python's standard library, by character: nothing to download, and about ten times the
# text of Tiny Shakespeare.
#
#   python data/python_char/prepare.py
#   python train.py config/train_python_char.py
#   python sample.py --out_dir=out-python-char --start="def "
#
# Expect a validation loss of about 1.59 (Python 3.11) after 75 s on two CPU cores (docs/benchmarks.md).

out_dir = "out-python-char"
eval_interval = 250
eval_iters = 20
log_interval = 10
always_save_checkpoint = False

wandb_project = "python-char"
wandb_run_name = "mini-gpt"

dataset = "python_char"
gradient_accumulation_steps = 1
batch_size = 12
block_size = 128  # indentation and open brackets need a longer context; 12 x 128 = 1,536 tokens per iteration

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0  # cannot overfit: 2,000 iterations see only a third of the text

learning_rate = 1e-3
max_iters = 2000
lr_decay_iters = 2000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
