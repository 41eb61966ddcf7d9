"""The cells of a plan as tasks of a Ray cluster. The driver alone touches the folder: it claims, sends out, and writes."""

from __future__ import annotations

import importlib
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from outrider.errors import OptionError, OutriderError, SweepError
from outrider.eval.rows import Case, Row
from outrider.eval.sweep.evaluator import Evaluator
from outrider.eval.sweep.plan import Cell, Models, Plan
from outrider.eval.sweep.run import POLL_SECONDS, Event, Notice, Settled, Started, already_settled
from outrider.eval.sweep.store import Claim, Store
from outrider.guidance.alignment import AlignmentFile, load

LOCAL = "local"
TRIES = 4  # of a cell whose worker dies: the first, and three more


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a worker sends back: whole rows, and the error that the cell ended with."""

    rows: list[Row]
    seconds: float
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    """A cell that a worker computes."""

    claim: Claim
    tries: int


def run_on_ray(plan: Plan, store: Store, address: str, jobs: int) -> Iterator[Event]:
    """`run_here` on a cluster: every cell a task with one CPU, or one GPU where the plan's device is cuda.

    `address`: host:port of a running cluster, "auto" for the one of this machine, "local" for one of `jobs` CPUs that ends with
    the sweep. Workers need the same Outrider, and models under the same names. Raises OptionError where there is no Ray or no
    cluster, and what a worker refuses.
    """
    alignment = None if plan.models.alignment is None else load(plan.models.alignment, target=None, draft=None)
    with _cluster(address, jobs) as ray:
        resource = "GPU" if plan.models.device.startswith("cuda") else "CPU"
        slots = int(ray.cluster_resources().get(resource, 0))
        if slots < 1:
            raise OptionError("ray", address, f"a cluster with a {resource}, for device {plan.models.device}")
        demand = {"num_cpus": 1, "num_gpus": int(resource == "GPU"), "max_retries": 0}  # we count tries, and report them
        given = ray.put(plan), ray.put(alignment)
        try:
            refused, models = ray.get(ray.remote(inspect).options(**demand).remote(*given))
        except ray.exceptions.RayError as error:
            raise OptionError("ray", address, f"a cluster whose workers run this Outrider ({_last_line(error)})") from error
        if refused is not None:
            raise SweepError(refused)
        store.open(plan, models)
        compute = ray.remote(compute_remotely).options(**demand)
        yield from _drive(ray, compute, given, plan, store, slots)


def _drive(ray: Any, compute: Any, given: tuple[Any, Any], plan: Plan, store: Store, slots: int) -> Iterator[Event]:
    """Keep up to `slots` cells in flight until none is left."""
    numbers = {cell.stem: number for number, cell in enumerate(plan.cells)}
    waiting = [cell for cell in plan.cells if store.missing(cell)]
    sent: dict[Any, _Sent] = {}

    def send(claim: Claim, tries: int) -> None:
        reference = compute.remote(*given, numbers[claim.cell.stem], claim.missing)
        sent[reference] = _Sent(claim=claim, tries=tries)

    with ExitStack() as held:
        held.callback(lambda: _abandon(ray, sent))
        while waiting or sent:
            left: list[Cell] = []
            for cell in waiting:
                claim = store.claim(cell) if len(sent) < slots else None
                if claim is None:
                    left.append(cell)
                elif (settled := already_settled(claim)) is not None:
                    claim.release()
                    yield settled
                else:
                    send(claim, 1)
                    yield Started(stem=cell.stem)
            waiting = left
            if not sent:  # the rest is with other processes
                time.sleep(POLL_SECONDS)
                continue
            for reference in ray.wait(list(sent), timeout=POLL_SECONDS)[0]:
                one = sent.pop(reference)
                with ExitStack() as claimed:
                    claimed.callback(one.claim.release)
                    try:
                        outcome: Outcome = ray.get(reference)
                    except ray.exceptions.RayError as error:
                        lost = (
                            f"{one.claim.cell.name}: its worker was lost ({type(error).__name__}), {one.tries} of {TRIES} tries"
                        )
                        yield Notice(text=lost)
                        if one.tries < TRIES:
                            claimed.pop_all()
                            send(one.claim, one.tries + 1)
                            continue
                        outcome = Outcome(rows=[], seconds=0.0, error=f"{type(error).__name__}: {_last_line(error)}")
                    settled = _stored(one.claim, outcome)
                yield settled


def _abandon(ray: Any, sent: dict[Any, _Sent]) -> None:
    """What is still with workers is not waited for."""
    for reference, one in sent.items():
        ray.cancel(reference, force=True)
        one.claim.release()


def _stored(claim: Claim, outcome: Outcome) -> Settled:
    for row in outcome.rows:
        claim.add(row)
    if outcome.error is None:
        claim.finish()
    else:
        claim.fail(outcome.error)
    return Settled(stem=claim.cell.stem, rows=len(outcome.rows), seconds=outcome.seconds, error=outcome.error)


def inspect(plan: Plan, alignment: AlignmentFile | None) -> tuple[str | None, dict[str, Any]]:
    """Runs on a worker: what the plan is refused for there, if anything, and the models' identity."""
    try:
        evaluator = _evaluator(plan.models, alignment)
        evaluator.check(plan)
        return None, evaluator.identity()
    except OutriderError as error:
        return str(error), {}


def compute_remotely(plan: Plan, alignment: AlignmentFile | None, number: int, cases: tuple[Case, ...]) -> Outcome:
    """Runs on a worker: some cases of one cell."""
    started, rows, error = time.perf_counter(), [], None
    try:
        for row in _evaluator(plan.models, alignment).rows([plan.cells[number]], cases):
            rows.append(row)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    return Outcome(rows=rows, seconds=time.perf_counter() - started, error=error)


_LOADED: dict[Models, Evaluator] = {}  # of a worker's process, which runs many tasks


def _evaluator(models: Models, alignment: AlignmentFile | None) -> Evaluator:
    if models not in _LOADED:
        _LOADED.clear()
        _LOADED[models] = Evaluator(models, alignment)
    return _LOADED[models]


@contextmanager
def _cluster(address: str, jobs: int) -> Iterator[Any]:
    """The module ray, connected; a cluster of our own ends with us."""
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise OptionError("ray", address, "an installed Ray: pip install 'outrider[ray]'") from error
    own = {"num_cpus": jobs, "include_dashboard": False} if address == LOCAL else {}
    try:
        if address not in (LOCAL, "auto"):  # Ray itself would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=5).close()
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except (OSError, ValueError, RuntimeError) as error:
        raise OptionError("ray", address, f"local, auto or host:port of a running cluster ({_last_line(error)})") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
