"""What `check` can find: each kind's name, whether it loses data, and the way out; standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Kind:
    """A defect. `lost`: the record, or an answer of it, is not trained on. `fix`: what --fix does with it."""

    what: str
    lost: bool
    way_out: str
    fix: str = ""


class Finding(NamedTuple):
    """A defect of one record; record -1 is the file itself."""

    kind: str
    file: str
    record: int
    id: str
    detail: str


_DROP = "drops the record"
_GET = "download the archive again (prepare.py plan), or leave the record out"

KINDS: dict[str, Kind] = {
    # the file
    "file-missing": Kind("the annotation file is not there", True, "prepare.py plan says where to get it"),
    "file-empty": Kind("the annotation file has no record", True, "leave it out of the mix"),
    "file-torn": Kind("the annotation file is not valid JSON", True, "download it again"),
    "rows": Kind("not as many records as the catalog says", False, "compare with the publisher's file"),
    # the record
    "record-type": Kind("the record is not an object", True, "remove it", _DROP),
    "field-twice": Kind(
        "a field stands twice in the record: JSON keeps the last", True, "keep one of the two"
    ),
    "no-conversations": Kind("the record has no list of conversations", True, "remove it", _DROP),
    "empty-conversation": Kind("the conversation has no turn", True, "remove it", _DROP),
    "turn-malformed": Kind("a turn lacks 'from' or a text in 'value'", True, "repair the turn", _DROP),
    "role-unknown": Kind(
        "a turn is from neither human nor gpt",
        True,
        "rename the role",
        "renames user and assistant, else drops",
    ),
    "role-order": Kind("one speaker speaks twice in a row", True, "merge or remove turns", _DROP),
    "leading-answer": Kind("the conversation starts with an answer", True, "remove that turn", "removes it"),
    "trailing-question": Kind("the last question has no answer", False, "remove it", "removes it"),
    "no-answer": Kind("there is no answer to learn from", True, "remove the record", _DROP),
    "empty-answer": Kind(
        "an answer is empty: nothing is learnt of it",
        False,
        "remove that round",
        "removes it, if it shows no picture",
    ),
    "empty-question": Kind("a question is empty", False, "write one"),
    "blank-edge": Kind(
        "an answer starts or ends with white space, which is learnt", False, "strip it", "strips it"
    ),
    "plain-turns": Kind(
        "template plain takes one question and one caption", True, "use a caption file", _DROP
    ),
    "video": Kind("the record has a video", True, "make pictures of it", _DROP),
    "image-field": Kind("'image' is no path and no list of paths", True, "repair it", _DROP),
    "placeholder-missing": Kind(
        "the record has pictures, but no <image> in its text", True, "put <image> in", "puts <image> in front"
    ),
    "placeholder-count": Kind("not as many <image>s as pictures", True, "repair the text or the list", _DROP),
    "placeholder-in-answer": Kind("an answer contains <image>", False, "it is not learnt; reword it"),
    "placeholder-as-text": Kind(
        "a text-only record says <image>", False, "it is read as text; add the picture"
    ),
    "too-many-images": Kind("more than 16 pictures", False, "check that the sequence has room for them"),
    "separator-in-text": Kind(
        "a text contains the template's end of turn", False, "it becomes that token; reword"
    ),
    "role-in-text": Kind("a text contains the template's word for a speaker", False, "reword it"),
    "special-in-text": Kind(
        "a text contains a special token of the tokenizer", False, "it becomes that token"
    ),
    "control-character": Kind("a text contains control characters", False, "remove them"),
    "duplicate-id": Kind(
        "the id occurs before in this file", False, "harmless: records are counted, not named"
    ),
    "duplicate-record": Kind("the same conversation occurs before in this file", False, "remove one"),
    "encoding": Kind("the record cannot be encoded", True, "see the detail", _DROP),
    "over-long": Kind("longer than max_length: it is cut after an answer", False, "raise max_length"),
    "question-too-long": Kind("the first question alone fills max_length", True, "raise max_length", _DROP),
    # the picture
    "image-outside": Kind("the picture's path leads out of the root", True, "use a relative path", _DROP),
    "image-missing": Kind("the picture is not there", True, _GET, _DROP),
    "image-forbidden": Kind("the picture may not be read", True, "chmod it, or ask its owner"),
    "image-empty": Kind("the picture's file is empty", True, _GET, _DROP),
    "image-unreadable": Kind("the picture's file is not a picture", True, _GET, _DROP),
    "image-damaged": Kind("the picture is cut short or damaged", True, _GET, _DROP),
    "image-giant": Kind("the picture has too many pixels to decode", True, "scale it down", _DROP),
    "image-animated": Kind("an animation: its first frame is used", False, "fine, or convert it"),
    "image-cmyk": Kind("CMYK colours: converted when read", False, "fine, or convert it"),
    "image-rotated": Kind(
        "EXIF says the picture is rotated: it is not", False, "as in the reference; or turn it"
    ),
    "image-transparent": Kind(
        "the picture is transparent: that is dropped", False, "flatten it if it matters"
    ),
    "image-sixteen-bit": Kind("16 bits a channel: scaled to 8", False, "fine"),
    "image-thin": Kind("an edge under 4 pixels, or one 50 times the other", False, "look at it"),
    "image-misnamed": Kind("the name's ending is of another format", False, "fine: the content decides"),
}
