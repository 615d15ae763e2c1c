"""Ask W&B for an artifact's handoff, or the hub for a model: python -m launch.online.fetch wandb|hub PLACE

A process of its own, so that making a plan imports neither client. Its last line is JSON: what was found, or
`error` and `hint` in words.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def from_wandb(place: str) -> dict[str, Any]:
    """The handoff that the artifact `entity/project/name:alias` mirrors."""
    from launch.online import session
    from launch.online.reach import account, reachable

    url = session.base_url()
    if not account(url):
        return _error(f"wandb:{place}: no login for {url} here", "run `wandb login`, or set WANDB_API_KEY")
    if not reachable(url):
        return _error(
            f"wandb:{place}: {url} does not answer", "try again later, or name the experiment instead"
        )
    try:
        return session.fetch_handoff(place)
    except KeyError:
        return _error(f"wandb:{place} has no handoff.json: it is no artifact of this project's runs")
    except Exception as error:  # its classes are wandb's own
        said = str(error).strip().splitlines()
        words = said[0] if said else type(error).__name__
        return _error(f"wandb:{place}: W&B says: {words}", "its page's Full Name is what belongs here")


def from_hub(name: str) -> dict[str, Any]:
    """The folder of a model of the hub, downloaded where it is not in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    name, _, revision = name.partition("@")
    try:
        return {"folder": snapshot_download(name, revision=revision or None)}
    except HFValidationError:
        return _error(f"hub:{name} names no model", "write hub:OWNER/NAME, or hub:/a/folder")
    except RepositoryNotFoundError:
        return _error(
            f"hub:{name}: the hub has no such model, or not for you", "look at its spelling; set HF_TOKEN"
        )
    except LocalEntryNotFoundError:
        hint = (
            "download it where there is a network, with HF_HOME on the shared file system; or name a folder"
        )
        return _error(f"hub:{name} is not in the cache, and the hub cannot be reached from here", hint)
    except OSError as error:
        return _error(f"hub:{name}: {error}", "or name a folder: hub:/a/folder")


def _error(message: str, hint: str = "") -> dict[str, Any]:
    return {"error": message, "hint": hint}


def main(arguments: list[str]) -> None:
    what, place = arguments
    print(json.dumps(from_wandb(place) if what == "wandb" else from_hub(place)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
