"""Read and write files safely: a file is either complete or absent, and nothing is unpickled.

Every file is written under a temporary name in the same folder and then renamed. If several processes run (see
`distributed`), only the first one writes. Tensors are stored as safetensors, or read with `weights_only=True`.
"""

import hashlib
import json
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from urank.distributed import is_first


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` after the block, or delete it on an error.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "result.txt"
    ...     with atomic(path) as temporary:
    ...         _ = temporary.write_text("complete")
    ...     path.read_text()
    'complete'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def delete_unfinished(folder: Path) -> None:
    """Delete the temporary files that killed processes left in `folder`; no other process may be writing there."""
    for path in folder.rglob(".*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{32}", path.name):
            path.unlink()


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, atomically.

    If the file already has this content it is not touched, so that a build tool sees no change.

    Raises:
        ValueError: the content contains NaN or infinity.
    """
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    if not is_first() or path.exists() and path.read_bytes() == text.encode():
        return
    with atomic(path) as temporary:
        temporary.write_text(text)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is not valid JSON (truncated, for example).
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not a valid JSON file ({error}); delete it to compute it again") from error


def write_checkpoint(path: Path, state: dict) -> None:
    """Write a dictionary of tensors and plain values, atomically."""
    if is_first():
        with atomic(path) as temporary:
            torch.save(state, temporary)


def read_checkpoint(path: Path) -> dict:
    """Read a dictionary of tensors and plain values that `write_checkpoint` wrote, to the CPU.

    Raises:
        ValueError: the file is damaged or contains other objects.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file; the message names the type
        raise ValueError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); delete it to start again"
        ) from error


def write_weights(path: Path, model: nn.Module) -> None:
    """Write the parameters and buffers of a network as safetensors, atomically."""
    write_tensors(path, model.state_dict())


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors by name as safetensors, atomically.

    The format does not support shared memory: tensors that share memory are written once per name.
    """
    if not is_first():
        return
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    with atomic(path) as temporary:
        safetensors.torch.save_file(separate, temporary)


def read_weights(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read tensors by name from a safetensors file, in the order of their names.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return safetensors.torch.load_file(path, device=str(device))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: damaged weights ({error}); delete the file to compute it again") from error


def tensors_digest(text: str, *tensors: Tensor) -> str:
    """Return twelve hexadecimal digits of a hash of `text` and of the contents of the tensors.

    >>> tensors_digest("layer", torch.zeros(2)) == tensors_digest("layer", torch.ones(2))
    False
    """
    hasher = hashlib.sha256(text.encode())
    for tensor in tensors:
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()[:12]
