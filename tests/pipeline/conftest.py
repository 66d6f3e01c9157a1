"""What several tests of the pipeline start from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where runs are started: models of one weight, and a prompt."""
    home = tmp_path / "home"
    model = home / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({"vocab_size": 10, "eos_token_id": 2}))
    (model / "tokenizer.json").write_text("{}")
    save_file({"weight": np.zeros(1)}, model / "model.safetensors")
    (home / "prompts.jsonl").write_text(json.dumps({"prompt": "1 + 1"}) + "\n")
    monkeypatch.chdir(home)
    return home
