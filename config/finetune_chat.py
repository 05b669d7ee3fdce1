# Finetune GPT-2 on your own conversations, for chat.py.
#
#   python data/chat/prepare.py --input=mine.jsonl --tokenizer=gpt2
#   python train.py config/finetune_chat.py
#   python chat.py --out_dir=out-chat-gpt2
#
# Without --input, prepare.py takes 600 synthetic conversations. To finetune your own model, prepare them with the tokenizer of
# the dataset that it was trained on. Here it is shakespeare_char, whose characters lack the < and > of the other chat formats;
# a model this small needs a higher learning rate and more iterations:
#
#   python data/chat/prepare.py --tokenizer=shakespeare_char --chat_format=plain
#   python train.py config/finetune_chat.py --init_from=out-shakespeare-char --learning_rate=3e-4 --max_iters=1000
#
# Loss and time are not measured here: that needs GPT-2's weights.

out_dir = "out-chat-gpt2"
eval_interval = 20
eval_iters = 20
log_interval = 1
always_save_checkpoint = False  # it overfits quickly: keep the best checkpoint

wandb_project = "chat"
wandb_run_name = "ft-chat"

dataset = "chat"
init_from = "gpt2"  # 124M parameters; gpt2-medium, gpt2-large and gpt2-xl are better but need more memory

# 4 sequences x 8 micro-batches x 256 tokens = 8,192 tokens per iteration. The model's context is cropped to this block_size:
# take --block_size=1024 for longer conversations (prepare.py prints the longest), or to keep GPT-2's whole context.
batch_size = 4
gradient_accumulation_steps = 8
block_size = 256
max_iters = 200

dropout = 0.1
weight_decay = 0.1

learning_rate = 3e-5  # low and constant, as usual for finetuning
decay_lr = False
