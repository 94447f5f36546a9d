"""The examples of docs/cluster.md: Ray's own schema, Slurm's script with stand-ins for Slurm, KubeRay's job."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsv4convert.engine.cluster_bridge import WORKERS

from .command_line import run_cli

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples" / "cluster"


def document(name: str) -> dict[str, Any]:
    content = yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def test_rays_autoscaler_accepts_its_config() -> None:
    pytest.importorskip("ray")
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(document("ray.yaml")))
    with pytest.raises(Exception, match="Additional properties"):
        validate_config(prepare_config(document("ray.yaml")) | {"nonsense": 1})


# Slurm's commands and Ray's: each notes its call; the head's `ray start` listens, as the script waits for it to.
STAND_INS = {
    "scontrol": "echo 127.0.0.1; echo other",
    "srun": 'while [ "$1" != ray ]; do shift; done; exec "$@"',
    "ray": """case " $* " in *" --head "*) exec python3 -c '
import re, socket, sys, time
with socket.create_server(("127.0.0.1", int(re.search("--port=([0-9]+)", " ".join(sys.argv))[1]))):
    time.sleep(60)' "$@";; esac
exec sleep 60""",
    "dsv4convert": """test -s "$RAY_AUTH_TOKEN_PATH" || exit 99
until [ "$(grep -c '^ray start' calls)" = "$STARTS" ]; do sleep 0.05; done
exit "$RC\"""",
}


@pytest.mark.parametrize(("nodes", "code"), [(1, 0), (3, 0), (3, 16)])
def test_slurms_script_starts_all_nodes_and_converts(nodes: int, code: int, tmp_path: Path) -> None:
    for name, lines in STAND_INS.items():
        stand_in = tmp_path / name
        stand_in.write_text(f'#!/bin/bash\necho "{name} $*" >> calls\n{lines}\n')
        stand_in.chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": "nodes",
        "SLURM_CPUS_ON_NODE": "16",
        "RC": str(code),
        "STARTS": str(min(nodes, 2)),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    script = subprocess.run(
        ["bash", EXAMPLES / "slurm.sh", "hf-to-gguf", "in", "out file.gguf"],
        env=slurm,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert script.returncode == code, script.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    starts = [call for call in calls if call.startswith("srun ")]
    assert len(starts) == min(nodes, 2)
    assert "--nodelist=127.0.0.1 ray start --head --node-ip-address=127.0.0.1" in starts[0]
    assert all("--num-cpus=16" in call for call in starts)
    if nodes > 1:
        assert f"--nodes={nodes - 1} --exclude=127.0.0.1 ray start --address=127.0.0.1:" in starts[1]
    assert "dsv4convert hf-to-gguf in out file.gguf --workers ray:auto --resume" in calls
    assert list(tmp_path.glob("ray-token-*")) == []


def test_kuberays_job_runs_a_command_that_is_accepted(tmp_path: Path) -> None:
    job = document("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    program, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert program == "dsv4convert"
    assert WORKERS.fullmatch(arguments[arguments.index("--workers") + 1])
    assert run_cli(*arguments).code == 3  # the checkpoint is missing, and no option is
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        claims = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == claims
            assert arguments[1].startswith(container["volumeMounts"][0]["mountPath"])
