"""Write the golden keys and losses, or one of them.

    python -m tests.golden.make [keys] [losses]

Golden values guard decisions: a change of one is a change of what every user's store holds, so it is written down in
CHANGELOG.md in the same commit. The golden part of the cache format is made by `tests.storage.make_golden`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.golden.keys import golden_keys
from tests.golden.losses import golden_losses

FOLDER = Path(__file__).parent
MAKERS = {"keys": golden_keys, "losses": golden_losses}


def read(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def main() -> None:
    for name in sys.argv[1:] or MAKERS:
        text = json.dumps(MAKERS[name](), indent=1, sort_keys=True) + "\n"
        (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
