"""The model and its training; knows no cluster, no dataset, no W&B."""
