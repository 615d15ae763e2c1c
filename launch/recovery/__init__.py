"""Why an attempt ended, what follows from it, and the watch that ends one that stands still."""
