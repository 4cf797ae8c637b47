"""Other libraries' trainers and model hubs. Each module needs its library and is imported by name:

fourbit.integrations.transformers   Trainer, and from_pretrained of what it saved
fourbit.integrations.lightning      a callback for Lightning's Trainer
"""
