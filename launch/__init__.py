"""From a YAML to ranks that run, and back into the queue."""
