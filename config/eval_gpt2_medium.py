# Evaluate OpenAI's GPT-2 with 350M parameters on OpenWebText, without training; --dataset=NAME takes another dataset.
#
#   python data/openwebtext/prepare.py
#   python train.py config/eval_gpt2_medium.py
#
# nanoGPT reports a validation loss of 2.84; not measured here.

init_from = "gpt2-medium"
eval_only = True
eval_iters = 500  # many batches, for an accurate estimate
batch_size = 8
wandb_log = False
