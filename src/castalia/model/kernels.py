"""The one place that decides which matrix products a device gets.

    fp32    torch's "highest" (MKL) or "medium" (oneDNN)      the faster one; on AMD they differ by a factor of two
    16 bit  native instructions, or products of the same      the faster one; some CPUs that know bf16 multiply
            numbers by the fp32 ones (`WideProduct`)          fp32 twice as fast, some half as fast

"medium" may round fp32 inputs on some CPUs: whether it does is tried, and then it is not taken. A product of
bf16 numbers is exact in fp32, so by either way operands and results are rounded to 16 bits, and only the
order of fp32 sums differs. Speed is measured once per kind of CPU, number of threads and torch, and remembered in
the user's cache, so that a run that goes on computes as it began; `performance.matmul` decides it by hand.

Numbers too small for a normal float are taken for 0 on CPUs: arithmetic on them is many times
slower, and biases that grow with the distance (ALiBi's) make them by the million.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from castalia.model.attention import Attention, Core
from castalia.model.attention_mask import Drop, MaskSpec
from castalia.model.layers import native_product

# An fp32 product of 256 terms errs by about 3e-7; one with bf16 inputs by about 3e-3.
_FP32_ERROR = 5e-6
# Another way than the first is taken where it takes less than this share of the first one's time.
_CLEARLY = 0.97
_REPEATS = 25


def flushes_denormals() -> bool:
    """Whether this thread takes numbers below the normal ones for 0; torch sets it, but does not tell."""
    return bool(torch.tensor(1e-40).mul(1.0).eq(0.0))


def choose_fp32_matmul(device: torch.device) -> str:
    """Set torch's fp32 matmul precision for `device` and return its name.

    On a CPU the faster of "medium" and "highest", if "medium" is still fp32 arithmetic there; else "highest".
    GPUs keep "highest" too: there, "medium" would mean TF32 or bf16.
    """
    torch.set_float32_matmul_precision("highest")
    torch.set_flush_denormal(True)
    if device.type != "cpu":
        return "highest"
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    torch.set_float32_matmul_precision("medium")
    error = ((a @ b).double() - exact).norm() / exact.norm()
    choice = "highest"
    if error <= _FP32_ERROR:
        x, w = _operands(torch.float32)

        def by(precision: str) -> None:
            torch.set_float32_matmul_precision(precision)
            F.linear(x, w)

        choice = _remembered("fp32", {"medium": lambda: by("medium"), "highest": lambda: by("highest")})
    torch.set_float32_matmul_precision(choice)
    return choice


def choose_matmul(device: torch.device, dtype: torch.dtype | None, setting: str = "auto") -> str:
    """How products of matrices of a 16-bit dtype are computed: "native" or "fp32".

    Call it after `choose_fp32_matmul`.

    Args:
        dtype: of the working weights; None or a wide one: there is nothing to choose.
        setting: performance.matmul.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return "native"
    if setting != "auto" or device.type != "cpu":
        return "native" if setting == "auto" else setting
    x, w = _operands(dtype)
    product, rounded = WideProduct(dtype), w.float()
    ways = {"native": lambda: F.linear(x, w), "fp32": lambda: product(x, rounded)}
    return _remembered(str(dtype).removeprefix("torch."), ways)


def use_matmul(model: nn.Module, choice: str, dtype: torch.dtype | None = torch.bfloat16) -> None:
    """Let a model compute its products of 16-bit matrices as `choose_matmul` said; `dtype` is theirs.

    Before its store is made, which then keeps weights as they are wanted. Linear maps that have a product of
    their own (float8) keep it.
    """
    vars(model)["matmul"] = choice
    if choice == "native" or dtype is None:
        return
    product = WideProduct(dtype)
    for module in model.modules():
        if getattr(module, "product", None) is native_product:
            vars(module)["product"] = product
        if isinstance(module, Attention):
            module.core = _WideCore(module.core)


def head_matrix(model: nn.Module, matrix: Tensor) -> Tensor:
    """The output matrix as the loss should multiply by it."""
    return matrix.float() if getattr(model, "matmul", "native") == "fp32" and matrix.dtype.itemsize < 4 else matrix


