"""Training adapters: what is learned, how, and what a run leaves.

loop.py        train, and the one loop for one run or many      fleet.py       many recipes: which go side by side
preflight.py   what can be checked before anything expensive    inputs.py      the training data, and batches of it
step.py        one step's gradients                             optimizers.py  optimizers, learning rates, the state
objectives/    what a batch's loss is                           memory/        how a run fits into memory
run.py         a run in progress                                milestones.py  samples, checkpoints, the end
selection.py   which checkpoint becomes the adapter             metadata.py    what the file says about itself
rundir.py      the run folder                                   events.py      what a run tells while it goes on
changes.py     what a run may go on with                        event_of.py    how it started, a step, how it failed
control.py     a word to a run that goes on
"""
