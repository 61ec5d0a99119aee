# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's own Python over a stand-in for its compiled part, on a CPU.

Constructors, parameters, extra states and the optimizer are Transformer Engine's; the forward of its layers and the
kernels of its optimizer are torch's. To be installed before Megatron is imported.
"""

import enum
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import MagicMock

import torch
import torch._dynamo
import torch._inductor.utils  # before triton seems to be there
import torch.nn.functional as F
from torch import Tensor

__all__ = ["install"]

ABSENT = ("transformer_engine_torch", "triton", "onnxscript", "onnx", "einops")
GEMMS = [f"GEMM{i}_{what}" for i in (1, 2, 3) for what in ("INPUT", "WEIGHT", "OUTPUT")]
GRADS = [f"GRAD_{what}{i}" for i in (1, 2, 3) for what in ("OUTPUT", "INPUT")]
DTYPES = ["kByte", "kInt32", "kFloat32", "kFloat16", "kBFloat16", "kFloat8E4M3", "kFloat8E5M2", "kFloat4E2M1"]
BACKENDS = ["NVTE_No_Backend", "NVTE_F16_arbitrary_seqlen", "NVTE_FP8"]


def _enum(name: str, members: list[str]) -> type[enum.IntEnum]:
    return enum.IntEnum(name, members, start=0)


class _Extension(types.ModuleType):
    """Has every name that is asked for."""

    __version__ = "3.6.0"
    DType = _enum("DType", DTYPES)
    FP8FwdTensors = _enum("FP8FwdTensors", GEMMS)
    FP8BwdTensors = _enum("FP8BwdTensors", GRADS)
    NVTE_Fused_Attn_Backend = _enum("NVTE_Fused_Attn_Backend", BACKENDS)

    def __getattr__(self, name: str) -> MagicMock:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, MagicMock(name=name))
        return getattr(self, name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Extension(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


def _decorator(*args, **_):
    return args[0] if args and callable(args[0]) else lambda function: function


def install(wheel: Path) -> None:
    """Have ``import transformer_engine`` find what ``wheel``, an unpacked wheel, holds."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # without a check of what is compiled
    sys.path.insert(0, str(wheel))
    torch.compile = _decorator
    sys.meta_path.insert(0, _Finder())
    for name in (*ABSENT, "triton.language"):
        importlib.import_module(name)
    compiled, triton = sys.modules["transformer_engine_torch"], sys.modules["triton"]
    triton.language, triton.jit, triton.autotune = sys.modules["triton.language"], _decorator, _decorator
    compiled.FP8TensorMeta = type("FP8TensorMeta", (), {})
    compiled.get_cudnn_version = lambda: 91300
    compiled.multi_tensor_adam, compiled.multi_tensor_scale = _adam, _scale
    _import(wheel / "transformer_engine")
    _compute_with_torch(sys.modules["transformer_engine.pytorch"])
    _see_a_gpu()


def _import(folder: Path) -> None:
    # The package would load the compiled libraries at once.
    package = types.ModuleType("transformer_engine")
    package.__path__ = [str(folder)]
    package.__spec__ = importlib.machinery.ModuleSpec("transformer_engine", None, is_package=True)
    package.__version__ = importlib.metadata.version("transformer-engine")
    sys.modules["transformer_engine"] = package
    path = folder / "common/__init__.py"
    spec = importlib.util.spec_from_file_location(
        "transformer_engine.common", path, submodule_search_locations=[str(path.parent)]
    )
    common = importlib.util.module_from_spec(spec)
    sys.modules["transformer_engine.common"] = package.common = common
    spec.loader.exec_module(common)
    common.load_framework_extension = lambda _: None
    package.pytorch = importlib.import_module("transformer_engine.pytorch")


def _see_a_gpu() -> None:
    """Transformer Engine's modules get the view of torch that Megatron's have, on which there is an H100."""
    from nemo_aligner.parallel import cpu_shim

    h100 = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    seen = {name: replacement for name, replacement, _ in cpu_shim.CUDA} | {
        "is_available": lambda: True,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: h100,
    }
    factories = {name: cpu_shim._on_cpu(getattr(torch, name)) for name in cpu_shim.FACTORIES}
    view = cpu_shim._View(torch, {"cuda": cpu_shim._View(torch.cuda, seen)} | factories)
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_engine.") and module.__dict__.get("torch") is torch:
            module.__dict__["torch"] = view


def _compute_with_torch(te: types.ModuleType) -> None:
    te.Linear.forward, te.LayerNormLinear.forward = _linear, _norm_linear
    te.RMSNorm.forward = te.LayerNorm.forward = _norm
    te.DotProductAttention.forward = _attention


def _normed(x: Tensor, weight: Tensor, bias: Tensor | None, layer, *, rms: bool) -> Tensor:
    weight = weight + 1 if layer.zero_centered_gamma else weight
    if rms:
        return F.rms_norm(x, x.shape[-1:], weight, layer.eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, layer.eps)


def _linear(self, x: Tensor, *_, **__):
    bias = self.bias if self.use_bias else None
    out = F.linear(x, self.weight, None if self.return_bias else bias)
    return (out, bias) if self.return_bias else out


def _norm_linear(self, x: Tensor, *_, **__):
    rms = self.normalization == "RMSNorm"
    return _linear(self, _normed(x, self.layer_norm_weight, self.layer_norm_bias, self, rms=rms))


def _norm(self, x: Tensor) -> Tensor:
    return _normed(x, self.weight, getattr(self, "bias", None), self, rms="RMS" in type(self).__name__)


def _attention(
    self,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    qkv_format: str | None = None,
    cu_seqlens_q: Tensor | None = None,
    attn_mask_type: str | None = None,
    **_,
) -> Tensor:
    """As the kernel is asked: sbhd with a causal mask, or thd with the boundaries of its sequences."""
    assert attention_mask is None

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, H, S, D]
        place = torch.arange(q.shape[2])
        visible = place[None] <= place[:, None]
        if self.window_size is not None and self.window_size[0] >= 0:
            visible &= place[None] >= place[:, None] - self.window_size[0]
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)

    if (qkv_format or self.qkv_format) == "thd":
        assert attn_mask_type == "padding_causal"
        assert cu_seqlens_q.dtype == torch.int32
        bounds = cu_seqlens_q.tolist()
        parts = []
        for start, end in itertools.pairwise(bounds):
            rows = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
            parts.append(causal(*rows)[0].transpose(0, 1))
        return torch.cat(parts).flatten(1)
    assert attn_mask_type == "causal"
    out = causal(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
    return out.permute(2, 0, 1, 3).flatten(2)


def _adam(
    _, __, lists: Sequence[Sequence[Tensor]], lr, beta1, beta2, eps, step, mode, bias_correction, decay
):
    assert mode == 1
    assert bias_correction
    for grad, parameter, mean, square in zip(*lists, strict=True):
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (square / (1 - beta2**step)).sqrt() + eps
        parameter.mul_(1 - lr * decay).addcdiv_(mean / (1 - beta1**step), root, value=-lr)


def _scale(_, __, lists: Sequence[Sequence[Tensor]], factor: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)
