"""A device that Castalia has never heard of: everything follows from torch.accelerator and from the device itself.

    tensor on "standin" ──operation──> the same on the CPU tensor inside ──> tensor on "standin"

It is torch's private-use device, in Python, over the CPU's memory. It refuses to mix with tensors of the CPU as
a real device does, but for copies and for numbers. Installing it changes torch for the whole process, so each
test has processes of its own.
"""

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from castalia.config import load
from castalia.errors import UserError
from castalia.parallel.testing import run_in_processes
from castalia.parallel.world import World
from castalia.tools.verify import shrink, train_small, with_settings

NAME = "standin"
aten = torch.ops.aten


class Held(torch.Tensor):
    """A tensor on the stand-in."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"Held({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return dispatch(operation, args, kwargs or {})


def dispatch(operation, args, kwargs):
    """An operation of which something lies on the stand-in."""
    copies = operation in (aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default)
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    if not copies and any(not isinstance(t, Held) and t.ndim > 0 for t in tensors):
        raise RuntimeError(f"{operation} mixes {NAME} and cpu")
    asked = kwargs.get("device")
    inside = {**kwargs, "device": torch.device("cpu")} if asked is not None else kwargs
    inner = lambda t: t.inner if isinstance(t, Held) else t  # noqa: E731
    out = operation(*tree_map(inner, args), **tree_map(inner, inside))
    if operation is aten.copy_.default:
        return args[0]
    if asked is not None and torch.device(asked).type != NAME:
        return out.clone() if out is inner(args[0]) else out
    wrapped = tree_map(lambda t: Held(t) if isinstance(t, torch.Tensor) else t, out)
    return return_and_correct_aliasing(operation, args, kwargs, wrapped) if tensors else wrapped


class _Module(_DummyBackendModule):
    """torch.standin."""

    def get_amp_supported_dtype(self):
        """Torch's recomputation looks whether autocast is on."""
        return [torch.bfloat16]


def install():
    """Make "standin" the accelerator of this process."""
    _setup_privateuseone_for_python_backend(NAME, _Module())
    library = torch.library.Library("aten", "IMPL")
    Held.library = library  # it would end with the last reference
    for name in ("empty.memory_format", "empty_strided"):
        packet, overload = [*name.split("."), "default"][:2]
        operation = getattr(getattr(aten, packet), overload)

        def make(*args, operation=operation, **kwargs):
            kwargs["device"] = torch.device("cpu")
            kwargs.pop("pin_memory", None)
            return Held(operation(*args, **kwargs))

        library.impl(name, make, "PrivateUse1")

    def copied(tensor, **kwargs):  # from the CPU
        return Held(aten._to_copy.default(tensor, **{**kwargs, "device": torch.device("cpu")}).clone())

    library.impl("_to_copy", copied, "PrivateUse1")


def looked_around(world):
    """What world.py says on a machine with the stand-in."""
    import torch.distributed as dist

    from castalia.parallel import world as worlds

    install()
    found = worlds.enter_world()
    facts = {"device": str(found.device), "processes": worlds.local_devices()}
    facts["memory"] = worlds.peak_memory(found.device) > 0
    two = worlds.World(0, 2, found.device)
    asked = []
    dist.init_process_group = lambda backend, **_: asked.append(backend)
    dist.destroy_process_group = lambda: None
    try:
        with worlds.joined(two):
            pass
    except UserError as error:
        facts["without collectives"] = str(error)
    dist.Backend.register_backend("standinccl", lambda *_: None, devices=[NAME])
    with worlds.joined(two):
        facts["backend"] = asked
    return facts


def test_device_memory_and_collectives_follow_from_torch():
    (facts,) = run_in_processes(1, looked_around, joined=False)
    assert facts == {
        "device": NAME,
        "processes": 1,
        "memory": True,
        "without collectives": f"torch has no collective operations for '{NAME}': install the package of the device's "
        "maker that registers them, or train on one process",
        "backend": ["standinccl"],
    }


def trained(config, device):
    """Losses and weights of a small run, and on which devices the model and the store's tensors were."""
    from castalia.train import assemble

    made, usual = [], assemble.assemble
    assemble.assemble = lambda *args: made.append(usual(*args)) or made[-1]
    trace = train_small(World(0, 1, torch.device(device)), config, 3)
    assemble.assemble = usual
    (parts,) = made
    on = [{t.device.type for t in tensors} for tensors in (parts.model.parameters(), parts.store.tensors().values())]
    return trace.losses, {n: w[0] for n, w in trace.weights.items()}, on


def train_there(precision):
    """A model trains on the stand-in as on a CPU, and its state goes where it is asked to."""
    # The stand-in's tensors are objects around others, so a parameter's data cannot be made a view of a flat buffer.
    settings = (f"training.precision={precision}", "model.hidden_dropout=0.1", "performance.arena=false")
    config = shrink(load([], settings))
    expected, _, _ = trained(config, "cpu")
    losses, _, on = trained(config, NAME)
    assert losses == pytest.approx(expected, rel=1e-6 if precision == "fp32" else 1e-3)
    assert on == [{NAME}, {NAME}], on
    plain_losses, plain, _ = trained(config, NAME)
    hosted = with_settings(config, {"offload": "optimizer"})
    same_losses, same, on = trained(hosted, NAME)
    assert on == [{NAME}, {"cpu"}], on
    assert same_losses == plain_losses and all((same[n] == plain[n]).all() for n in plain)


def test_a_model_trains_there_and_its_state_goes_where_it_is_asked_to():
    # Not forked: autograd's threads for the device must be this process's own.
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout == "trained\n", done.stdout + done.stderr[-3000:]


if __name__ == "__main__":
    install()
    train_there("fp32")
    train_there("bf16")
    print("trained")
