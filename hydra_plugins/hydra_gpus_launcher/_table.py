"""What the launcher shows: the live table, a line per event, the table at the end. Pure functions of the jobs."""

from collections import Counter

from ._queue import Job

OPEN = ("running", "waiting")
HEAD = ("run", "state", "device", "progress", "error", "left")


def live_lines(jobs: list[Job], width: int, height: int, now: float, note: str = "") -> list[str]:
    """The jobs as at most `height` - 1 lines of fewer than `width` characters, the totals and a note last.

    If they do not fit, jobs that ended well are folded into the line of totals, then those that wait.
    """
    shown, rows = jobs, max(1, height - 3)
    if len(jobs) > rows:
        order = sorted(jobs, key=lambda job: {"running": 0, "failed": 1, "waiting": 2}.get(job.state, 3))
        kept = {id(job) for job in order[:rows] if job.state in (*OPEN, "failed")}
        shown = [job for job in jobs if id(job) in kept]
    lines = _aligned([HEAD, *(_live_cells(job, now) for job in shown)], width - 1)
    for i, job in enumerate(shown, 1):
        if job.state == "failed":
            lines[i] = _cut(f"{lines[i]}  {clean(job.reason)}", width - 1)
    lines.append(_cut(_totals(jobs, len(jobs) - len(shown), now) + (f"; {note}" if note else ""), width - 1))
    return lines[-max(1, height - 1) :]


def event_line(job: Job) -> str:
    """One line for a job that has started or ended."""
    if job.state == "running":
        return f"{job.label}: started on {_device(job)}"
    if job.state == "waiting":
        return f"{job.label}: waits, {job.reason}"
    took = f" after {_took(job)}" if job.ended else ""
    reason = f": {clean(job.reason)}" if job.reason else ""
    where = f" (output in {job.log})" if job.state == "failed" and job.log else ""
    return f"{job.label}: {clean(job.state)}{took}{_error(job, ', error ')}{reason}{where}"


def final_lines(jobs: list[Job], now: float) -> list[str]:
    """All jobs with how they ended."""
    rows: list[tuple[str, ...]] = [("run", "state", "took", "error", "reason")]
    for job in jobs:
        state = "not started" if job.state == "waiting" else clean(job.state)
        where = f" ({job.log})" if job.state == "failed" and job.log else ""
        rows.append((job.label, state, _took(job), _error(job), clean(job.reason) + where))
    return [*_aligned(rows), _totals(jobs, 0, now)]


def duration(seconds: float) -> str:
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def clean(text) -> str:
    """Text of a job's on one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def labels(overrides: list[list[str]]) -> list[str]:
    """What tells each job from the others: its overrides less those that all have."""
    common = set.intersection(*map(set, overrides)) if len(overrides) > 1 else set()
    return [" ".join(o for o in one if o not in common) or f"run {i}" for i, one in enumerate(overrides)]


def _live_cells(job: Job, now: float) -> tuple[str, ...]:
    device = _device(job)
    if job.state in ("waiting", "failed"):
        return (job.label, job.state, device, job.reason if job.state == "waiting" else "", "", "")
    progress = job.status.get("progress") or ("starting" if job.state == "running" else "")
    return (job.label, clean(job.state), device, clean(progress), _error(job), _left(job, now))


def _device(job: Job) -> str:
    return job.device.name if job.device else ""


def _took(job: Job) -> str:
    return duration(job.ended - job.started) if job.started is not None and job.ended else ""


def _error(job: Job, before: str = "") -> str:
    error = clean(job.status.get("error") or "")
    return before + error if error else ""


def _left(job: Job, now: float) -> str:
    eta = job.status.get("eta_s")
    if job.state != "running" or not isinstance(eta, (int, float)) or not 0 <= eta < 1e9:
        return ""
    return duration(eta - (now - job.told))


def _totals(jobs: list[Job], folded: int, now: float) -> str:
    counts = Counter(clean(job.state) for job in jobs)
    waiting = "waiting" if counts["running"] or not any(job.ended for job in jobs) else "not started"
    words = [f"{number} {waiting if state == 'waiting' else state}" for state, number in sorted(counts.items())]
    began = min((job.started for job in jobs if job.started), default=now)
    hidden = f" ({folded} not shown)" if folded else ""
    return f"{len(jobs)} runs: {', '.join(words)}{hidden}; {duration(now - began)}"


def _aligned(rows: list[tuple[str, ...]], width: int | None = None) -> list[str]:
    """Columns two spaces apart. If `width` is too small the first column gives way, then the end of each line."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) if any(column[1:]) or not i else 0 for i, column in enumerate(columns)]
    if width is not None:
        widths[0] = min(widths[0], max(12, width - sum(w + 2 for w in widths[1:] if w)))
    lines = []
    for row in rows:
        cells = [_cut(cell, w).ljust(w) for cell, w in zip(row, widths, strict=True) if w]
        line = "  ".join(cells).rstrip()
        lines.append(line if width is None else _cut(line, width))
    return lines


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"
