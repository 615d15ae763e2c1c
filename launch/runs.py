"""Operate on runs: python launch/runs.py VERB [RUN ...]; --help names the verbs."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # As in launch/submit.py: this checkout's packages, whatever else is installed.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from launch.door import enter

    enter("launch.operating.verbs")
