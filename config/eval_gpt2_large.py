# Evaluate OpenAI's GPT-2 with 774M parameters on OpenWebText, without training; --dataset=NAME takes another dataset.
#
#   python data/openwebtext/prepare.py
#   python train.py config/eval_gpt2_large.py
#
# nanoGPT reports a validation loss of 2.67; not measured here.

init_from = "gpt2-large"
eval_only = True
eval_iters = 500  # many batches, for an accurate estimate
batch_size = 8
wandb_log = False
