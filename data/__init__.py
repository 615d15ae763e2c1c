"""Samples to batches; knows no model and no cluster."""
