"""Hostfiles, against DeepSpeed's rules for them."""

import pytest

from castalia.config.gptneox_given import Given
from castalia.config.gptneox_hosts import counted_devices
from castalia.config.gptneox_rules import batch
from castalia.config.yaml12 import Origin
from castalia.errors import UserError

HOSTS = "# two machines\nhost-1 slots=4\n\nhost-2   slots = 2 # the small one\n"


@pytest.fixture
def count(tmp_path):
    def count(text: str = HOSTS, **values: object) -> int | None:
        (tmp_path / "hosts").write_text(text)
        values = {"hostfile": str(tmp_path / "hosts"), **values}
        return counted_devices(Given(values, {key: Origin("f.yml", 3) for key in values}))

    return count


@pytest.mark.parametrize(
    ("values", "devices"),
    [
        ({}, 6),
        ({"num_nodes": 1}, 4),
        ({"num_gpus": 2}, 4),
        ({"include": "host-2"}, 2),
        ({"include": "host-1:0,3@host-2:1"}, 3),
        ({"exclude": "host-1"}, 2),
        ({"exclude": "host-1:0@host-2:0,1"}, 3),
        # DeepSpeed's runner warns and drops the number.
        ({"include": "host-1", "num_gpus": 1}, 4),
    ],
)
def test_devices_are_counted(count, values, devices) -> None:
    assert count(**values) == devices


@pytest.mark.parametrize(
    ("text", "values", "message"),
    [
        ("host-1 4\n", {}, "f.yml:3: 'hostfile' names a file whose line 1 is not `HOST slots=N`"),
        ("a slots=1\na slots=2\n", {}, "whose line 2"),
        ("# none\n", {}, "a file without hosts"),
        (HOSTS, {"include": "host-3"}, "'include' names 'host-3', but the hostfile has no such host"),
        (HOSTS, {"include": "host-1:7"}, "names 'host-1:7'"),
        (HOSTS, {"include": "host-1:x"}, "names 'host-1:x'"),
        (HOSTS, {"include": "host-1", "exclude": "host-2"}, "'include' and 'exclude' are both given"),
    ],
)
def test_wrong_hostfiles(count, text, values, message) -> None:
    with pytest.raises(UserError) as error:
        count(text, **values)
    assert message in str(error.value)


def test_a_hostfile_of_another_machine_counts_nothing() -> None:
    assert counted_devices(Given({"hostfile": "nowhere/hosts"}, {})) is None


def test_the_batch_follows_from_the_hostfile(tmp_path) -> None:
    (tmp_path / "hosts").write_text(HOSTS)
    values = {"train_micro_batch_size_per_gpu": 3, "hostfile": str(tmp_path / "hosts")}
    assert batch(Given(values, {})) == (18, 3)
    assert batch(Given(values | {"model_parallel_size": 2}, {})) == (9, 3)
    assert batch(Given(values | {"global_num_gpus": 1}, {})) == (3, 3)
