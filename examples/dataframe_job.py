"""Job on a pandas data frame, which is saved while it runs, and resumed by another process or on another host.

    python dataframe_job.py start job.img     create the job, and work for a while
    python dataframe_job.py resume job.img    continue from the last checkpoint to the end, and check the result

A thread computes the column `score` chunk by chunk. The thread holds the lock `turn` during each chunk. Pageferry
acquires this lock for the pause of a checkpoint. The main thread saves the job every 0.2 s. The frame and the number of
rows that are done are buffers of one image, so both have the same snapshot point.

Requires pandas.
"""

from __future__ import annotations

import sys
import threading
import time

import numpy as np
import pandas as pd

import pageferry

ROWS, CHUNK = 400_000, 2_000


def create(image: str) -> None:
    """Write the job with no rows done."""
    frame = pd.DataFrame({"value": np.arange(ROWS) % 1000, "score": np.full(ROWS, -1.0)})
    pageferry.dump({"frame": frame, "done": np.zeros(1, np.int64)}, image)


def score(values: pd.Series) -> pd.Series:
    """Return the result for a chunk."""
    return values**2 / 7


def work(image: str, seconds: float) -> int:
    """Continue the job for up to `seconds` seconds, and save it at intervals. Return the number of rows that are done
    and saved."""
    turn = threading.Lock()
    job = pageferry.load(image, "w", on_pause=turn)
    frame, done, deadline = job["frame"], job["done"], time.monotonic() + seconds

    def compute() -> None:
        while done[0] < ROWS and time.monotonic() < deadline:
            with turn:
                chunk = slice(int(done[0]), int(done[0]) + CHUNK)
                frame.iloc[chunk, 1] = score(frame["value"].iloc[chunk])
                done[0] += CHUNK

    worker = threading.Thread(target=compute)
    worker.start()
    ended = False
    while not ended:
        worker.join(0.2)
        ended = not worker.is_alive()
        with turn:
            arena = pageferry.arena_of(job)  # raises an error if pandas has replaced a column by a copy
        pageferry.checkpoint(arena, image)  # replaces the image when the new one is complete
    return int(done[0])


def main(step: str, image: str) -> None:
    """Start or resume the job."""
    if step == "start":
        create(image)
        print(f"{work(image, 0.5)} rows are done; resume the job anywhere with {image}")
        return
    print(f"resumed with {pageferry.load(image)['done'][0]} rows done")
    work(image, 3600.0)
    frame = pageferry.load(image)["frame"]
    print("all rows are correct" if (frame["score"] == score(frame["value"])).all() else "rows are wrong")


if __name__ == "__main__":
    main(*sys.argv[1:])
