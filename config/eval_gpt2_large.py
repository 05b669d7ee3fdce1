# Evaluate OpenAI's GPT-2 with 774M parameters on a dataset, OpenWebText by default; nothing is trained.
# Expect a loss of 2.67 on the validation split of OpenWebText, as nanoGPT reports.

init_from = "gpt2-large"
eval_only = True
eval_iters = 500  # many batches: a good estimate
batch_size = 8
wandb_log = False
