"""Compressors as yardsticks: the figures are sizes, and seeing the training text helps."""

import lzma
import random

import pytest

from castalia.errors import UserError
from castalia.tools.compression import compression_bits_per_byte, xz_size


def words(seed: int, count: int, vocabulary: list[str]) -> bytes:
    rng = random.Random(seed)
    return " ".join(rng.choice(vocabulary) for _ in range(count)).encode()


@pytest.fixture(scope="module")
def vocabulary() -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices("abcdefghijklmnop", k=9)) for _ in range(2000)]


def test_rows_are_bits_per_byte_of_the_unseen_text(vocabulary: list[str]) -> None:
    train, valid = words(1, 20_000, vocabulary), words(2, 2_000, vocabulary)
    result = compression_bits_per_byte(train, valid)
    assert (result["train_bytes"], result["valid_bytes"]) == (len(train), len(valid))
    rows = {(row["name"], row["note"]): row["bits_per_byte"] for row in result["rows"]}
    assert rows["xz -9", "alone"] == 8 * len(lzma.compress(valid, preset=9)) / len(valid)
    for name in {name for name, _ in rows}:
        # The vocabulary was seen in training: what is left is little more than the choice of words.
        assert rows[name, "given the training text"] < 0.7 * rows[name, "alone"]
        assert 0 < rows[name, "alone"] < 8


def test_a_copy_of_the_training_text_costs_next_to_nothing(vocabulary: list[str]) -> None:
    train = words(1, 20_000, vocabulary)
    for row in compression_bits_per_byte(train, train[:50_000])["rows"]:
        if row["note"] != "alone":
            assert row["bits_per_byte"] < 0.05


def test_xz_is_the_command_lines_preset_nine(vocabulary: list[str]) -> None:
    text = words(3, 5_000, vocabulary)
    assert xz_size(text) == len(lzma.compress(text, preset=9))


def test_the_window_spans_the_training_text() -> None:
    pytest.importorskip("zstandard")
    from castalia.tools.compression import zstd_size

    noise = random.Random(0).randbytes(9 << 20)  # longer than level 19's own window of 8 MiB
    assert zstd_size(noise + noise[:100_000]) - zstd_size(noise) < 1000


def test_no_unseen_text_is_an_error() -> None:
    with pytest.raises(UserError, match="held-out"):
        compression_bits_per_byte(b"abc", b"")


def test_what_takes_too_long_is_said_and_left_out(vocabulary: list[str]) -> None:
    said: list[str] = []
    found = compression_bits_per_byte(words(1, 2_000, vocabulary), b"some text", -1.0, said.append)
    assert found["rows"] == [] and len(said) >= 3
    assert "xz -9 of both (0.02 MB) is left out: not done in -1 s" in said
