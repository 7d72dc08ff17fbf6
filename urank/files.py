"""Files that are whole or absent: everything is written beside its place and then moved there.

Of several processes that compute one thing together (see `distributed`) only the first writes.

Weights are safetensors or are read with `weights_only=True`; nothing is unpickled.
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
    """Yield a temporary path beside `path`; move it there when the block ends well, delete it when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def delete_unfinished(folder: Path) -> None:
    """Delete what processes that were killed had written of files in `folder`; no other may be writing there."""
    for path in folder.rglob(".*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{32}", path.name):
            path.unlink()


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, atomically; NaN and infinity are refused.

    A file that holds this content already keeps its date, so that nothing made from it seems out of date.
    """
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    if not is_first() or path.exists() and path.read_bytes() == text.encode():
        return
    with atomic(path) as temporary:
        temporary.write_text(text)


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: the file is not JSON (cut off, for example); the message names it.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not a whole JSON file ({error}); delete it to compute it again") from error


def write_checkpoint(path: Path, state: dict) -> None:
    """Write tensors and plain values, atomically."""
    if is_first():
        with atomic(path) as temporary:
            torch.save(state, temporary)


def read_checkpoint(path: Path) -> dict:
    """Read what `write_checkpoint` wrote, without unpickling anything but tensors and plain values.

    Raises:
        ValueError: the file is damaged or holds something else; the message names it.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a damaged file; each is re-raised with its name
        raise ValueError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); delete it to start again"
        ) from error


def write_weights(path: Path, model: nn.Module) -> None:
    """Write a network's parameters and buffers as safetensors, atomically."""
    write_tensors(path, model.state_dict())


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors by name as safetensors, atomically; those that share memory, once under each name."""
    if not is_first():
        return
    whole, held = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        whole[name] = tensor.clone() if memory in held else tensor  # the format has no tensors that share memory
        held.add(memory)
    with atomic(path) as temporary:
        safetensors.torch.save_file(whole, temporary)


def read_weights(path: Path, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Tensors by name from a safetensors file, in the order of their names.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    try:
        return safetensors.torch.load_file(path, device=str(device))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: damaged weights ({error}); delete the file to compute it again") from error


def tensors_digest(text: str, *tensors: Tensor) -> str:
    """Twelve hexadecimal digits that change with `text` and with the content of the tensors."""
    hasher = hashlib.sha256(text.encode())
    for tensor in tensors:
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hasher.hexdigest()[:12]
