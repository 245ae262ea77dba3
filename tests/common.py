"""What several test files share."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from data import CLASS_NAMES

ROOT = Path(__file__).resolve().parent.parent
# Real SDSS spectra and templates, which are not part of this repository; tests that want them skip without.
SHARED_DATA = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def run_script(
    script: str, *arguments: object, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script as a user starts it, to its end."""
    return subprocess.run(
        command(script, *arguments), cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


def heed_ctrl_c() -> None:
    """As preexec_fn of a process: some shells make their background jobs, and all that these start, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def checkpoint_contents(modality: str) -> dict[str, object]:
    """What a checkpoint holds besides the network, as after one epoch on no stars."""
    config = {"class_names": list(CLASS_NAMES), "modality": modality, "stars": "0 stars", "batch_size": 2}
    config |= {"sic_weight": 1.0, "sic_negatives": "all"}
    return {"config": config, "splits": {"train": [], "validation": [], "test": []}, "epoch": 1}
