"""How far an ablation is."""

import time

from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text


class TimeLeft(ProgressColumn):
    """The time left, by the mean of what has been done since the start."""

    def render(self, task) -> Text:
        """The column's text."""
        if not task.completed or task.elapsed is None:
            return Text("time left: not known yet")
        left = int(task.elapsed * (task.total - task.completed) / task.completed)
        return Text(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")


class Bar:
    """A progress bar of the epochs of a study's runs; where there is no terminal, a line now and then."""

    def __init__(self, study, runs, every: float = 60.0):
        columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} epochs")]
        self.study, self.runs, self.every, self.said = study, runs, every, time.monotonic()
        self.progress = Progress(*columns, TimeElapsedColumn(), TimeLeft())
        self.before = {run.name: study.epochs_done(run) for run in runs}
        self.task = self.progress.add_task("", total=sum(run.epochs for run in runs))

    def __enter__(self):
        if self.progress.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *_):
        self.progress.stop()

    def tick(self, running) -> None:
        """Show what is done, and what is trained at the moment."""
        done = sum(self.study.epochs_done(run) for run in self.runs)
        self.progress.update(self.task, completed=done, description=", ".join(run.name for run in running))
        if not self.progress.console.is_terminal and time.monotonic() - self.said >= self.every:
            self.said = time.monotonic()
            self.progress.console.print(*(column(self.progress.tasks[0]) for column in self.progress.columns))
