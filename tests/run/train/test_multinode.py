"""Training on two nodes has the losses of one process.

Each node is started with its own `deepspeed --hostfile H --no_ssh --node_rank N`. The nodes are
network namespaces that a virtual cable connects, so they communicate over IP addresses like real
hosts. Skipped if root or iproute2 is missing.
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import yaml

from glimpse.tests.helpers.tiny import ROOT, environment, tiny_run_arguments, write_dataset

# Of the namespaces and of the interfaces, which may have at most 15 characters.
NAMES = [f"glimpse{os.getpid() % 100000}{side}" for side in "ab"]


@pytest.fixture
def nodes():
    """Return the names of two connected network namespaces, 10.77.0.1 and 10.77.0.2.

    The network interface in each has the same name as the namespace.
    """
    ip = shutil.which("ip")
    if not ip or os.geteuid():
        pytest.skip("network namespaces need root and iproute2 (the command ip)")

    def call(*args):
        return subprocess.run([ip, *args], capture_output=True, text=True)

    first, second = NAMES
    cable = ["link", "add", first, "netns", first]
    cable += ["type", "veth", "peer", "name", second, "netns", second]
    try:
        # Create the namespaces and the cable; not every machine allows it.
        commands = [call("netns", "add", name) for name in NAMES]
        commands.append(call(*cable))
        errors = [done.stderr.strip() for done in commands if done.returncode]
        if errors:
            pytest.skip(f"this machine allows no network namespaces: {errors[0]}")

        # Give each end of the cable its address.
        for n, name in enumerate(NAMES, 1):
            for args in (
                ["addr", "add", f"10.77.0.{n}/24", "dev", name],
                ["link", "set", name, "up"],
                ["link", "set", "lo", "up"],
            ):
                done = call("-n", name, *args)
                assert not done.returncode, done.stderr
        yield NAMES
    finally:
        for name in NAMES:
            call("netns", "del", name)


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def start(name, number, hosts, *arguments):
    """Start run/pretrain.py with DeepSpeed's launcher in a namespace; number: the node's rank."""
    line = ["ip", "netns", "exec", name, "deepspeed"]
    line += ["--hostfile", str(hosts), "--no_ssh"]
    line += ["--node_rank", str(number), "--master_addr", "10.77.0.1"]
    line += ["run/pretrain.py", *arguments]
    return subprocess.Popen(
        line,
        cwd=ROOT,
        env={**environment(), "GLOO_SOCKET_IFNAME": name},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@pytest.mark.slow
def test_two_nodes_train_as_one_process(nodes, tmp_path):
    data = write_dataset(tmp_path / "data")
    schedule = "samples=64"
    hosts = tmp_path / "hostfile"
    hosts.write_text("worker-0 slots=1\nworker-1 slots=1\n")
    two, one = tmp_path / "two", tmp_path / "one"

    # Two nodes.
    launches = []
    try:
        for number, name in enumerate(nodes):
            launches.append(start(name, number, hosts, *tiny_run_arguments(data, two, schedule)))
        outputs = [launch.communicate(timeout=120)[0] for launch in launches]
    finally:
        for launch in launches:
            if launch.poll() is None:
                os.killpg(launch.pid, signal.SIGKILL)

    ends = "\n".join(text[-2000:] for text in outputs)
    assert [launch.returncode for launch in launches] == [0, 0], ends
    first, second = outputs
    assert "2 ranks" in first
    assert "step 4/4" in first
    assert "step 4/4" not in second, "only the node of rank 0 prints progress"
    assert yaml.safe_load((two / "config.yaml").read_text())["provenance"]["ranks"] == 2
    assert len((two / "command.txt").read_text().splitlines()) == 1
    saved = list((two / "checkpoints/step-00000004").glob("*optim_states.pt"))
    assert len(saved) == 2, "each node wrote its shard"

    # One process.
    line = [sys.executable, "run/pretrain.py", *tiny_run_arguments(data, one, schedule)]
    done = subprocess.run(
        line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )

    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
