"""Run the package as on a GPU where there is none: `python tests/pretended_gpu.py FOLDER` runs `TINY` there.

Tensors stay on the processor. Those that would be on the GPU are marked and say "cuda" when they are asked, and what a
GPU refuses is refused: an operation on tensors of both devices, or NumPy's view of one that is marked. Speed, memory
and arithmetic are the processor's: only what is where is tested.
"""

import sys
from unittest import mock

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map_only

GPU, PROCESSOR = torch.device("cuda", 0), torch.device("cpu")
NAME = "pretended GPU"
MEMORY = (100 << 30, 140 << 30)  # bytes: free, and of all


def on_gpu(tensor: Tensor) -> bool:
    return tensor.__dict__.get("pretended", False)


def marked(result, gpu: bool):
    """`result` with every tensor in it on the GPU, or on the processor."""

    def mark(tensor: Tensor) -> Tensor:
        tensor.pretended = gpu
        return tensor

    return tree_map_only(Tensor, mark, result)


def is_gpu(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


def moved(tensor: Tensor, *args, device=None, non_blocking: bool = False, **kwargs) -> Tensor:
    """`Tensor.to` a device, a dtype, or both; a copy where the device changes."""
    target = next((arg for arg in (device, *args) if isinstance(arg, torch.device | str)), None)
    gpu = on_gpu(tensor) if target is None else is_gpu(target)
    kwargs = dict(dtype=next((arg for arg in args if isinstance(arg, torch.dtype)), tensor.dtype)) | kwargs
    kwargs |= dict(copy=True) if gpu != on_gpu(tensor) else {}
    return marked(tensor.to(**kwargs), gpu)


def unless_on_gpu(function):
    """What gives NumPy a tensor."""

    def call(tensor: Tensor, *args, **kwargs):
        if on_gpu(tensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return function(tensor, *args, **kwargs)

    return call


def chosen(tensor: Tensor, index, *value) -> Tensor | None:
    """`tensor[index]`, read or set: an index may be on the processor, a tensor that is set may not."""
    others = [leaf for leaf in tree_leaves(index) if isinstance(leaf, Tensor) and on_gpu(leaf)]
    others += [leaf for leaf in value if isinstance(leaf, Tensor) and leaf.ndim and on_gpu(leaf) != on_gpu(tensor)]
    check_one_place("indexing", [tensor, *others])
    return marked(tensor.__setitem__(index, *value) if value else tensor[index], on_gpu(tensor))


def check_one_place(what: str, tensors: list[Tensor]) -> None:
    """A number, a tensor without dimensions, may be on the processor whatever the others are."""
    if len({on_gpu(tensor) for tensor in tensors if tensor.ndim and not tensor.is_meta}) > 1:
        places = ", ".join(f"{tuple(tensor.shape)} on {'cuda:0' if on_gpu(tensor) else 'cpu'}" for tensor in tensors)
        raise RuntimeError(f"{what}: expected all tensors to be on the same device, got {places}")


def of_first(function):
    """What gives or sets a tensor that is where the first argument is."""

    def call(tensor: Tensor, *args, **kwargs):
        return marked(function(tensor, *args, **kwargs), on_gpu(tensor))

    return call


HANDLED = {
    Tensor.device.__get__: lambda tensor: GPU if on_gpu(tensor) else PROCESSOR,
    Tensor.is_cuda.__get__: on_gpu,
    Tensor.is_cpu.__get__: lambda tensor: not on_gpu(tensor),
    Tensor.grad.__get__: of_first(Tensor.grad.__get__),
    Tensor.grad.__set__: Tensor.grad.__set__,
    Tensor.data.__set__: lambda tensor, data: Tensor.data.__set__(marked(tensor, on_gpu(data)), data),
    Tensor.to: moved,
    Tensor.cpu: lambda tensor: moved(tensor, PROCESSOR),
    Tensor.cuda: lambda tensor, device=GPU: moved(tensor, GPU),
    Tensor.numpy: unless_on_gpu(Tensor.numpy),
    Tensor.__array__: unless_on_gpu(Tensor.__array__),
    Tensor.__getitem__: chosen,
    Tensor.__setitem__: chosen,
    Tensor.copy_: of_first(Tensor.copy_),
    Tensor.__deepcopy__: of_first(Tensor.__deepcopy__),
    torch._has_compatible_shallow_copy_type: torch._has_compatible_shallow_copy_type,
}


class PretendedGpu(TorchFunctionMode):
    """Inside, "cuda" is a device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        handler = next((handler for function, handler in HANDLED.items() if function == func), None)
        if handler is not None:
            return handler(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if (device := kwargs.get("device")) is not None:
            gpu = is_gpu(device)
            kwargs["device"] = PROCESSOR if gpu else device
        else:
            check_one_place(resolve_name(func) or str(func), tensors)
            gpu = any(map(on_gpu, tensors))
        return marked(func(*args, **kwargs), gpu)


def parameter(cls, data=None, requires_grad: bool = True, made=nn.Parameter.__new__) -> nn.Parameter:
    return marked(made(cls, data, requires_grad), data is not None and on_gpu(data))


def load_file(path, device="cpu", load=safetensors.torch.load_file) -> dict[str, Tensor]:
    return marked(load(path), is_gpu(device))


def generator(device="cpu", made=torch.Generator) -> torch.Generator:
    return made()


def unfused(made):
    """The processor's own steps: those that are fused, as on a GPU, round otherwise."""
    return lambda *args, fused, **kwargs: made(*args, **kwargs)


def nothing(*_, **__) -> None:
    return None


PATCHES = {
    "torch.cuda.is_available": lambda: True,
    "torch.cuda.device_count": lambda: 1,
    "torch.cuda.current_device": lambda: 0,
    "torch.cuda.get_device_capability": lambda device=None: (9, 0),
    "torch.cuda.is_bf16_supported": lambda *_: True,
    "torch.cuda.get_device_name": lambda device=None: NAME,
    "torch.cuda.mem_get_info": lambda device=None: MEMORY,
    "torch.cuda.memory_reserved": lambda device=None: 0,
    "torch.cuda.memory_allocated": lambda device=None: 0,
    "torch.cuda.synchronize": nothing,
    "torch.cuda.get_rng_state": lambda device=None: torch.zeros(1, dtype=torch.uint8),
    "torch.cuda.set_rng_state": nothing,
    "torch.Generator": generator,
    "torch.nn.Parameter.__new__": parameter,
    "torch.optim.SGD": unfused(torch.optim.SGD),
    "torch.optim.AdamW": unfused(torch.optim.AdamW),
    "safetensors.torch.load_file": load_file,
}


def pretend(run) -> None:
    """Call `run()` as on a machine with a GPU."""
    import torch._dynamo  # noqa: F401  which names torch.Generator in annotations, and so has to come first

    for name, pretended in PATCHES.items():
        mock.patch(name, pretended).start()
    with PretendedGpu():
        run()


if __name__ == "__main__":
    from conftest import TINY

    from urank.reproduction.runner import run

    pretend(lambda: run(TINY, sys.argv[1], "cuda", progress=False))
