"""Parts of `train_sae.py`: what is trained, how a trainer is paced from outside, and how results are shown."""
