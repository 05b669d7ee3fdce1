# Evaluate OpenAI's GPT-2 with 350M parameters on a dataset, OpenWebText by default; nothing is trained.
# Expect a loss of 2.84 on the validation split of OpenWebText, as nanoGPT reports.

init_from = "gpt2-medium"
eval_only = True
eval_iters = 500  # many batches: a good estimate
batch_size = 8
wandb_log = False
