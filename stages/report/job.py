"""What the report stage is handed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eopd.stages.report.data import ReportData


@dataclass(frozen=True)
class ReportJob:
    """``out_dir`` receives index.html, numbers.csv and figures/; ``log_dir`` what the plotting library has to say."""

    out_dir: Path
    data: ReportData
    log_dir: Path
