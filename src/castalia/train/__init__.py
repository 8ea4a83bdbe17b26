"""Assembly of a run, the step's engine, the loop, and what is recorded.

The room is callable, so that `castalia.train("run.yml")` stays what docs/contracts.md says
after the package of the same name has been imported.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from castalia.train.run import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
