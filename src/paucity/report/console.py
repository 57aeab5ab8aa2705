"""The dense/sparse table on the console, readable in 80 columns."""

from rich import box
from rich.table import Table
from rich.text import Text

from .compare import MARKS, rows
from .schema import Report

_STYLES = {"better": "green", "worse": "red", "same": "dim", "within noise": "dim", "": "dim"}


def console_table(report: Report) -> Table:
    """Rows of dense, sparse and change; better and worse are told in words as well as in colour."""
    table = Table(title=Text(report.title), box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.add_column("")
    for name in ("dense", "sparse", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows(report):
        mark = Text(f"{MARKS[row.judgement]} {row.judgement}".strip(), style=_STYLES[row.judgement])
        table.add_row(Text(row.label), row.dense, row.sparse, row.change, mark)
    return table
