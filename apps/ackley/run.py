"""The Ackley function, a test function with many local maxima and one best value, 0, at the origin.

D. H. Ackley, A Connectionist Machine for Genetic Hillclimbing, 1987. It costs nothing to evaluate, so it shows what a
search does rather than what a model does. `run_slow` takes some seconds, more for some configurations than for others,
as training does.
"""

import hashlib
import json
import math
import os
import random
import time


def ackley(x):
    """Return Ackley's function of the sequence `x`, of any length; its minimum is 0."""
    mean_square = sum(value**2 for value in x) / len(x)
    mean_cosine = sum(math.cos(2 * math.pi * value) for value in x) / len(x)
    return 20 - 20 * math.exp(-0.2 * math.sqrt(mean_square)) + math.e - math.exp(mean_cosine)


def duration_s(job, mean_s, std_s):
    """Return how long a configuration takes: log-normal over configurations, always the same for the same one."""
    name = json.dumps(dict(job), sort_keys=True)
    generator = random.Random(hashlib.sha256(name.encode()).digest())
    variance = math.log1p((std_s / mean_s) ** 2)
    return generator.lognormvariate(math.log(mean_s) - variance / 2, math.sqrt(variance))


def run(job):
    """Evaluate one configuration: `job` maps x0, x1, ... to their values, as many as there are."""
    return -ackley(list(dict(job).values()))


def run_slow(job):
    """Evaluate one configuration in about ACKLEY_SLEEP_S="mean,std" seconds (2 and 1 unless the environment says)."""
    mean_s, std_s = map(float, os.environ.get("ACKLEY_SLEEP_S", "2,1").split(","))
    sleep_s = duration_s(job, mean_s, std_s)
    time.sleep(sleep_s)
    return {"objective": run(job), "metadata": {"sleep_s": round(sleep_s, 3)}}
