"""Rectangles of tensors: saved in one cut, read in another."""

import torch

from castalia.checkpoint import Piece, load_checkpoint, save_checkpoint, tensor_shapes
from castalia.parallel.testing import run_in_processes


def cut(whole, rank, by):
    """A rank's half of a matrix, by rows or by columns; and one that only the second rank has."""
    half = whole.chunk(2, 0 if by == "rows" else 1)[rank].contiguous()
    offset = (3 * rank, 0) if by == "rows" else (0, 4 * rank)
    lone = Piece(torch.full((2 * rank,), 7.0), (2,), (0,))
    return {"a": Piece(half, whole.shape, offset), "lone": lone, "same": torch.ones(3)}


def save_and_read(world, folder):
    whole = torch.arange(48.0).view(6, 8)
    path = save_checkpoint(folder, 1, cut(whole, world.rank, "rows"), {})
    target = cut(torch.zeros(6, 8), world.rank, "columns")
    target["lone"].local.zero_()
    load_checkpoint(path, target)
    return torch.equal(target["a"].local, whole[target["a"].region]), target["lone"].local.tolist(), str(path)


def test_pieces_are_read_in_another_cut(tmp_path):
    (good, lone, path), (also, theirs, _) = run_in_processes(2, save_and_read, tmp_path)
    assert good and also and (lone, theirs) == ([], [7.0, 7.0])
    assert tensor_shapes(path) == {"a": (6, 8), "lone": (2,), "same": (3,)}
    alone = {"a": torch.zeros(6, 8), "lone": torch.zeros(2), "same": torch.zeros(3)}
    load_checkpoint(path, alone)
    assert torch.equal(alone["a"], torch.arange(48.0).view(6, 8)) and alone["lone"].tolist() == [7.0, 7.0]


def test_a_piece_takes_its_part_of_a_whole():
    piece = Piece(torch.zeros(2, 2), (4, 6), (1, 3))
    assert piece.copy_(torch.arange(24.0).view(4, 6)).local.tolist() == [[9.0, 10.0], [15.0, 16.0]]
