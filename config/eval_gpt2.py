# Evaluate OpenAI's GPT-2 with 124M parameters on OpenWebText, without training; --dataset=NAME takes another dataset.
#
#   python data/openwebtext/prepare.py
#   python train.py config/eval_gpt2.py
#
# nanoGPT reports a validation loss of 3.12; not measured here.

init_from = "gpt2"
eval_only = True
eval_iters = 500  # many batches, for an accurate estimate
batch_size = 8
wandb_log = False
