"""Submit an experiment: python launch/submit.py experiments/stage3_moe.yaml [key=value ...]"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python puts launch/ at the head of the path. The repository belongs there: `launch`, `moe` and
    # `data` are then this checkout's, whatever else is installed, and no module of launch/ is imported twice.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

    from launch.door import enter

    enter("launch.cli")
