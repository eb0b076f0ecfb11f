"""Start Dask workers: as jobs of SLURM, or as pods of Kubernetes. They end with the run."""

from __future__ import annotations

import secrets
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minecube.catalog import Cluster
from minecube.catalog.cluster import WorkerPod
from minecube.errors import CatalogError
from minecube.jobs.failures import one_line


@contextmanager
def start_workers(cluster: Cluster) -> Iterator[Any]:
    """Start the workers of a cluster. Yields what `distributed.Client` connects to.

    Raises CatalogError if a package or program is missing, or the workers cannot be started.
    """
    if cluster.kind == "slurm":
        deployment = _start_slurm(cluster)
    elif cluster.kind == "kubernetes":
        deployment = _start_kubernetes(cluster)
    else:
        yield cluster.address
        return
    with deployment:
        yield deployment


def list_worker_options(cluster: Cluster) -> list[str]:
    """List the options of `dask worker` for lifetime and resources."""
    options = []
    if cluster.lifetime_minutes is not None:
        options += ["--lifetime", f"{60 * cluster.lifetime_minutes:g}s"]
    if cluster.stagger_minutes:
        options += ["--lifetime-stagger", f"{60 * cluster.stagger_minutes:g}s"]
    if offered := cluster.offered_resources():
        amounts = " ".join(f"{name}={amount:g}" for name, amount in offered.items())
        options += ["--resources", amounts]
    return options


def _start_slurm(cluster: Cluster) -> Any:
    """Submit a job per worker. A job that ends is replaced."""
    from dask_jobqueue import SLURMCluster  # an extra, for clusters only

    if shutil.which("sbatch") is None:
        raise CatalogError(
            f"engine {cluster.id}: expected the program sbatch, found none; start the run on a "
            "login node of the cluster"
        )
    job = cluster.slurm
    options = [shlex.quote(option) for option in list_worker_options(cluster)]
    exports = []
    if cluster.temporary is not None:
        exports = [f"export TMPDIR={shlex.quote(cluster.temporary)}"]
    deployment = SLURMCluster(
        job_name="minecube",
        cores=1,  # one unit at a time
        processes=1,
        job_cpu=cluster.threads or 1,
        memory=f"{cluster.memory_gb:g} GB",
        queue=job.queue,
        account=job.account,
        walltime=job.walltime,
        job_extra_directives=list(job.directives),
        job_script_prologue=[*exports, *job.setup],
        worker_extra_args=options,
        local_directory=cluster.temporary,
        log_directory=job.logs,
        interface=job.interface,
    )
    _check_job(cluster, deployment)
    deployment.adapt(minimum_jobs=cluster.workers, maximum_jobs=cluster.workers)
    return deployment


def _check_job(cluster: Cluster, deployment: Any) -> None:
    """Raise CatalogError if SLURM would refuse the job of a worker. Submits nothing."""
    answer = subprocess.run(
        ["sbatch", "--test-only"],  # noqa: S607  the user's own SLURM
        input=deployment.job_script(),
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        deployment.close()
        raise CatalogError(
            f"engine {cluster.id}: SLURM refuses the job of a worker ({one_line(answer.stderr)}); "
            "correct `slurm` in clusters.yaml"
        )


def _start_kubernetes(cluster: Cluster) -> Any:
    """Create a DaskCluster, whose pods the operator of Dask starts."""
    try:
        from dask_kubernetes.operator import KubeCluster
    except ModuleNotFoundError as error:
        raise CatalogError(
            f"engine {cluster.id} needs one package more: pip install dask-kubernetes"
        ) from error
    pod = need_pod(cluster)
    spec = describe_dask_cluster(cluster, f"minecube-{secrets.token_hex(4)}")
    try:
        return KubeCluster(
            custom_cluster_spec=spec,
            namespace=pod.namespace,
            resource_timeout=int(60 * cluster.wait_minutes),
            quiet=True,
        )
    except Exception as error:  # of half a dozen libraries
        raise CatalogError(
            f"engine {cluster.id}: Kubernetes does not start a DaskCluster ({one_line(error)}); "
            "check `kubectl get daskclusters`, and that the operator of Dask is installed"
        ) from error


def need_pod(cluster: Cluster) -> WorkerPod:
    """Return the pod of a cluster of kind kubernetes."""
    assert cluster.kubernetes is not None  # noqa: S101  checked by Cluster
    return cluster.kubernetes


def describe_dask_cluster(cluster: Cluster, name: str) -> dict[str, Any]:
    """Describe the scheduler and the workers of a cluster as a resource of Kubernetes."""
    worker = _describe_container(cluster, "worker")
    threads = cluster.threads or 1
    memory = f"{cluster.memory_gb:g}G"
    worker["args"] = [
        *("python", "-m", "distributed.cli.dask_worker", "--name", "$(DASK_WORKER_NAME)"),
        *("--nthreads", "1", "--memory-limit", f"{cluster.memory_gb:g} GB"),
        *list_worker_options(cluster),
    ]
    limits = {"cpu": str(threads), "memory": memory, **need_pod(cluster).limits}
    worker["resources"] = {"limits": limits, "requests": {"cpu": str(threads), "memory": memory}}
    scheduler = _describe_container(cluster, "scheduler")
    scheduler["args"] = ["python", "-m", "distributed.cli.dask_scheduler", "--host", "0.0.0.0"]  # noqa: S104
    ports = {"tcp-comm": 8786, "http-dashboard": 8787}
    scheduler["ports"] = [{"name": port, "containerPort": ports[port]} for port in ports]
    scheduler["readinessProbe"] = {"httpGet": {"port": "http-dashboard", "path": "/health"}}
    services = [{"name": port, "port": ports[port], "targetPort": port} for port in ports]
    service = {
        "type": "ClusterIP",
        "selector": {"dask.org/cluster-name": name, "dask.org/component": "scheduler"},
        "ports": services,
    }
    return {
        "apiVersion": "kubernetes.dask.org/v1",
        "kind": "DaskCluster",
        "metadata": {"name": name},
        "spec": {
            "scheduler": {"spec": _describe_pod(cluster, scheduler), "service": service},
            "worker": {"replicas": cluster.workers, "spec": _describe_pod(cluster, worker)},
        },
    }


def _describe_container(cluster: Cluster, name: str) -> dict[str, Any]:
    pod = need_pod(cluster)
    container: dict[str, Any] = {"name": name, "image": pod.image}
    if cluster.temporary is not None:
        container["env"] = [{"name": "TMPDIR", "value": cluster.temporary}]
    if pod.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": pod.secret}}]
    if pod.volume_claim is not None:
        container["volumeMounts"] = [{"name": "files", "mountPath": pod.mount}]
    return container


def _describe_pod(cluster: Cluster, container: dict[str, Any]) -> dict[str, Any]:
    pod = need_pod(cluster)
    spec: dict[str, Any] = {"containers": [container]}
    if pod.volume_claim is not None:
        claim = {"claimName": pod.volume_claim}
        spec["volumes"] = [{"name": "files", "persistentVolumeClaim": claim}]
    return spec
