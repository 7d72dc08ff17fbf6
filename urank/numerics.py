"""In which arithmetic a device multiplies, and by which algorithms."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor

TRIED = 3  # algorithms for each convolution


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No TF32 and no autocast inside, whatever is set outside: float32 is float32."""
    available = torch.amp.is_autocast_available(device.type)  # not so for "meta"
    with ieee_float32(), torch.autocast(device.type, enabled=False) if available else nullcontext():
        yield


@contextmanager
def ieee_float32() -> Iterator[None]:
    """No TF32 inside, nor bfloat16 in its place; cuDNN's convolutions use TF32 unless they are told not to."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
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
def tried_convolutions() -> Iterator[None]:
    """Inside the block cuDNN tries some of its algorithms for each shape and takes the fastest, on GPUs.

    A split network has its ranks as numbers of channels. For odd ones others report choices many times slower. To try
    them takes seconds at the beginning of a fit: a split VGG19's first epoch took 6.4 s of an H100, the others 1.1.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.benchmark_limit
    try:
        cudnn.benchmark, cudnn.benchmark_limit = True, TRIED
        yield
    finally:
        cudnn.benchmark, cudnn.benchmark_limit = before


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """bfloat16 autocast for "bfloat16", and for "auto" where the device multiplies it faster than float32."""
    bfloat16 = arithmetic(device, precision) == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()


def arithmetic(device: torch.device, precision: str) -> str:
    """What `precision`, which may be "auto", means on `device`: "float32" or "bfloat16"."""
    if precision != "auto":
        return precision
    return "bfloat16" if has_fast_bfloat16(device) else "float32"


def has_fast_bfloat16(device: torch.device) -> bool:
    """True where the device multiplies bfloat16 faster than float32: tensor cores, AMX, or AVX512-BF16 made by AMD.

    AVX512-BF16 alone does not say: on an AMD EPYC (Zen 4) networks train 1.4 to 2.0 times as fast with it as in float32
    (VGG11: 408 against 221 images a second), on an Intel Xeon VGG11 and ResNet18 train 7 to 17 % slower and are
    evaluated no more than 6 % faster.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    known = processor()
    made_by_amd = known.get("cpu_name", "").startswith("AMD")
    return bool(known.get("amx_bf16") or (made_by_amd and known.get("avx512_bf16")))


def processor() -> Mapping:
    """What torch knows of the processor, its name and instruction sets; older versions of torch know nothing."""
    return getattr(torch.cpu, "get_capabilities", dict)()


FAST_FLOAT64 = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))  # CUDA compute capabilities: P100, V100, A100, H100, B200


def statistics_precision(device: torch.device) -> tuple[torch.device, torch.dtype]:
    """Where the statistics of data on `device` are summed, always in float64, and the precision of their products.

    Products are float64 as well where that is fast: on the CPU, and on CUDA GPUs of the compute capabilities in
    `FAST_FLOAT64`, which do half as many float64 operations a second as float32 ones. Other CUDA GPUs do 1/32 or 1/64
    as many: products are float32 there (never TF32). Apple's MPS has no float64 at all: its data goes to the CPU.
    """
    if device.type == "mps":
        return torch.device("cpu"), torch.float64
    slow = device.type == "cuda" and torch.cuda.get_device_capability(device) not in FAST_FLOAT64
    return device, torch.float32 if slow else torch.float64


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), ascending, and eigenvectors (n, n) of a symmetric matrix; see `Spectrum.of` for failures."""
    try:
        return torch.linalg.eigh(matrix)
    except RuntimeError as error:  # LinAlgError and NotImplementedError are; cuSOLVER fails as itself
        n, device = len(matrix), matrix.device
        warnings.warn(f"eigh of a {n} x {n} matrix failed on {device}: trying NumPy's ({error})", stacklevel=3)
        # Another LAPACK: MKL's in torch, on two threads, does not converge on some matrices that are zero in most rows.
        return tuple(torch.from_numpy(part).to(device) for part in np.linalg.eigh(matrix.cpu().numpy()))


def singular_values(W: Tensor) -> Tensor:
    """The singular values of W (d, m) in float64, the largest first, on the processor.

    One algorithm for all devices, at little cost: 0.05 s for 4608 x 512 on 16 cores, 0.04 s on an H100.
    """
    return torch.linalg.svdvals(W.cpu().double())
