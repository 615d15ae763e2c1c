"""Memory is used again when nobody has it any more, and never before."""

from __future__ import annotations

import torch

from data.buffers import Buffers


def address(array: object) -> int:
    return int(array.__array_interface__["data"][0])  # type: ignore[attr-defined]


def test_what_is_released_is_used_again() -> None:
    buffers = Buffers((4, 4, 3))
    first = buffers.take(3)
    assert first.shape == (3, 4, 4, 3)
    place = address(first)
    del first
    again = buffers.take(2)
    assert again.shape == (2, 4, 4, 3)
    assert address(again) == place


def test_what_someone_has_is_left_alone() -> None:
    buffers = Buffers((4, 4, 3))
    array = buffers.take(2)
    array[:] = 7
    place, part, tensor = address(array), array[1], torch.from_numpy(array).permute(0, 3, 1, 2)
    del array
    assert address(buffers.take(2)) != place  # the tensor has it
    moved = tensor[:1]
    del tensor
    assert address(buffers.take(2)) != place
    del moved
    assert address(buffers.take(1)) != place  # a part of it is held still
    assert (part == 7).all()
    del part
    assert place in {address(each) for each in [buffers.take(1) for _ in range(2)]}


def test_small_pieces_make_room_for_larger_ones() -> None:
    buffers = Buffers((2,))
    for count in (1, 2, 3, 2, 1, 3, 0):
        assert len(buffers.take(count)) == count
    assert len(buffers._pieces) == 1
    held = [buffers.take(3) for _ in range(200)]
    assert len({address(each) for each in held}) == 200
    assert len(buffers._pieces) <= 64
