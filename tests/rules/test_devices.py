"""No kind of accelerator is named where any would do: the code asks torch.accelerator, or a device for its type."""

import re

import pytest

KINDS = re.compile(r"cuda|nccl|rocm|\bhip\b|\bxpu\b|\bmps\b|hccl|xccl", re.IGNORECASE)
# file -> why it may. The first is the one that decides; the others hold names that are not ours.
ALLOWED = {
    "castalia/parallel/world.py": "finds the device",
    "castalia/model/attention_flex.py": "on which devices torch's FlexAttention has a backward pass",
    "castalia/config/schema.py": "an example of a device",
    "castalia/config/gptneox_optimizer.py": "a parameter of DeepSpeed",
    "castalia/config/schema_launch.py": "names of environment variables",
    "castalia/cli/deepy.py": "a variable of GPT-NeoX",
    "castalia/convert/safe_pickle.py": "classes of tensors in foreign files",
    "castalia/tools/launch_files.py": "a comment on shared memory",
}


def named(sources):
    """The files that name a kind of accelerator."""
    return {path for path, text in sources.items() if KINDS.search(text)}


def test_no_kind_of_accelerator_is_named(sources):
    assert named(sources) <= ALLOWED.keys()


def test_every_exception_is_needed(sources):
    assert ALLOWED.keys() <= named(sources)


@pytest.mark.parametrize(
    "text", ["torch.cuda.synchronize()", "Generator('cuda')", "backend = 'nccl'", "if x.is_cuda:", "torch.xpu.seed()"]
)
def test_a_kind_is_seen(text):
    assert named({"castalia/train/a.py": text})
    assert not named({"castalia/train/a.py": "relationship = torch.accelerator.current_accelerator()"})
