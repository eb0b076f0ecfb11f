"""Workers and several processes give the network that one process gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")


# Several processes, each of which may use sockets: torch's talk through them.
SCRIPT = """
    import dataclasses, hashlib, sys
    sys.path.insert(0, {here!r})
    import torch, torch.distributed as dist
    from pathlib import Path

    import known_trainings as t
    torch.set_num_threads(1)
    from minecube import models
    from minecube.train import Cubes, TrainingOptions, fit
    settings = dataclasses.replace(t.PLAIN, epochs=2, windows=24, rare=0.3, dice=0.5, year_dropout=0.2)
    train, valid = Cubes({{"a": t.with_holes(1), "b": t.with_holes(2)}}), Cubes({{"c": t.with_holes(3)}})
"""


def started(code: str, **environment: str) -> subprocess.Popen[str]:
    here = str(Path(__file__).parent)
    script = textwrap.dedent(SCRIPT.format(here=here)) + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-W", "error::UserWarning", "-c", script],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.mark.parametrize(
    "forks", [True, pytest.param(False, marks=pytest.mark.slow)]
)  # those started afresh import torch
def test_workers_do_not_change_the_network(forks: bool) -> None:
    code = f"""
        models.ARCHITECTURES["unet"] = t.with_dropout
        source = train if {forks} else t.Unforkable(train.cubes)
        for workers in (0, 2):
            network = fit(t.SMALL, source, valid, settings, TrainingOptions(workers=workers, seed=5)).trained.network
            print(hashlib.sha256(b"".join(v.numpy().tobytes() for v in network.state_dict().values())).hexdigest())
    """
    none, two = ended(started(code)).split()
    assert none == two


def test_two_processes_learn_what_one_does_from_the_whole_batch(tmp_path: Path) -> None:
    code = f"""
        import os
        models.ARCHITECTURES["unet"] = t.Flat
        alone = os.environ["WORLD_SIZE"] == "1"
        if not alone:
            dist.init_process_group("gloo")
        gradients = []
        stepped = torch.optim.Adam.step
        def step(self, *args, **kwargs):
            gradients.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
            return stepped(self, *args, **kwargs)
        torch.optim.Adam.step = step
        fitted = fit(t.SERIES, train, valid, settings, TrainingOptions(checkpoint=Path({str(tmp_path)!r}) / os.environ["NAME"]))
        if alone or dist.get_rank() == 0:
            kept = dict(gradients=gradients, weights=fitted.trained.network.state_dict())
            kept["losses"] = [e.loss for e in fitted.history]
            torch.save(kept | dict(f1=[e.f1 for e in fitted.history]), Path({str(tmp_path)!r}) / (os.environ["NAME"] + ".pt"))
        else:
            torch.save([e.f1 for e in fitted.history], Path({str(tmp_path)!r}) / "second.pt")
        if not alone:
            dist.destroy_process_group()
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    jobs = [started(code, WORLD_SIZE="1", NAME="one")]
    jobs += [
        started(code, WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, NAME="two", **where)
        for rank in "01"
    ]
    for job in jobs:
        ended(job)
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert len(one["gradients"]) == len(two["gradients"]) == 6
    for a, b in zip(
        one["gradients"][0], two["gradients"][0], strict=True
    ):  # from the same weights: the same to rounding
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-3, atol=1e-4)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["f1"] == pytest.approx(one["f1"], abs=5e-3)
    assert torch.load(tmp_path / "second.pt", weights_only=True) == two["f1"]
    assert sorted(p.name for p in tmp_path.glob("two*")) == ["two", "two.csv", "two.pt"]
