# Characters of Shakespeare with the bigram model, from which "let's build GPT" starts: each character's successor is drawn
# from a row of a table, with no look at what came before.
#
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_bigram_char.py
#   python sample.py --out_dir=out-bigram-char
#
# No bigram model can do better than counting the pairs of characters: 2.452 on the training text, 2.484 on the validation
# text. Expect 2.490 on the latter after 6 s on two cores (BENCHMARKS.md has the machine).

out_dir = "out-bigram-char"
eval_interval = 1000
eval_iters = 0  # the whole split: the validation text is short
log_interval = 100
always_save_checkpoint = False

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 32
block_size = 8  # 32 x 8 = 256 tokens an iteration

model = "bigram"

# a table of logits bears high rates; the end of the decay averages the last batches
learning_rate = 1e-2
max_iters = 2000
lr_decay_iters = 2000
min_lr = 1e-4
warmup_iters = 0
beta2 = 0.99
weight_decay = 0.0  # decay would pull rare pairs back to an even chance
