"""The report stage: a page, its figures as files, and its numbers.

<out_dir>/index.html    the page, whole in itself
<out_dir>/numbers.csv   every number
<out_dir>/figures/      every figure as SVG and as PNG
"""

from __future__ import annotations

import os
import secrets
import warnings
from pathlib import Path

from eopd.stages.report import plots
from eopd.stages.report.figure import Figure
from eopd.stages.report.job import ReportJob
from eopd.stages.report.numbers import to_csv
from eopd.stages.report.page import figures, render
from eopd.storage.files import naming_full_disks, replace_atomically


def run(job: ReportJob) -> Path:
    """Write the report and return the path of its page, which is written last and appears whole.

    Raises:
        ValueError: the data hold no run.
        StoreError: ``out_dir`` is full or not writable.
    """
    html = render(job.data)
    drawn = figures(job.data)
    folder = job.out_dir / "figures"
    with naming_full_disks(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _write_figures(folder, drawn, job.log_dir)
    replace_atomically(job.out_dir / "numbers.csv", to_csv(job.data))
    page = job.out_dir / "index.html"
    replace_atomically(page, html)
    return page


def _write_figures(folder: Path, drawn: list[Figure], log_dir: Path) -> None:
    """Both files of every figure; those of an earlier report that this one does not draw are removed."""
    from eopd.stages.report.raster import png

    written = set()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for figure in drawn:
            for suffix, content in (("svg", plots.standalone(figure).encode()), ("png", png(figure))):
                path = folder / f"{figure.name}.{suffix}"
                _replace_bytes(path, content)
                written.add(path.name)
    for path in folder.iterdir():
        if path.suffix in (".svg", ".png") and path.name not in written:
            path.unlink(missing_ok=True)  # another run of the same name may write its report too
    if said:
        replace_atomically(log_dir / "report.log", "".join(f"{warning.message}\n" for warning in said))


def _replace_bytes(path: Path, content: bytes) -> None:
    with naming_full_disks(path):
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        temporary.write_bytes(content)
        os.replace(temporary, path)
