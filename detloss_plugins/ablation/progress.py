"""How far an ablation is."""

import time

from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text


class TimeLeft(ProgressColumn):
    """The time left, by the mean of what has been done since the start, beside ``before`` of an earlier one."""

    def render(self, task) -> Text:
        """The column's text."""
        done = task.completed - task.fields.get("before", 0)
        if done <= 0 or task.elapsed is None:
            return Text("time left: not known yet")
        left = int(task.elapsed * (task.total - task.completed) / done)
        return Text(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")


class Bar:
    """A progress bar of the epochs of a study's runs; where there is no terminal, a line now and then."""

    def __init__(self, study, runs, every: float = 60.0):
        columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} epochs")]
        self.study, self.runs, self.every, self.said = study, runs, every, time.monotonic()
        self.left = TimeLeft()
        self.progress = Progress(*columns, TimeElapsedColumn(), self.left)
        self.task = self.progress.add_task("", total=sum(run.epochs for run in runs))
        self.before = self.done()

    def __enter__(self):
        if self.progress.console.is_terminal:
            self.progress.start()
        else:
            self.progress.start_task(self.task)
        return self

    def __exit__(self, *_):
        if self.progress.console.is_terminal:
            self.progress.stop()

    def done(self) -> int:
        """The epochs that all runs have behind them."""
        return sum(self.study.epochs_done(run) for run in self.runs)

    def tick(self, running) -> None:
        """Show what is done, and what is trained at the moment."""
        done = self.done()
        self.before = min(self.before, done)  # a training that was cut off may begin again
        names = [run.name for run in running]
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        self.progress.update(self.task, completed=done, description=shown, before=self.before)
        if not self.progress.console.is_terminal and time.monotonic() - self.said >= self.every:
            self.said = time.monotonic()
            task = self.progress.tasks[0]
            left = self.left.render(task)
            print(f"{int(task.completed)}/{int(task.total)} epochs, {left}; {task.description}", flush=True)
