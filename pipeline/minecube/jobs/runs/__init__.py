"""Run whole datasets: start, watch and mend. State comes from the store alone.

units.py      steps and their units of work     worker.py    one unit, leased and logged
inputs.py     what steps need, loaded once      engines.py   processes or a cluster
steps.py      the work of each step             plan.py      unfinished units of each site
mapping.py    maps of networks                  driver.py    keeps workers busy: `run`
finished.py   notes on finished steps           joins.py     results of all sites together
states.py     stale site-years                  history.py   attempts, from the event logs
summary.py    options and outcome of a run      retry.py      failed units again: `retry`
notify.py     summaries to a command or hook    update.py     new years, sites, scenes: `update`
publishing.py a finished dataset as a version   dask_workers.py   workers of a Dask scheduler
deployments.py    SLURM jobs and pods as workers        lookups.py   listings of files and notes
"""

from minecube.jobs.runs.driver import run
from minecube.jobs.runs.summary import RunOptions, Summary

__all__ = ["RunOptions", "Summary", "run"]
