"""The small pictures on the first page of the book."""

import nbformat
import pytest

from urank.reproduction.gallery import first_picture, write_gallery


def notebook(path, *pictures):
    """Write an executed notebook that shows `pictures` in one cell each."""
    cells = [nbformat.v4.new_markdown_cell("text")]
    for picture in pictures:
        output = nbformat.v4.new_output("display_data", {"image/svg+xml": picture, "text/plain": "figure"})
        printed = nbformat.v4.new_output("stream", text="printed")
        cells.append(nbformat.v4.new_code_cell(outputs=[printed, output]))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


def test_writes_the_first_picture_of_each_page_with_a_card(tmp_path):
    notebook(tmp_path / "figure1.ipynb", "<svg>1</svg>", "<svg>2</svg>")
    notebook(tmp_path / "table9.ipynb", "<svg>9</svg>")
    (tmp_path / "intro.md").write_text(":img-top: gallery/figure1.svg\n:link: ../notebooks/table9\n")
    write_gallery(tmp_path / "intro.md", tmp_path, tmp_path / "gallery")
    assert {path.name: path.read_text() for path in (tmp_path / "gallery").iterdir()} == {"figure1.svg": "<svg>1</svg>"}


def test_names_a_page_without_a_picture(tmp_path):
    notebook(tmp_path / "figure1.ipynb")
    with pytest.raises(ValueError, match="figure1.ipynb: no SVG picture"):
        first_picture(tmp_path / "figure1.ipynb")
