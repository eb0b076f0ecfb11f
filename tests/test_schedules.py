"""The files of workflows/ call commands that exist, and fit the formats of their schedulers."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

from known_builds import run_here
from known_datasets import write_dataset
from minecube.catalog.cluster import Cluster, WorkerPod
from minecube.jobs.runs.deployments import describe_dask_cluster

WORKFLOWS = Path(__file__).parents[1] / "workflows"
SCHEMAS = json.loads((Path(__file__).parent / "schemas" / "kubernetes_1.37.json").read_text())
MANIFESTS = {"job.yaml": "batch.v1.Job", "cronjob.yaml": "batch.v1.CronJob"}


def check(manifest, kind):
    """Compare a manifest with Kubernetes' own schema, which allows no unknown key."""
    schema = {**SCHEMAS, "$ref": f"#/$defs/io.k8s.api.{kind}"}
    jsonschema.Draft202012Validator(schema).validate(manifest)


def read_manifest(name):
    return yaml.safe_load((WORKFLOWS / "kubernetes" / name).read_text())


def pods_of(manifest):
    spec = manifest["spec"]
    return spec.get("jobTemplate", {"spec": spec})["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_fit_the_schemas_of_kubernetes(name):
    manifest = read_manifest(name)
    check(manifest, MANIFESTS[name])
    for typo in ("restartPolice", "volume"):
        wrong = copy.deepcopy(manifest)
        pods_of(wrong)[typo] = "Never"
        with pytest.raises(jsonschema.ValidationError, match=typo):
            check(wrong, MANIFESTS[name])


def test_pods_of_the_engine_fit_the_schemas_of_kubernetes():
    cluster = Cluster(
        id="pods",
        title="Four pods with a GPU",
        kind="kubernetes",
        workers=4,
        threads=2,
        memory_gb=6,
        lifetime_minutes=210,
        stagger_minutes=20,
        temporary="/tmp",
        resources={"predict": {"GPU": 1}},
        kubernetes=WorkerPod(
            image="registry.example.org/minecube:0.1.0",
            secret="object-store-keys",
            volume_claim="mines",
            limits={"nvidia.com/gpu": "1"},
        ),
    )
    resource = describe_dask_cluster(cluster, "minecube-1")
    assert (resource["apiVersion"], resource["kind"]) == ("kubernetes.dask.org/v1", "DaskCluster")
    # The resource of Dask's operator: templates.yaml of dask-kubernetes 2026.3.
    scheduler, worker = (resource["spec"][name] for name in ("scheduler", "worker"))
    assert (set(scheduler), set(worker)) == ({"spec", "service"}, {"replicas", "spec"})
    check(scheduler["spec"], "core.v1.PodSpec")
    check(scheduler["service"], "core.v1.ServiceSpec")
    check(worker["spec"], "core.v1.PodSpec")
    (container,) = worker["spec"]["containers"]
    words = " ".join(container["args"])
    assert "--lifetime 12600s --lifetime-stagger 1200s --resources GPU=1" in words
    assert container["resources"]["limits"] == {"cpu": "2", "memory": "6G", "nvidia.com/gpu": "1"}


def dry_run(world, folder, words):
    """Print what a command of a schedule would do, for a dataset in a folder."""
    assert Path(words[0]).name == "minecube"
    dataset = write_dataset(world, folder)
    words = [str(dataset) if word.endswith("dataset.yaml") else word for word in words[1:]]
    out, _ = run_here(*words, "--dry-run")
    return out


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_run_commands_of_ours(world, tmp_path, name):
    (container,) = pods_of(read_manifest(name))["containers"]
    echo = tmp_path / "bin" / "minecube"
    echo.parent.mkdir()
    echo.write_text('#!/bin/sh\necho minecube "$@"\n')
    echo.chmod(0o755)
    done = subprocess.run(
        [*container["command"], *container.get("args", [])],
        env={
            "PATH": f"{echo.parent}{os.pathsep}{os.environ['PATH']}",
            "JOB_COMPLETION_INDEX": "19",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    if name == "job.yaml":  # the pods are counted from 0, shards from 1
        assert done.stdout.endswith("--shard 20/20\n")
    assert re.search(r"search +\d", dry_run(world, tmp_path / "mines", shlex.split(done.stdout)))


def test_the_cron_line_and_the_service_run_commands_of_ours(world, tmp_path):
    (line,) = [
        line
        for line in (WORKFLOWS / "crontab").read_text().splitlines()
        if not line.startswith("#")
    ]
    command = line.split("&&")[1].split(">>")[0]
    assert "%" not in command  # cron takes it for the end of the line
    (started,) = re.findall(r"ExecStart=(.*)", (WORKFLOWS / "annual.service").read_text())
    for number, words in enumerate((command, started)):
        assert re.search(r"search +2", dry_run(world, tmp_path / str(number), shlex.split(words)))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_reads_the_units(tmp_path):
    for name in ("annual.service", "annual.timer"):
        shutil.copy(WORKFLOWS / name, tmp_path)
    service = tmp_path / "annual.service"
    # systemd looks for the program at once.
    service.write_text(service.read_text().replace("%h/mines/.venv/bin/minecube", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", *tmp_path.glob("annual.*")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_container_image_copies_files_and_installs_extras_that_exist():
    recipe = (WORKFLOWS / "kubernetes" / "Dockerfile").read_text()
    copied = [
        name for line in re.findall(r"^COPY (.+) \S+$", recipe, re.M) for name in line.split()
    ]
    assert [name for name in copied if not (WORKFLOWS.parent / name).exists()] == []
    project = tomllib.loads((WORKFLOWS.parent / "pyproject.toml").read_text())
    assert project["project"]["readme"] in copied
    (extras,) = re.findall(r"'\.\[(.+)\]'", recipe)
    assert set(extras.split(",")) <= project["project"]["optional-dependencies"].keys()
