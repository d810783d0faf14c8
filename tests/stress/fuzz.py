"""Random networks through random events, for as long as you like, held against a twin and against a slow reference.

    python tests/stress/fuzz.py --minutes 30

Each round has a new seed, which it prints when it finds something, with what hypothesis needs to run it again. What
fails is kept in the folder `.hypothesis` and is tried in the first round of the next time, and in no later one, which
would find it again and nothing else. `--seed` runs one round again.
"""

import itertools
import random
import sys
import time
import traceback
import warnings

from common import Tally, finish, machine, parser  # isort: skip  # puts the tests' own models on the path
import torch
from fuzzing import COUNTS, EVENTS, FINISHED, REFUSED, Machine, ReferenceMachine
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

ROUND = 100  # networks
MACHINES = {"twin": Machine, "reference": ReferenceMachine}
SETTINGS = settings(
    max_examples=ROUND,
    stateful_step_count=20,
    deadline=None,
    print_blob=True,
    derandomize=False,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=[*HealthCheck],
)


def one_round(name, number, tally, reuse):
    """One round with this seed, first with what failed earlier if it is to; a failure is a fault of the tally."""
    phases = [phase for phase in SETTINGS.phases if reuse or phase is not Phase.reuse]
    try:
        run_state_machine_as_test(seed(number)(MACHINES[name]), settings=settings(SETTINGS, phases=phases))
    except Exception:
        tally.add(f"held against a {name}", "found", f"--seed {number}\n{traceback.format_exc()}")


def run(minutes, first=None):
    """Rounds of each machine in turns; a tally of networks by what they are, and the figures of the whole."""
    COUNTS.clear()
    EVENTS.clear()
    tally, start = Tally([FINISHED, REFUSED]), time.monotonic()
    numbers = random.SystemRandom() if first is None else None
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for each in itertools.count():
        number = first if numbers is None else numbers.randrange(1 << 30)
        for name in MACHINES:
            one_round(name, number, tally, reuse=each == 0)
        if numbers is None or time.monotonic() - start > 60 * minutes:
            break
    for (what, outcome), count in sorted(COUNTS.items()):
        tally.rows.setdefault(what, type(EVENTS)())[outcome] += count
    took = round((time.monotonic() - start) / 60)
    return tally, {"networks": f"{sum(COUNTS.values()):,}", "events": f"{EVENTS.total():,}", "minutes": took}


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--minutes", type=float, default=30.0, help="how long, about")
    arguments.add_argument("--seed", type=int, help="run the round of this seed again, and no other")
    options = arguments.parse_args()
    tally, figures = run(options.minutes, options.seed)
    print(f"{figures['networks']} networks, {figures['events']} events, {figures['minutes']} minutes; {machine()}")
    sys.exit(finish("fuzz", tally, options, f"--minutes {options.minutes:g}", figures=figures))
