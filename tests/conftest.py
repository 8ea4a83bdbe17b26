"""Surroundings of every test: one thread, no launcher, no network, no time limits in property tests, normal numbers."""

import os
import sys
from collections.abc import Iterator

import pytest

# Before the first import of torch. The workers of pytest-xdist fill the cores already.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# A suite that runs inside somebody's job must not take itself for a rank of that job.
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)

from hypothesis import settings  # noqa: E402 - after the environment is set

# A deadline would make a busy machine fail a right program.
settings.register_profile("castalia", deadline=None, print_blob=True)
settings.load_profile("castalia")


@pytest.fixture(autouse=True)
def _numbers_as_they_were() -> Iterator[None]:
    """A verb that runs inside the test's process leaves the processor flushing the smallest numbers to 0."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
