# Finetune GPT-2 on conversations, for chat.py.
#
#   python data/chat/prepare.py --input=mine.jsonl --tokenizer=gpt2
#   python train.py config/finetune_chat.py
#   python chat.py --out_dir=out-chat-gpt2
#
# Without --input it is the 600 made-up conversations. To start from a model of your own, prepare with the tokenizer of the
# dataset that it was trained on, here one of Shakespeare's characters, which have no < and > for the other formats:
#
#   python data/chat/prepare.py --tokenizer=shakespeare_char --chat_format=plain
#   python train.py config/finetune_chat.py --init_from=out-shakespeare-char --learning_rate=3e-4 --max_iters=1000
#
# (so small a model wants a higher rate, and more iterations). Not measured here: it takes GPT-2's weights.

out_dir = "out-chat-gpt2"
eval_interval = 20
eval_iters = 20
log_interval = 1
always_save_checkpoint = False  # it overfits soon: keep the best

wandb_project = "chat"
wandb_run_name = "ft-chat"

dataset = "chat"
init_from = "gpt2"  # 124M parameters; gpt2-medium, gpt2-large and gpt2-xl know more and take more memory

# 4 windows x 8 micro-batches x 256 tokens = 8,192 tokens an iteration; prepare.py tells how long the longest conversation is,
# and the context shrinks to this one: give --block_size=1024 for long conversations, and for a model that keeps all of it
batch_size = 4
gradient_accumulation_steps = 8
block_size = 256
max_iters = 200

dropout = 0.1
weight_decay = 0.1

learning_rate = 3e-5  # low and constant
decay_lr = False
