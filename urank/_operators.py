"""Make torchvision importable with a torch build that its compiled operators do not support.

A torchvision wheel is compiled for one build of torch. With another build, such as a CPU-only torch, its shared library
does not load: `import torchvision` and `import timm` then fail with "operator torchvision::nms does not exist". This
package never calls the compiled operators, so declaring their signatures is enough.
"""

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def loads(library: Path) -> bool:
    """Return True if the shared library can be loaded into this process."""
    try:
        torch.ops.load_library(library)
    except OSError:
        return False
    return True


def declare_missing_operators() -> torch.library.Library | None:
    """Declare torchvision's operators if its shared library does not load.

    The caller must keep the returned object: the declarations disappear with it.
    """
    spec = importlib.util.find_spec("torchvision")
    libraries = sorted(Path(spec.origin).parent.glob("_C*.so")) if spec and spec.origin else []
    if not libraries or any(loads(library) for library in libraries):
        return None
    operators = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        operators.define(schema)
    return operators


OPERATORS = declare_missing_operators()
