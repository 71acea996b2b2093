"""The parts of `convert_weights.py`: read a checkpoint of any form, write a folder for the Hub, check and publish it.

Nothing that `from_pretrained` loads imports this package.
"""
