"""Writes docs/reliability.md from tests/stress/results; with --check it writes nothing and says whether the page is so.

python tests/stress/kills.py --json tests/stress/results/kills.json
python tests/stress/reliability.py
"""

import json
import sys
from pathlib import Path

from common import RESULTS, markdown, plain_table

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
HEAD = """# Reliability

What was tried to break it, how often, and what came out. Each table is counted by a script that you can run; a small
sample of each runs with the tests. An outcome that is no column never came.
"""
# What a script is about, and what is promised.
SECTIONS = {
    "kills": (
        "Killed runs, killed writers, full disks",
        """\
A process that trains is killed (SIGKILL) at the start of a step, another resumes from the last file, and all
that it ends with is compared with a run that was never stopped: weights, factors, optimizer, report and final
model; of a run with averaged weights the report and the final model. Then a process that writes two files over
each other in turns is killed at a random moment, and files are written over others on a disk that takes only so many
bytes.""",
        """\
**Promised.** A run ends with the same bits wherever it was killed, with data and noise that are functions of
the step. A file is the old one or the new one, whole: it is written beside its place and moved there. A writer
that cannot write says so in one line that names the file, and leaves nothing beside it; one that is killed may
leave a file `.NAME.*.part`, which may be deleted. **Not promised:** the same of an asynchronous or sharded
checkpoint writer, whose files are its own; of ONNX of more than a gigabyte, whose weights are in a second file.""",
    ),
    "sharded_kills": (
        "Killed runs with sharded parameters",
        """\
Two and four processes train a model whose parameters are sharded by `fully_shard`, with rows that they share evenly or
not, and write a file or a folder of shards after each step. All are killed (SIGKILL) at the start of a step, each step
of a run of 16 in turn, in all three phases; as many processes resume from the last checkpoint, and what each of them
ends with is compared with what it has in a run that was never stopped: its rows of the factors and of what the
optimizer remembers, the dense weights, the report and the small model. Then runs of 100 steps are compared with those
of one process, the weights after each fifth step.""",
        """\
**Promised.** A run ends with the same bits in each process wherever it was killed between two steps, with data and
noise that are functions of the step, and on any number of processes with the weights of one process up to rounding; all
processes choose the same ranks. **Not promised:** that a folder of shards is whole which was written when its writers
died: it is torch's and Lightning's to write, lacks its `meta.pt` then and is refused. Resume from the one before.""",
    ),
    "processes": (
        "Processes of which one goes wrong",
        """\
Two and three processes train one model with DDP (gloo, on the CPU), with Lightning or in a loop of one's own. In one of
them alone, the first, which decides, or the last, something happens; "by data" is `importance="fisher"`. Each situation
is tried with DDP alone too, and what a process ends with, or its message, is compared with the others'.""",
        """\
**Promised.** All processes end with the same bits, weights, factors, optimizer and final model, or all that still live
end within seconds. Where it happens in what this package does, each says why: what failed, or that another process has
ended, and what to do then. Where it happens in the middle of a step, the others wait in DDP's own all-reduce and say
what they say without the callback. Ranks are decided in process 0: a metric that is watched may be logged there alone,
and a run has the length that it has there. Processes that are asked for different things are refused by the argument's
name, or the layer's. Batches that run out in one process end a run as they do with DDP alone, and with `max_steps` or
`limit_train_batches` they end none. **Not promised:** `torch.distributed.algorithms.Join`. It holds the DDP that it was
given, and DDP is made anew where parameters become fewer. A cut inside of it, where a process has no batches left, is
refused; after a cut that made DDP anew all wait until the process group's `timeout`. Give each process as many batches,
as `DistributedSampler` does.""",
    ),
    "not_finite": (
        "Numbers that are not finite",
        """\
NaN or infinity is put into weights, biases and running statistics before a fit; into outputs, losses, batches,
gradients and the state of the optimizer in a step; into factors, singular values and statistics of data when ranks are
to be chosen; into a metric that is watched; and into what is compressed, saved, exported, read and reported.""",
        """\
**Promised.** No rank is chosen by NaN: a run whose weights are not finite ends when ranks are due, with the name of a
layer, and the model has plain layers again; statistics of data that are not finite are thrown away, and ranks wait.
What is refused is refused in a line, with the model as it was. What is not finite at the end of a run is in the
report's warnings, and JSON has null for it. **Not promised:** that a run ends at the first NaN. Between changes of
ranks, and after the last, nothing is looked at, as each look would wait for the device: Lightning's
`detect_anomaly=True` does that. What is logged is logged as it is.""",
    ),
    "damage": (
        "Damaged files",
        """\
Bytes of a file are cut off, changed, zeroed, added and taken out; entries are taken out, added, and given
values of other kinds, shapes and dtypes, NaN among them; and there are files of other kinds, empty ones,
folders, text, and pickles with code. Each is given to every reader of such files.""",
        """\
**Promised.** What is refused is refused in one line that names the file, with the model as it was: its values,
its parameters, their dtypes and `requires_grad`; the command shows no traceback, and nothing in a file is run.
"Read whole" are files whose damage is none to this reader, or cannot be told: where a byte changes among the
numbers of a tensor, the file says another number, and no such file has a checksum that is read. **Not
promised:** anything of what Lightning counts (`loops`), of the states of schedulers and the settings of
optimizers, which are taken as they are; of files that a module with an `on_load_checkpoint` or a loader of its
own makes fit.""",
    ),
    "constructors": (
        "Malformed arguments",
        """\
Configurations are drawn at random from values that mean something; in malformed ones some are replaced by what
does not: other types, strings and flags for numbers, NaN, infinity, negative and huge numbers, tensors and
arrays, unknown names, pairs that contradict each other.""",
        """\
**Promised.** Whoever gives an argument that means nothing is told so where it is written, a `ValueError` or
`TypeError` in one line that names the argument, and not in the middle of a fit.""",
    ),
    "fuzz": (
        "Random networks, random events",
        """\
Networks are drawn at random: linear, convolutional, transposed, attention, recurrent, embedding and normalization
layers in trees of containers, with layers that stand at two places, tied weights, frozen and unused layers, hooks,
parameters of their own, and children called "weight" or "s"; with optimizers of one group, several, or two optimizers,
and a recipe. Then events are drawn: steps with accumulated or clipped gradients, saving, killing and resuming, going
back in the middle of a run, other rates, other weights, freezing, pauses, copies, pickles, averages, evaluation. After
each event the run is compared bit for bit with a twin to which only the training happened, the network with what the
user's own has (names, shapes, classes, groups), and as long as the dense weights train with a loop without the package.
Of linear layers and convolutions in float64 each step is compared with a reference that keeps U, s and V whole with a
mask, takes gradients by autograd and steps by hand. {networks} networks went through {events} events in {minutes}
minutes.""",
        """\
**Promised.** What only looks at a network, copies it, saves it or resumes it changes no bit of a run in a loop of
plain PyTorch; a step, a cut and a penalty are those that the documentation says; what is refused is refused by name
before the first step has changed anything, and at the end there are plain layers that compute what the run did, within
rounding, at a cost that is what torch counts. **Not promised:** to go back in the middle of a run, by `load_state_dict`
of one that goes on, past a cut of attention or recurrent modules; the values of a weight that was loaded, saved before
a step and resumed, which come back as the ranks in use hold them.""",
    ),
}


def page():
    """The page's text as the results say it."""
    parts = [HEAD]
    for name, (title, tried, promised) in SECTIONS.items():
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        lines = result.get("table")
        table = plain_table(lines) if lines else markdown(result["rows"], result["outcomes"])
        source = f"`{result['command']}`, {result['machine']}."
        tried = tried.format(**result.get("figures", {}))
        parts.append("\n\n".join([f"## {title}", tried, table, promised, source]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
