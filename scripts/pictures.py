"""The pictures in the README and the documents, from real runs.

    python -m scripts.pictures                                    # plan, status and run (SVG), in some minutes
    python -m scripts.pictures runs/quickstart/report/index.html  # the rollouts of a report (PNG), by Chromium

For the first three, a small Countdown run is started in a temporary folder, looked at while it works, and ended.
"""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from rich.console import Console, RenderableType

from eopd.pipeline.cli.options import open_runs
from eopd.pipeline.config import load_config
from eopd.pipeline.forecast import forecast
from eopd.pipeline.status import Status, plan_table, status_view, take_status
from tests.stages.headless_browser import browser

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
WIDTH = 100
ONLY_ROLLOUTS = """(() => {
  const rollouts = document.getElementById("rollouts");
  document.body.replaceChildren(rollouts);
  document.body.style.cssText = "margin: 0; padding: 8px 20px; max-width: none";
  const prompts = [...rollouts.querySelectorAll(".prompt")];
  const solved = prompts.filter((prompt) => prompt.querySelector(".who .good"));
  const shown = [...solved, ...prompts].slice(0, 2);
  rollouts.querySelectorAll(".prompt").forEach((prompt) => { if (!shown.includes(prompt)) prompt.remove(); });
  shown.forEach((prompt) => { prompt.open = true; });
  rollouts.style.cssText = "margin: 0; padding: 0";
  return [document.body.offsetWidth, Math.ceil(shown.at(-1).getBoundingClientRect().bottom) + 8];
})()"""
"""Leaves of a report two prompts, if it can with a right response; returns width and height of what is left."""
CHANGES = [
    *("name=demo", "rounds=40", "rollout.prompts_per_round=256", "rollout.samples_per_prompt=1", "train.epochs=1"),
    *("rollout.rows_per_part=32", "evaluate.rows_per_part=32", "evaluate.samples=2", "launcher.kind=local"),
    *("launcher.workers=2", "rollout.engine=transformers", "score.engine=transformers"),
    "evaluate.engine=transformers",
]


def save(name: str, title: str, show: RenderableType | str) -> None:
    """One SVG without anything of this machine in it."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(show)
    PICTURES.mkdir(parents=True, exist_ok=True)
    path = PICTURES / f"{name}.svg"
    # without the web font that rich names: a picture should ask nobody for anything
    text = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title=title), flags=re.DOTALL)
    path.write_text(text, encoding="utf-8")
    for folder in (str(Path.cwd()), tempfile.gettempdir(), os.uname().nodename):
        assert len(folder) < 3 or folder not in text, f"{path} names {folder}"


def wait_for(ready: Callable[[], Status | None], seconds: float) -> Status:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        tasks = ready()
        if tasks is not None:
            return tasks
        time.sleep(0.3)
    raise TimeoutError("the run did not get as far as the picture needs")


def picture_rollouts(page: Path) -> None:
    """Write the first rollouts of a report, coloured by the teacher's entropy."""
    with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as tab:
        tab.open(page, 960, 4000)
        width, height = tab.evaluate(ONLY_ROLLOUTS)
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1.5}
        shot = tab.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
    (PICTURES / "rollouts.png").write_bytes(base64.b64decode(shot["data"]))


def main() -> None:
    if len(sys.argv) > 1:
        picture_rollouts(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)  # so that the store is called "store" in the pictures
        settings = load_config("quickstart", CHANGES)
        Path("demo.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")), encoding="utf-8")
        command = [sys.executable, "-m", "eopd.pipeline.cli", "run", "demo.yaml"]
        with Path("log").open("w") as log:
            run = subprocess.Popen(command, stderr=log, env={"OMP_NUM_THREADS": "1", **os.environ})
        try:

            def under_way() -> Status | None:
                status = take_status(open_runs("demo.yaml", None, None))
                trained = any(row.stage == "train" and row.is_done for row in status.forecast.rows)
                working = [activity for activity in status.activities if activity.workers and activity.row.done]
                return status if trained and working and status.forecast.rates.keys() >= {"score", "train"} else None

            status = wait_for(under_way, 900)
            save("status", "eopd status demo", status_view(status))
            save("plan", "eopd plan demo.yaml", plan_table(forecast(open_runs("demo.yaml", None, None))))
        finally:
            run.send_signal(signal.SIGINT)
            run.wait()
        lines = Path("log").read_text(encoding="utf-8").replace(name + "/", "").splitlines()
        save("run", "eopd run demo.yaml", "\n".join(lines[:16]))


if __name__ == "__main__":
    main()
