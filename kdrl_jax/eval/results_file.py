"""What the `eval` command leaves: results and the settings they are of, and answers to read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdrl_jax import hosts
from kdrl_jax.config import Config, load_run_config
from kdrl_jax.config.errors import show
from kdrl_jax.config.evaluation import evaluation_settings, settings_digest
from kdrl_jax.config.load import differences
from kdrl_jax.evaluate import Results
from kdrl_jax.metrics import read_json
from kdrl_jax.paths import check_writable
from kdrl_jax.record import write_evaluation


class ResultsFile:
    """`eval_DIGEST.json`, named by the settings, so that an evaluation with others has a file of its own. One
    with the same settings adds to it: what it finds of a model takes the place of what was found before."""

    def __init__(self, folder: Path, config: Config, *, is_run: bool):
        """Looks at the place; nothing is written yet.

        Args:
            is_run: the config is that of a run, with overrides.

        Raises:
            OSError: the folder cannot be written.
            ValueError: a file of these settings is there and holds no results.
        """
        self._folder = folder
        settings = evaluation_settings(config)
        digest = settings_digest(settings)
        self._name = f"eval_{digest}"
        self.path = folder / f"{self._name}.json"
        self._content: dict[str, Any] = {"digest": digest, "settings": settings, "overrides": []}
        if is_run:
            own = evaluation_settings(load_run_config(config.run_dir))
            self._content["overrides"] = [
                # Questions are told apart by all that is said of them.
                f"{key}={json.dumps(now) if isinstance(now, (list, dict)) else show(now)}"
                for key, _, now in differences(own, settings)
            ]
        self._evaluations: dict[str, Results] = {}
        if hosts.is_first():
            check_writable(folder)
            self._read()

    def _read(self) -> None:
        if not self.path.exists():
            return
        before = read_json(self.path)
        if not isinstance(before, dict) or not isinstance(before.get("evaluations"), dict):
            raise ValueError(f"{self.path}: holds no evaluations; remove it, or name another folder by out=")
        self._evaluations = before["evaluations"]
        if "change" in before:
            self._content["change"] = before["change"]

    def add(
        self, model: str, results: Results, samples: list[dict[str, Any]], change: Mapping[str, Any]
    ) -> None:
        """Writes the file with the results of one more model.

        Args:
            model: its name there, and behind that of this file the name of its samples.
            change: between students so far; empty for none.
        """
        if not hosts.is_first():
            return
        self._evaluations[model] = results
        if change:
            self._content["change"] = dict(change)
        # Teachers, which have no step, before the students in the order of theirs.
        ordered = sorted(self._evaluations.items(), key=lambda item: item[1].get("step", -1) or 0)
        whole = self._content | {"evaluations": dict(ordered)}
        write_evaluation(self._folder, self._name, whole, {f"{self._name}_{model}": samples})
