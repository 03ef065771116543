"""How scripts without ranks end: a SIGTERM is a Ctrl-C, so that what is half made is removed.

    bash run/test.sh tests/test_cli.py
"""
import signal
import subprocess
import sys

from tests.tiny import ROOT, environment

SCRIPT = """
import tempfile, time
from run.lib.cli import run_script
def main():
    with tempfile.TemporaryDirectory(dir={folder!r}):
        print("begun", flush=True)
        time.sleep(60)
run_script(main)
"""


def test_what_is_half_made_goes_with_a_sigterm(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT.format(folder=str(tmp_path))], cwd=ROOT, env=environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "begun\n" and len(list(tmp_path.iterdir())) == 1
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[1] == "interrupted\n" and process.returncode == 130 and not list(tmp_path.iterdir())
