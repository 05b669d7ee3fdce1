"""The plumbing behind the commands: data, checkpoints, devices, logging. To understand a GPT, read model.py and train.py."""