class WideProduct:
    """As `native_product` with 16-bit operands and results, computed by fp32 products.

    The weight may be of 16 bits or hold such numbers in fp32; what backward keeps of x has 16 bits. Operands and
    results in fp32 are in memory that is used again and again: fresh memory costs as much as the conversion.

    Args:
        dtype: the 16-bit one.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._flat: dict[str, Tensor] = {}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., in]` of any dtype to `[..., out]` of 16 bits."""
        out: Tensor = _WideProduct.apply(x, weight, bias, self)
        return out

    def widened(self, name: str, x: Tensor) -> Tensor:
        """A 16-bit matrix in fp32, in the memory of that name."""
        return x.float() if torch.compiler.is_compiling() else self._memory(name, x.shape[0], x.shape[1], x).copy_(x)

    def mm(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """The product of two matrices, in the memory of that name."""
        if torch.compiler.is_compiling():
            return torch.mm(a, b)
        return torch.mm(a, b, out=self._memory(name, a.shape[0], b.shape[1], a))

    def _memory(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        size, flat = rows * columns, self._flat.get(name)
        if flat is None or flat.numel() < size or flat.device != like.device:
            self._flat[name] = flat = torch.empty(size, device=like.device)
        return flat[:size].view(rows, columns)


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: WideProduct) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(product.dtype)
        ctx.save_for_backward(flat, weight)
        ctx.product, ctx.shape, ctx.dtype = product, x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        y = product.mm("out", product.widened("in", flat), weight.float().T)
        if bias is not None:
            y += bias
        return y.to(product.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        product = ctx.product
        wide = product.widened("in", grad.reshape(-1, grad.shape[-1]))
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            if ctx.dtype == torch.float32:
                d_x = torch.mm(wide, weight.float())
            else:
                d_x = product.mm("out", wide, weight.float()).to(ctx.dtype)
            d_x = d_x.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            d_weight = torch.mm(wide.T, product.widened("out", x)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            d_bias = wide.sum(0).to(ctx.bias_dtype)
        return d_x, d_weight, d_bias, None


class _WideCore:
    """An attention core that computes in fp32 what it is given in 16 bits."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, drop: Drop | None = None, scale: float | None = None
    ) -> Tensor:
        """See castalia.model.attention.Core."""
        return self._core(q.float(), k.float(), v.float(), mask, drop, scale).to(q.dtype)


def _operands(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Activations and a matrix about as large as those of a layer of a small model."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 512, generator=generator).to(dtype) for rows in (512, 2048))
    return x, w


def _remembered(kind: str, ways: Mapping[str, Callable[[], object]]) -> str:
    """The name of the fastest way, from the user's cache or measured; the first wins where none is clearly faster."""
    key = f"{kind}, {'/'.join(ways)}, {_cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    base = os.environ.get("XDG_CACHE_HOME") or ""
    known: dict[str, str] = {}
    try:
        file = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "castalia" / "kernels.json"
        known = json.loads(file.read_text(encoding="utf-8"))
        if known[key] in ways:
            return known[key]
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        pass
    choice = _fastest(ways)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=".kernels-")
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump((known if isinstance(known, dict) else {}) | {key: choice}, out, indent=1)
        os.replace(name, file)
    except (OSError, RuntimeError, NameError):  # no home, or one that cannot be written: it is measured again next time
        pass
    return choice


@torch.no_grad()
def _fastest(ways: Mapping[str, Callable[[], object]]) -> str:
    """Each way's least time of several turns: others on the machine only ever add to it."""
    least = dict.fromkeys(ways, float("inf"))
    for turn in range(_REPEATS + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:  # the first plans and allocates
                least[name] = min(least[name], time.perf_counter() - start)
    first = next(iter(ways))
    best = min(least, key=lambda name: least[name])
    return best if least[best] < _CLEARLY * least[first] else first


def _cpu() -> str:
    """What tells one kind of CPU from another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        import platform

        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant")
    facts = dict(part.partition(":")[::2] for part in lines)
    return " ".join(v.strip() for k, v in facts.items() if k.strip() in wanted)
