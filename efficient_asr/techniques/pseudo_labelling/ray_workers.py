"""Pseudo-labelling on several machines or GPUs, with Ray Data: each worker is an actor with its own copy of the teacher.

The batches are those of the plain pass, and the driver writes their records, so that the output is the same. If a worker or its
machine dies, Ray starts another one and repeats its batch; the driver has only seen complete batches. All machines must see the
audio files and the teacher under the same paths.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from efficient_asr.data import Row, Rows
from efficient_asr.inference.manifest_pass import worked
from efficient_asr.techniques.pseudo_labelling.labels import Labeller
from efficient_asr.utils.errors import UserError

RETRIES = 20  # of a worker that dies, and of its batch
MOST_BLOCKS = 10_000  # of a dataset; a block is done when all its batches are


class Worker:
    """An actor that labels batches.

    Arguments
    ---------
    arguments : dict
        Those of `Labeller`.
    threads : int or None
        CPU threads; None for torch's default.
    skip_bad : bool
        See `manifest_pass.worked`.
    """

    def __init__(self, arguments: dict[str, Any], threads: int | None, skip_bad: bool = False) -> None:
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self.arguments, self.label, self.skip_bad = arguments, None, skip_bad

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Return the rows of a batch and their records, as JSON, or the message of a problem."""
        rows = json.loads(item["rows"])
        try:
            if self.label is None:  # here, so that a missing teacher is a message and no dead actor
                self.label = Labeller(**self.arguments)
            records = worked(Rows.of(rows), self.label, self.skip_bad)
            return {"rows": item["rows"], "records": json.dumps(records), "problem": ""}
        except UserError as error:
            return {"rows": item["rows"], "records": "[]", "problem": str(error)}


def label_batches(
    rows: Rows,
    batches: list[list[int]],
    arguments: dict[str, Any],
    address: str | None,
    workers: int | None,
    skip_bad: bool = False,
) -> Iterator[tuple[list[Row], list[Row]]]:
    """Yield rows and labelled rows of each batch, in the order in which workers finish.

    Arguments
    ---------
    rows : Rows
        All utterances.
    batches : list of list of int
        Indices of `rows`.
    arguments : dict
        Those of `Labeller`.
    address : str or None
        Address of a running cluster, or `auto`; None to start Ray on this machine.
    workers : int or None
        Number of workers; None for one per GPU or core of the cluster.
    skip_bad : bool
        See `manifest_pass.worked`.

    Raises
    ------
    UserError
        If Ray is not installed or cannot be reached, an utterance cannot be read, or workers die again and again.
    """
    if not batches:
        return
    ray = _connect(address)
    import torch

    asked = arguments["device"]  # not that of this machine, if there is an address
    on_gpu = ray.cluster_resources().get("GPU", 0) > 0 if asked is None else asked.startswith("cuda")
    arguments = arguments | {"device": "cuda" if on_gpu else "cpu"}  # each worker sees one GPU only
    count = workers or max(1, int(ray.cluster_resources().get("GPU" if on_gpu else "CPU", 1)))
    # An actor that asks for a whole core would leave none to the tasks that read and collect.
    needs = {"num_gpus": 1, "num_cpus": 0.5} if on_gpu else {"num_cpus": 0.5}
    items = ({"rows": json.dumps([rows[i] for i in batch])} for batch in batches)
    data = ray.data.from_items(list(items), override_num_blocks=min(len(batches), MOST_BLOCKS))
    threads = max(1, torch.get_num_threads() // count) if address is None else None
    done = data.map(
        Worker,
        fn_constructor_args=(arguments, threads, skip_bad),
        compute=ray.data.ActorPoolStrategy(size=count),
        max_restarts=RETRIES,
        max_task_retries=RETRIES,
        **needs,
    )
    try:
        for item in done.iter_rows():
            if item["problem"]:
                raise UserError(item["problem"])
            yield json.loads(item["rows"]), json.loads(item["records"])
    except ray.exceptions.RayError as error:
        raise UserError(
            f"ray_workers: workers died again and again ({str(error).strip().splitlines()[0]}). Each needs memory for a "
            "teacher; give fewer of them. Rerun the command to continue"
        ) from None


def _connect(address: str | None) -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError("ray_workers, ray_address: Ray is not installed: pip install 'efficient_asr[ray]'") from None
    if not ray.is_initialized():
        try:
            ray.init(
                address,
                log_to_driver=False,
                logging_level="ERROR",
                include_dashboard=False if address is None else None,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"ray_address: cannot connect to '{address}' ({str(error).strip().splitlines()[0]})"
            ) from None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.print_on_execution_start = False, False
    return ray
