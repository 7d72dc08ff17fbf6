"""The small pictures on the book's first page: the first picture of each executed notebook that has a card there.

python -m urank.reproduction.gallery INTRO NOTEBOOKS FOLDER
"""

import json
import re
import sys
from pathlib import Path


def first_picture(notebook: Path) -> str:
    """Return the first SVG picture in the outputs of an executed notebook.

    Raises:
        ValueError: it has none.
    """
    for cell in json.loads(notebook.read_text())["cells"]:
        for shown in cell.get("outputs", []):
            if "image/svg+xml" in shown.get("data", {}):
                return "".join(shown["data"]["image/svg+xml"])
    raise ValueError(f"{notebook}: no SVG picture; remove it from the gallery of the first page")


def write_gallery(intro: Path, notebooks: Path, folder: Path) -> None:
    """Write `folder`/NAME.svg for each `:img-top: gallery/NAME.svg` in the first page."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in re.findall(r":img-top: gallery/(\w+)\.svg", intro.read_text()):
        (folder / f"{name}.svg").write_text(first_picture(notebooks / f"{name}.ipynb"))


if __name__ == "__main__":
    write_gallery(*map(Path, sys.argv[1:]))
