"""Steps on an accelerator that is not there, each form of each layer: see ``on_absent_device.py``."""

import os
import re
import subprocess
import sys
from pathlib import Path


def test_no_step_mixes_devices_or_waits_for_one():
    module = Path(__file__).with_name("on_absent_device.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(module)]
    environment = os.environ | {"DEVICE": "absent"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=module.parent.parent, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 55 and "skipped" not in done.stdout, done.stdout[-500:]
