"""The second door's verbs, and what they know of runs, of the queue and of the cluster."""
