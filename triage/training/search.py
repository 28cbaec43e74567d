"""A search for better settings of a training, by Optuna.

Trials are short trainings on the frames of the run. They are written down as they end, so an
interrupted search goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from triage.errors import EnvironmentLacksError

if TYPE_CHECKING:
    from triage.training.train import Settings

__all__ = ["searched"]


def searched(
    worth: Callable[[Settings], float],
    settings: Settings,
    file: Path,
    trials: int,
    say: Callable[[str], None],
) -> Settings:
    """``settings`` with learning rate, batch size and weight decays of the best trial.

    Args:
        worth: figure of a short training, the higher the better.
        file: where the trials are written down, an SQLite database.
        trials: how many there are to be, those of an interrupted search among them.
        say: told one line per trial.

    Raises:
        EnvironmentLacksError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as err:
        raise EnvironmentLacksError(
            "a search of settings needs Optuna; install the extra 'train', or leave out --search"
        ) from err
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def chosen(trial: optuna.trial.BaseTrial) -> Settings:
        return replace(
            settings,
            learning_rate=trial.suggest_float("learning_rate", 3e-4, 1e-2, log=True),
            batch_size=trial.suggest_categorical("batch_size", [32, 64, 128]),
            blank_decay=trial.suggest_float("blank_decay", 1e-3, 1.0, log=True),
            rings_decay=trial.suggest_float("rings_decay", 1e-2, 3.0, log=True),
            full_decay=trial.suggest_float("full_decay", 1e-3, 1.0, log=True),
        )

    study = optuna.create_study(
        storage=f"sqlite:///{file}",
        study_name="settings",
        sampler=optuna.samplers.TPESampler(seed=settings.seed),
        direction="maximize",
        load_if_exists=True,
    )
    if not study.trials:
        # The settings as they are come first, so nothing worse than they is chosen.
        names = ("learning_rate", "batch_size", "blank_decay", "rings_decay", "full_decay")
        study.enqueue_trial({name: getattr(settings, name) for name in names})
    done = len([t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE])

    def told(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        say(f"trial {trial.number}: figure {trial.value:.4f}, {trial.params}")

    study.optimize(lambda trial: worth(chosen(trial)), max(0, trials - done), callbacks=[told])
    return chosen(optuna.trial.FixedTrial(study.best_params))
