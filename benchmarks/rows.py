"""Tables of benchmark results that grow row by row."""

from pathlib import Path

import pandas as pd
import typer

from urank.files import atomic


class Table:
    """A CSV that grows by rows, each saved at once; an interrupted benchmark goes on after the last one.

    Args:
        keys: columns that tell rows apart.
    """

    def __init__(self, path: Path, *keys: str):
        self.path, self.keys = path, list(keys)

    def read(self) -> pd.DataFrame | None:
        return pd.read_csv(self.path) if self.path.exists() else None

    def has(self, *values: object) -> bool:
        rows = self.read()
        return rows is not None and bool((rows[self.keys].astype(str) == list(map(str, values))).all(axis=1).any())

    def add(self, row: dict) -> None:
        typer.echo(row)
        with atomic(self.path) as temporary:
            pd.concat([self.read(), pd.DataFrame([row])]).to_csv(temporary, index=False)
