"""Small configurations for layouts; `castalia.parallel.testing` runs them on one preloaded server of processes."""

import json

import pytest

from castalia.config import load


@pytest.fixture
def config_of(tmp_path):
    """`config_of("model.position=alibi", ...)` -> a checked configuration."""

    def make(*overrides):
        path = tmp_path / "run.yml"
        path.write_text(json.dumps({"version": 1, "training": {"steps": 10}}), encoding="utf-8")
        return load([path], overrides)

    return make
