"""Model that 4 workers serve from one image. The workers share the memory of its arrays, which exists only once.

    python examples/model_workers.py model.img

Writes a model to the image, starts the workers, and prints the memory of one worker alone and of all together. Each
worker loads the model by the path of the image: a web server could start the workers as well.

Requires numpy.
"""

from __future__ import annotations

import sys
from multiprocessing import get_context
from multiprocessing.pool import Pool

import numpy as np

import pageferry

WORKERS, FEATURES, ITEMS = 4, 512, 16_384

model: dict[str, np.ndarray] = {}


def create(image: str) -> None:
    """Write a model of 64 MiB."""
    pageferry.dump({"items": np.random.default_rng(1).random((ITEMS, FEATURES)), "bias": np.arange(ITEMS)}, image)


def start(image: str) -> None:
    """Load the model in a worker. Contents are loaded on demand, once for all workers."""
    model.update(pageferry.load(image, memory="shared"))


def best(query: np.ndarray) -> int:
    """Return the item with the highest score."""
    return int(np.argmax(model["items"] @ query + model["bias"]))


def memory(_: object) -> int:
    """Return this worker's proportional share, in bytes, of the memory files that it shares with other processes."""
    with open("/proc/self/smaps_rollup") as lines:
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss_Shmem"))


def serve(pools: list[Pool]) -> int:
    """Send a query to each worker, and return the total memory of the workers."""
    query = np.ones(FEATURES)
    answers = {pool.apply(best, (query,)) for pool in pools}
    assert len(answers) == 1, answers
    return sum(pool.apply(memory, (None,)) for pool in pools)


def main(image: str) -> None:
    """Create the model, and serve it from one worker and from all."""
    create(image)
    context = get_context("spawn")
    pools = [context.Pool(1, start, (image,)) for _ in range(WORKERS)]
    for count in (1, WORKERS):
        print(f"{count} workers answered, and hold {serve(pools[:count]) >> 20} MiB", flush=True)
    for pool in pools:
        pool.terminate()


if __name__ == "__main__":
    main(sys.argv[1])
