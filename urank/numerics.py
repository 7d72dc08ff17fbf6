"""Floating-point precision and numerical algorithms, by device."""

import platform
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

CUDNN_CANDIDATES = 3  # algorithms that cuDNN times per convolution shape

# CUDA compute capabilities with float64 at half the speed of float32: P100, V100, A100, H100, B200
FAST_FLOAT64 = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disable TF32 and autocast inside the block, so that float32 operations have full precision."""
    available = torch.amp.is_autocast_available(device.type)  # False for "meta"
    with ieee_float32(), torch.autocast(device.type, enabled=False) if available else nullcontext():
        yield


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Disable TF32, and bfloat16 in its place, inside the block; cuDNN's convolutions use TF32 by default."""
    backends: Any = torch.backends  # torch's annotations lack some of these attributes
    cuda, cudnn, mkldnn = backends.cuda, backends.cudnn, backends.mkldnn
    settings = [cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before):
            setting.fp32_precision = precision


@contextmanager
def benchmarked_convolutions() -> Iterator[None]:
    """Let cuDNN time `CUDNN_CANDIDATES` algorithms per convolution shape inside the block and use the fastest.

    A decomposed network has its ranks as numbers of channels. For odd channel counts cuDNN's heuristic can choose an
    algorithm that is many times slower than the best. The search takes a few seconds at the start of a fit: the first
    epoch of a decomposed VGG19 took 6.4 s on an H100, later epochs 1.1 s.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.benchmark_limit
    try:
        cudnn.benchmark, cudnn.benchmark_limit = True, CUDNN_CANDIDATES
        yield
    finally:
        cudnn.benchmark, cudnn.benchmark_limit = before


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return a context manager for bfloat16 autocast if `arithmetic(device, precision)` is "bfloat16"."""
    bfloat16 = arithmetic(device, precision) == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()


def arithmetic(device: torch.device, precision: str) -> str:
    """Return "float32" or "bfloat16": `precision`, where "auto" means the faster of the two on `device`.

    >>> arithmetic(torch.device("cpu"), "float32")
    'float32'
    """
    if precision != "auto":
        return precision
    return "bfloat16" if has_fast_bfloat16(device) else "float32"


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return True if the device multiplies bfloat16 faster than float32.

    These are CUDA GPUs of compute capability 8.0 or higher, CPUs with AMX, and AMD CPUs with AVX512-BF16. On an AMD
    EPYC (Zen 4) AVX512-BF16 made training 1.4 to 2.0 times as fast (VGG11: 408 instead of 221 images/s). On an Intel
    Xeon it made training of VGG11 and ResNet18 7 to 17 % slower, and evaluation at most 6 % faster.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    known = processor()
    made_by_amd = known.get("cpu_name", "").startswith("AMD")
    return bool(known.get("amx_bf16") or (made_by_amd and known.get("avx512_bf16")))


def processor() -> Mapping:
    """Return the CPU's name and instruction sets as torch reports them; empty for older versions of torch."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def describe(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor with its vector instructions and the number of threads.

    The instruction set is part of the name because processors called "AMD EPYC" differ in speed by a factor of four.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, threads = processor().get("cpu_name") or platform.machine(), torch.get_num_threads()
    return f"{name} with {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads > 1)}"


def statistics_precision(device: torch.device) -> tuple[torch.device, torch.dtype]:
    """Return the device on which Gram matrices of data on `device` are summed, and the dtype of the products.

    Sums are always float64. Products are float64 on the CPU and on GPUs with fast float64 (`FAST_FLOAT64`). Other CUDA
    GPUs run float64 at 1/32 or 1/64 of the speed of float32; there products are float32 (never TF32). Apple's MPS has
    no float64, so its data is moved to the CPU.

    >>> statistics_precision(torch.device("cpu"))
    (device(type='cpu'), torch.float64)
    """
    if device.type == "mps":
        return torch.device("cpu"), torch.float64
    slow = device.type == "cuda" and torch.cuda.get_device_capability(device) not in FAST_FLOAT64
    return device, torch.float32 if slow else torch.float64


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (n,), ascending, and eigenvectors (n, n) of a symmetric matrix.

    If torch's solver fails, warn and use NumPy's on the CPU. `Spectrum.of` documents the warning and the errors.
    """
    try:
        return torch.linalg.eigh(matrix)
    except RuntimeError as error:  # the base class of LinAlgError, NotImplementedError and cuSOLVER's errors
        n, device = len(matrix), matrix.device
        warnings.warn(f"eigh of a {n} x {n} matrix failed on {device}: trying NumPy's ({error})", stacklevel=3)
        # NumPy uses a different LAPACK than torch. With two threads, torch's (MKL) does not converge for some matrices
        # in which most rows are zero.
        values, vectors = np.linalg.eigh(matrix.cpu().numpy())
        return torch.from_numpy(values).to(device), torch.from_numpy(vectors).to(device)


def singular_values(W: Tensor) -> Tensor:
    """Return the singular values of W (d, m) in descending order, in float64 on the CPU.

    One algorithm for all devices, at little cost: for 4608 x 512 it takes 0.05 s on 16 cores; an H100 takes 0.04 s.

    >>> singular_values(torch.diag(torch.tensor([1.0, 2.0]))).tolist()
    [2.0, 1.0]
    """
    return torch.linalg.svdvals(W.cpu().double())
