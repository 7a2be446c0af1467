"""Requests and tasks of lm-evaluation-harness."""

from lm_eval.api.instance import Instance

from .goldens import ROOT

TASKS = ROOT / "tests" / "fixtures" / "evals"


def asks(kind: str, *arguments: tuple) -> list[Instance]:
    """Requests of one kind, one for each tuple of arguments."""
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def enter_tasks(monkeypatch, tmp_path) -> None:
    """Go to the folder of the tasks; the copies that `datasets` makes are thrown away. The
    harness's own tasks, whose thousands of files take it seconds, are left out."""
    import datasets
    from lm_eval import tasks

    def manager(include_path, **_):
        return real(include_path=include_path, include_defaults=False)

    real = tasks.TaskManager
    monkeypatch.setattr(tasks, "TaskManager", manager)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(TASKS)
