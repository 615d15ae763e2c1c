"""The verb `sync`: W&B brought up to date from the login node, once or again and again."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

from launch.exits import FAILED, OK
from launch.online.sync import sync_all
from launch.operating.show import look
from launch.operating.status import OPEN
from launch.record import RunFolder


def sync(chosen: Sequence[RunFolder], options: argparse.Namespace) -> int:
    """Send what is closed; exit code 1 when something could not be sent."""
    while True:
        lines = look(chosen, options.runs, accounting=False).lines
        open_ = {line.folder.path for line in lines if line.state.name in OPEN}
        say = (lambda text: None) if options.json else print
        reports = sync_all(
            [folder.path for folder in chosen], running=open_.__contains__, live=options.watch, say=say
        )
        if options.json:
            print(json.dumps(reports, default=str), flush=True)
        elif not reports:
            print("nothing to send: W&B has it all", flush=True)
        if not options.watch or not open_:
            return (
                FAILED if any(report.get("failed") or report.get("unreachable") for report in reports) else OK
            )
        time.sleep(options.every)
