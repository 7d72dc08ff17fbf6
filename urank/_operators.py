"""Make torchvision importable where its compiled operators cannot be loaded.

torchvision's wheel is compiled against one build of torch. Beside another build (a CPU-only torch is the usual case)
its shared library does not load, and `import torchvision`, and with it timm's, stops at `operator torchvision::nms
does not exist`. Nothing here needs the compiled operators, so their names are declared, without code behind them.
"""

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def loads(library: Path) -> bool:
    try:
        torch.ops.load_library(library)
    except OSError:
        return False
    return True


def declare_missing_operators() -> torch.library.Library | None:
    """Declare torchvision's operators unless its own library loads; the caller keeps the returned reference."""
    spec = importlib.util.find_spec("torchvision")
    libraries = sorted(Path(spec.origin).parent.glob("_C*.so")) if spec and spec.origin else []
    if not libraries or any(loads(library) for library in libraries):
        return None
    operators = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        operators.define(schema)
    return operators


OPERATORS = declare_missing_operators()
