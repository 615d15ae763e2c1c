"""The exit codes of both commands, for scripts that call them."""

OK = 0
FAILED = 1  # a run that was asked about has failed, or cannot be done
USAGE = 2  # the command or the spec is wrong
NO_SLURM = 3  # SLURM refused, or does not answer
REFUSED = 4  # more than the limit that was given
INTERRUPTED = 130
