"""MLflow runs that end as what they were: finished, failed or killed."""

from __future__ import annotations

import atexit
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported, which monai.handlers does

from ignite.engine import Engine, Events
from monai.engines import Trainer
from monai.handlers import MLFlowHandler

__all__ = ["MLflowTracker"]

_LONGEST_PARAMETER = 500  # what MLflow's database column is sure to hold
_MOST_PARAMETERS = 100  # what MLflow takes in one request


def _losses_of_output(output: Any) -> dict[str, float]:
    losses = {"loss": float(output["loss"].detach())}
    if isinstance(output["pred"], dict):
        losses.update(
            {f"loss_{name}": float(value.detach()) for name, value in output["pred"].get("losses", {}).items()}
        )
    return losses


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return "a.b" -> value as text, without any "config", which has hundreds of entries and stands in lineage.json."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key == "config":
            continue
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{name}."))
        else:
            flat[name] = str(value)[:_LONGEST_PARAMETER]
    return flat


class MLflowTracker(MLFlowHandler):
    """MONAI's MLflow handler, for a trainer and its evaluator together.

    Beyond the parent: a run of its own each time (the parent reuses an unfinished one of the same name), closed when
    the engine that began it ends, FAILED if an error ends it and KILLED if Ctrl-C or the end of the process does; the
    configuration's plain values and the lineage as parameters, the whole configuration and lineage as artifacts.

    Args:
        tracking_uri: where MLflow keeps runs, for instance ``sqlite:///…/mlruns.db``; MLFLOW_TRACKING_URI takes
            precedence.
        experiment_name: groups runs.
        run_name: shown in the list; the time and a short random part are appended, which makes it unique.
        lineage: object with `state_dict`, as `vlm3d_ext.lineage.Lineage`.
        artifacts: files stored with the run when it ends.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiment_name: str = "vlm3d",
        run_name: str = "run",
        lineage: Any | None = None,
        artifacts: Sequence[str] = (),
    ) -> None:
        if tracking_uri.startswith("sqlite:///"):
            Path(tracking_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        unique = f"{run_name}-{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:6]}"
        super().__init__(
            tracking_uri=tracking_uri,
            output_transform=_losses_of_output,
            experiment_name=experiment_name,
            run_name=unique,
            artifacts=[Path(artifact) for artifact in artifacts],
        )
        self.cur_run: Any = None  # the parent's, which gives it no type
        self.lineage = lineage
        self._owner: Engine | None = None

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer (losses of each iteration) or to an evaluator (its metrics); on rank 0 only."""
        if int(os.environ.get("RANK", "0")) > 0:
            return
        engine.add_event_handler(Events.STARTED, self._start_once)
        if isinstance(engine, Trainer):
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self._finish)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def _start_once(self, engine: Engine) -> None:
        if self._owner is not None:
            return
        self._owner = engine
        self.start(engine)
        atexit.register(self._terminate, "KILLED")
        if self.lineage is not None:
            record = self.lineage.state_dict()
            parameters = _flatten(record, "lineage.")
            config = record.get("config") or {}
            knobs = {k: v for k, v in config.items() if isinstance(v, (str, int, float, bool)) and "$" not in str(v)}
            parameters.update(_flatten(knobs))
            items = [item for item in parameters.items() if item[0] not in self.default_tracking_params]
            for first in range(0, len(items), _MOST_PARAMETERS):
                self._log_params(dict(items[first : first + _MOST_PARAMETERS]))
            self.client.log_dict(self.cur_run.info.run_id, record, "lineage.json")
            if config:
                self.client.log_dict(self.cur_run.info.run_id, config, "config.json")

    def _finish(self, engine: Engine) -> None:
        if engine is self._owner:
            self.complete()
            self._terminate("FINISHED")

    def _fail(self, engine: Engine, error: BaseException) -> None:
        self._terminate("FAILED" if isinstance(error, Exception) else "KILLED")  # Ctrl-C is no fault of the run
        raise error

    def _terminate(self, status: str) -> None:
        if self.cur_run is None:
            return
        atexit.unregister(self._terminate)
        self.client.set_terminated(self.cur_run.info.run_id, status)
        self.cur_run = None
        self._owner = None  # running the engine again makes another run
        dispose = getattr(self, "_dispose_sqlite_store", None)  # MONAI 1.6 and newer
        if dispose is not None:
            dispose()
