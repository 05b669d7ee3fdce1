# Train a bigram model on the characters of Shakespeare, the baseline of the lecture "let's build GPT": it predicts the next
# character from the current one alone, by a table lookup.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_bigram_char.py
#   python sample.py --out_dir=out-bigram-char
#
# Expect a validation loss of 2.490 after 6 s on two CPU cores (docs/benchmarks.md). Counting pairs of characters, the best that
# a bigram model can do, gives 2.484 on the validation text and 2.452 on the training text.

out_dir = "out-bigram-char"
eval_interval = 1000
eval_iters = 0  # 0: evaluate whole splits, which is quick for a short text
log_interval = 100
always_save_checkpoint = False

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 32
block_size = 8  # 32 x 8 = 256 tokens per iteration

model = "bigram"

# a lookup table is stable at a high learning rate; decaying it averages out the noise of the last batches
learning_rate = 1e-2
max_iters = 2000
lr_decay_iters = 2000
min_lr = 1e-4
warmup_iters = 0
beta2 = 0.99
weight_decay = 0.0  # weight decay would pull rare pairs towards a uniform distribution
