"""Several ranks in one process, each a thread: for fast tests of evaluations, whose sums over ranks
then really add up.

    with ranks(monkeypatch, world=3, batch=4) as run:
        a, b, c = run(work)
"""

import ast
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace


@contextmanager
def ranks(monkeypatch, world: int, batch: int):
    """run(work): what `world` ranks, each with its own rank(), return; rounds of `batch` images,
    small chunks.
    """
    me, meet, given = threading.local(), threading.Barrier(world), [None] * world
    parse, lock = ast.parse, threading.Lock()

    def parse_alone(*args, **kwargs):
        """Python 3.11's parser fails now and then when threads use it at once (np.load reads its
        headers by it).
        """
        with lock:
            return parse(*args, **kwargs)

    monkeypatch.setattr(ast, "parse", parse_alone)

    def exchanged(value):
        given[me.rank] = value
        meet.wait(30)
        values = list(given)
        meet.wait(30)
        return values

    fakes = dict(
        rank=lambda: me.rank,
        world=lambda: world,
        BATCH=batch,
        CHUNK=7,
        total=lambda values: sum(exchanged(values.clone())),
        barrier=lambda: meet.wait(30),
        once=lambda make: make(),
        told=lambda make: exchanged(make())[0],
        least=lambda value: min(exchanged(value)),
        gathered=lambda items: sum(exchanged(items), []),
    )
    fakes["dist"] = SimpleNamespace(
        broadcast=lambda value, source: value.copy_(exchanged(value.clone())[source])
    )
    for name, module in list(sys.modules.items()):
        if name.startswith("glimpse.run.evals") or name == "glimpse.run.evals.supervised":
            for fake, value in fakes.items():
                if hasattr(module, fake):
                    monkeypatch.setattr(
                        module,
                        fake,
                        2 * batch
                        if (name, fake) == ("glimpse.run.evals.features", "CHUNK")
                        else value,
                    )

    def run(work):
        found, errors = [None] * world, []

        def one(r):
            me.rank = r
            try:
                found[r] = work()
            except BaseException as error:
                errors.append(error)
                meet.abort()

        threads = [threading.Thread(target=one, args=(r,)) for r in range(world)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        if errors:
            raise next(
                (e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0]
            )
        return found

    yield run
