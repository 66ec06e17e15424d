"""Training on Accelerate: `python -m vfmtok_hf.training.train_tokenizer`, `... train_generator`."""
