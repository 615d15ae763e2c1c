"""Pictures inside a page: as they are where they are small, else drawn smaller by pillow, where that is there."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

SIDE = 320  # pixels, at most
WHOLE = 60_000  # bytes; a smaller file is taken as it is
KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


def picture(path: Path, *, whole: bool = False) -> str:
    """A picture inside the page, made small unless `whole`; words where it cannot be had here."""
    try:
        data = path.read_bytes()
    except OSError:
        return f'<p class="soft"><small>{escape(path.name)} is not readable here</small></p>'
    kind = next((name for head, name in KINDS.items() if data.startswith(head)), "")
    if not kind or (len(data) > WHOLE and not whole):
        try:
            from PIL import Image

            with Image.open(io.BytesIO(data)) as image:
                small = image.convert("RGB")
                small.thumbnail((SIDE, SIDE))
                buffer = io.BytesIO()
                small.save(buffer, "JPEG", quality=82)
            data, kind = buffer.getvalue(), "jpeg"
        except (ImportError, OSError, ValueError):
            return f'<p class="soft"><small>{escape(path.name)}, {len(data):,} bytes, not shown</small></p>'
    return f'<img alt="{escape(path.name)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
