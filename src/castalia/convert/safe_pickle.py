"""A `.pt` file -> what is in it, without running what is in it.

A pickle is a program. torch's own restricted unpickler (`weights_only`) runs only calls from a
short list, which rebuild tensors; the numpy arrays that GPT-NeoX keeps beside them (random
number states) are added here, and nothing else. Both of torch's formats are read, the zip
archive and the older plain one.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from castalia.errors import UserError

_UNSUPPORTED = re.compile(r"GLOBAL ([\w.]+)|(?:class|type|function) '?([\w.]+)'?|Unsupported operand (\d+)")


def load_pt(path: Path) -> Any:
    """Load a file that torch.save wrote; tensors come onto the CPU (memory-mapped from a zip archive).

    Raises:
        UserError: the file is missing or damaged, or asks for anything but tensors, numpy arrays and
            plain containers.
    """
    path = Path(path)
    try:
        archive = zipfile.is_zipfile(path)
        with torch.serialization.safe_globals(_numpy_parts()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file: check the path") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except pickle.UnpicklingError as error:
        # The first line of torch's message is followed by advice to trust the file.
        found = _UNSUPPORTED.search(str(error))
        what = next((g for g in found.groups() if g), None) if found else None
        if what is None:
            raise UserError(f"{path}: is not a file of tensors, or is damaged: fetch it again") from error
        raise UserError(
            f"{path}: asks for {what}, which is no tensor, numpy array or plain container, "
            "and was not loaded, because a file that names other code can run it: save it again without that"
        ) from error
    except Exception as error:  # a damaged file makes the unpickler stumble in any way
        raise UserError(f"{path}: is not a file of tensors, or is damaged: fetch it again") from error


def _numpy_parts() -> list[Any]:
    """What a pickled numpy array or scalar calls, under the names that numpy 1 and 2 give it."""
    from numpy._core import multiarray

    # Numbers only: the state of a structured type can be forged so that bytes are taken for objects.
    kinds = {type(np.dtype(code)) for code in "?bhilqBHILQefdFD"}
    return [
        np.ndarray,
        np.dtype,
        *kinds,
        *(
            (function, f"numpy.{core}.multiarray.{name}")
            for core in ("core", "_core")
            for name, function in (("_reconstruct", multiarray._reconstruct), ("scalar", multiarray.scalar))
        ),
    ]
